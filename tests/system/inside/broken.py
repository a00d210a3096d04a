"""Inside the machine: a policy that is broken from the start, and a service that fails again and again.

Nothing is restarted by hand from the first client on: what is mended must be enough.
"""

from __future__ import annotations

import grp
import json
import select
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from steps import GROUP, MEMBER, as_user, make_node, outcome, report, run, said, show, write_policy

PYTHON = "/opt/fdbroker/bin/python3"
SOCKET = "/run/fdbroker/socket"
INSIDE = Path(__file__).parent
CLIENT, KNOCK = ((INSIDE / name).read_text() for name in ("client.py", "knock.py"))
BROKEN = "version: 1\nevrybody: {}\n"
RULES = (
    f'version: 1\ngroups: {{{GROUP}: {{devices: [{{path: /dev/lab/zero, access: rw, class: mem, device: "1:5"}}]}}}}\n'
)
# what clients have sent before anybody reads: nothing, a frame, a part of one, a Varlink call
SENT = (b"", b"\0\0\0\4PING", b"\0\0", b'{"method":"org.varlink.service.GetInfo"}\0')
DROP_IN = Path("/run/systemd/system/fdbroker.service.d/failing.conf")
FAILURES = 25


def member(*command: str) -> tuple[str, ...]:
    return (*as_user(MEMBER, [GROUP, grp.getgrnam("fdbroker").gr_gid]), *command)


def ping() -> dict[str, Any]:
    return outcome(run(*member("fdbroker", "ping")))


def asks() -> dict[str, Any]:
    done = run(*member(PYTHON, "-I", "-c", CLIENT, "/dev/lab/zero", "rw"))
    return json.loads(done.stdout) if done.returncode == 0 else outcome(done)


def until(what: str, ready: Callable[[], bool], seconds: float) -> None:
    """Wait; unlike steps.wait_for also for a service that fails."""
    end_s = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end_s:
            raise TimeoutError(f"{what}: not within {seconds} s; {state()}")
        time.sleep(0.1)


def state() -> dict[str, Any]:
    """Of both units."""
    names = "ActiveState", "Result", "ExecMainCode", "ExecMainStatus", "NRestarts", "MainPID", "StatusText"
    return {**show(*names), "socket": show("ActiveState", unit="fdbroker.socket")["ActiveState"]}


def connected(data: bytes) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(SOCKET)
    sock.settimeout(20)
    sock.sendall(data)
    return sock


def heard(sock: socket.socket) -> dict[str, Any]:
    """All that comes until the service lets the client go."""
    text, end = b"", "nothing more"
    with sock:
        try:
            while data := sock.recv(4096):
                text += data
        except ConnectionResetError:  # what it has sent was not read
            end = "reset"
    return {"text": text.decode(), "end": end}


def ended() -> bool:
    return show("ActiveState")["ActiveState"] == "failed"


# ---- the steps, in their order


def waiting() -> dict[str, Any]:
    make_node("/dev/lab/zero", 1, 5)
    write_policy(BROKEN)
    enabled = run("systemctl", "enable", "--now", "fdbroker.socket").returncode
    before = state()
    clients = [connected(data) for data in SENT]
    return {"enabled": enabled, "before": before, "heard": [heard(one) for one in clients], "after": state()}


def minute() -> dict[str, Any]:
    before = state()
    done = run(*member(PYTHON, "-I", "-c", KNOCK, "60"), check=True)
    return {"before": before, **json.loads(done.stdout), "after": state(), "lines": len(said())}


def ends() -> dict[str, Any]:
    before = state()
    last = ping()
    began_s = time.monotonic()
    until("its end", ended, 30)
    return {"before": before, "last": last, "after_s": time.monotonic() - began_s, "after": state(), "said": said()}


def again() -> dict[str, Any]:
    """The next client starts it; mended, the one after that is served."""
    refused = ping()
    before = state()
    write_policy(RULES)
    time.sleep(1.1)  # BROKEN_LOOK_SECONDS
    return {"refused": refused, "before": before, "asked": asks(), "after": state()}


def mended_between() -> dict[str, Any]:
    """The policy is mended while no service runs any more."""
    write_policy(BROKEN)
    run("systemctl", "stop", "fdbroker.service")
    refused = ping()
    until("its end", ended, 30)
    write_policy(RULES)
    return {"refused": refused, "before": state(), "asked": asks(), "after": state()}


def failing() -> dict[str, Any]:
    """As after an update that does not fit: every start ends in a traceback; one client waits, and others come."""
    fail_by(f"{PYTHON} -IS -c 'raise RuntimeError(\"for the test\")'")
    before = state()
    waits = connected(SENT[1])
    others = []
    for count in range(1, FAILURES + 1):
        until("a failure", lambda least=count: int(show("NRestarts")["NRestarts"]) >= least, 20)
        others.append(connected(SENT[1]))
        if count % 2:  # has lost its patience
            others.pop().close()
    after = state()
    return {
        "before": before,
        "after": after,
        "tracebacks": said().count("RuntimeError: for the test"),
        **mended([waits, *others]),
    }


def ending_at_once() -> dict[str, Any]:
    """Each start ends with a code after which the unit does not wait and try again: the client that waits starts it."""
    fail_by("/bin/sh -c 'exit 78'")
    before = len(ends_with_78())
    waits = connected(SENT[1])
    until("a hundred starts", lambda: len(ends_with_78()) >= before + 100, 60)
    return {"starts": len(ends_with_78()) - before, "after": state(), **mended([waits])}


def fail_by(command: str) -> None:
    """From now on every start of the service is this."""
    DROP_IN.parent.mkdir(parents=True, exist_ok=True)
    DROP_IN.write_text(f"[Service]\nExecStart=\nExecStart={command}\n")
    run("systemctl", "daemon-reload")
    run("systemctl", "stop", "fdbroker.service")


def ends_with_78() -> list[str]:
    return [text for text in said() if text.endswith("code=exited, status=78/CONFIG")]


def mended(clients: list[socket.socket]) -> dict[str, Any]:
    """The service can start again; what becomes of those who wait, and of the next one."""
    answered = select.select(clients, [], [], 0)[0]
    DROP_IN.unlink()
    run("systemctl", "daemon-reload")
    replies = []
    for sock in clients:
        sock.settimeout(60)
        with sock:
            replies.append(sock.recv(8).hex())
    return {"answered": len(answered), "replies": replies, "asked": asks(), "then": state()}


report([waiting, minute, ends, again, mended_between, failing, ending_at_once])
