"""Inside the virtual machine, whose clock is its own: what jumps of the real-time clock do to a running broker."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from steps import wait_for

import fdbroker

HOUR_S = 3600
SOCKET = "/run/clock/socket"
LOG = Path("/lab/out/clock")
POLICY = """\
version: 1
topics: {mail: {deliver: [queue, subscribers], keep: 24h}, brief: {deliver: [queue], keep: 1h}}
limits: {requests_per_second: 20, burst: 40}
users:
  0: {devices: [{path: /dev/zero, access: ro, class: mem}], send: [mail, brief], subscribe: [mail, brief]}
"""


def jump(seconds: float) -> None:
    time.clock_settime(time.CLOCK_REALTIME, time.clock_gettime(time.CLOCK_REALTIME) + seconds)


def started() -> subprocess.Popen[str]:
    with LOG.open("w") as log:
        words = ("serve", "--policy", "/run/clock/policy.yaml", "--socket", SOCKET, "--state", "/run/clock/state")
        broker = subprocess.Popen((sys.executable, "-m", "fdbroker", *words), stderr=log, text=True)
    wait_for("its socket", lambda: "serving with" in LOG.read_text(), 90)
    return broker


def send_and_receive(client: Any, topic: str, text: str) -> int:
    """Send it, and return its number as the stored queue has it; -1 when it is not the last one there."""
    client.send(topic, text, to=0)
    last = client.receive(100)[-1]
    return last.number if last.payload.decode() == text else -1


def clock() -> dict[str, Any]:
    Path("/run/clock").mkdir(mode=0o755)
    Path("/run/clock/policy.yaml").write_text(POLICY)
    began_s = time.clock_gettime(time.CLOCK_REALTIME), time.monotonic()
    broker = started()
    numbers, opened, waits = [], 0, []
    try:
        with fdbroker.connect(SOCKET) as client, fdbroker.connect(SOCKET) as other:
            live = other.subscribe(["mail"])
            numbers.append(send_and_receive(client, "mail", "first"))
            client.send("brief", "short", to=0)
            for seconds in (HOUR_S // 2, -2 * HOUR_S, -5 * HOUR_S):
                jump(seconds)
                at_s = time.monotonic()
                numbers.append(send_and_receive(client, "mail", str(seconds)))
                with client.open("/dev/zero"):
                    opened += 1
                waits.append(time.monotonic() - at_s)
            kept = [one.payload.decode() for one in client.receive(100)]
            jump(12 * HOUR_S)  # beyond what `brief` keeps, not beyond what `mail` does
            numbers.append(send_and_receive(client, "mail", "last"))
            later = [one.payload.decode() for one in client.receive(100)]
            del live
        jump(-20 * HOUR_S)
        broker.send_signal(signal.SIGTERM)
        codes = [broker.wait(20)]
        broker = started()
        with fdbroker.connect(SOCKET) as client:
            numbers.append(send_and_receive(client, "mail", "after the restart"))
            restarted = [one.payload.decode() for one in client.receive(100)]
            client.receive(100, [one.number for one in client.receive(100)])
            left = client.receive(100)
        broker.send_signal(signal.SIGTERM)
        codes.append(broker.wait(20))
    finally:
        broker.kill()
        broker.wait()
        now_s = began_s[0] + time.monotonic() - began_s[1]
        time.clock_settime(time.CLOCK_REALTIME, now_s)
    return {
        "numbers": numbers,
        "opened": opened,
        "waits_s": waits,
        "kept": kept,
        "later": later,
        "restarted": restarted,
        "left": len(left),
        "codes": codes,
        "said": LOG.read_text(),
    }
