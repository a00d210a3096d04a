"""Inside the virtual machine: what a user feels while another one makes the drivers of slow devices sleep.

The slow devices are USB mice and the PS/2 keyboard. Each mouse has three nodes, and its first opening sleeps 50 ms
(drivers/hid/usbhid/hid-core.c); the last closing of an evdev node waits for an RCU grace period (drivers/input/evdev.c).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from steps import make_node, report, run, wait_for

SOCKET = "/run/fdbroker/socket"
JOURNAL = "/run/systemd/journal/socket"
SLOW, FAST = 4101, 4102  # who makes drivers sleep, and who opens /dev/null meanwhile
MAY_CONNECT = 4100  # the group of the socket
KEYBOARD = "/dev/input/event0"
MICE = 21  # with three nodes each: these and the keyboard are as many as one request may name
QUICK = [f"/dev/lab/{number}" for number in range(1 + 3 * MICE)]  # as many nodes of a driver that never sleeps
OPENS = 50  # of /dev/null, in one measurement
ROUNDS = 3
LONGEST_S = 6.0  # of one measurement, however few opens that are
PAUSE_S = 0.01
LOOK_S = 0.03
WAITS = {"232", "281", "202", "running"}  # epoll_wait, epoll_pwait; futex: for a thread that runs
HANG_UPS_S = (0.0, 0.01, 0.05, 0.2)  # before, while and after the nodes are opened
POLICY = f"""\
version: 1
users:
  {FAST}: {{devices: [{{path: /dev/null, access: rw, class: mem, device: "1:3"}}]}}
  {SLOW}:
    devices:
      - {{path: "/dev/input/event*", access: ro, class: input}}
      - {{path: "/dev/input/mouse*", access: ro, class: input}}
      - {{path: "/dev/hidraw*", access: ro, class: hidraw}}
      - {{path: "/dev/lab/*", access: ro, class: mem}}
"""
Work = Callable[[Callable[[float], bool]], Any]
Attack = Callable[[], Iterator[str]]


class Process:
    """A process of that user. `work` is given a way to learn that it is to end, and its return value becomes JSON."""

    def __init__(self, uid: int, work: Work) -> None:
        self._out, out = os.pipe()
        stop, self._stop = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.setgroups([MAY_CONNECT])
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
                os.write(out, json.dumps(work(lambda wait_s: bool(select.select([stop], [], [], wait_s)[0]))).encode())
                os._exit(0)
            finally:
                traceback.print_exc()
                os._exit(1)
        os.close(out)
        os.close(stop)

    def stop(self) -> Any:
        """Tell it to end, and return what it found."""
        os.write(self._stop, b"x")  # to close it would not do: processes that were forked meanwhile have it as well
        return self.result()

    def result(self) -> Any:
        """Wait until it ends, and return what it found."""
        with open(self._out, "rb") as out:
            said = out.read()
        os.waitpid(self.pid, 0)
        os.close(self._stop)
        return json.loads(said)


def connected() -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(60)
    sock.connect(SOCKET)
    return sock


def message(nodes: list[str]) -> bytes:
    resources = [{"device": node, "access": "ro"} for node in nodes]
    return json.dumps({"method": "io.fdbroker.Broker.Open", "parameters": {"resources": resources}}).encode() + b"\0"


def ask(sock: socket.socket, request: bytes) -> str:
    """The error that comes, without its interface, or "granted" where the descriptors came."""
    sock.sendall(request)
    reply = b""
    count = 0
    while not reply.endswith(b"\0"):
        data, descriptors, _, _ = socket.recv_fds(sock, 65536, 253)
        if not data:
            raise ConnectionResetError
        for descriptor in descriptors:
            os.close(descriptor)
        count += len(descriptors)
        reply += data
    error = json.loads(reply[:-1]).get("error", "")
    if not error and count != request.count(b'"device"'):
        raise ValueError(f"{count} descriptors came")
    return error.rpartition(".")[2] or "granted"


def waiting_for(node: str) -> Work:
    """Ask for it some times; how long each answer takes, in seconds, and which answers come."""

    def work(_: object) -> dict[str, Any]:
        took: list[float] = []
        answers: Counter[str] = Counter()
        request = message([node])
        with connected() as sock:
            end_s = time.monotonic() + LONGEST_S
            while len(took) < OPENS and (began_s := time.monotonic()) < end_s:
                answers[ask(sock, request)] += 1
                took.append(time.monotonic() - began_s)
                time.sleep(PAUSE_S)
        return {"took": took, "answers": answers}

    return work


def felt(node: str = "/dev/null") -> dict[str, Any]:
    """What the other user feels now, in ms."""
    found = Process(FAST, waiting_for(node)).result()
    took = sorted(found.pop("took"))
    high = took[math.ceil(len(took) * 0.98) - 1]  # of a few, the longest
    ms = [round(one * 1000, 1) for one in (took[len(took) // 2], high, took[-1])]
    return {**dict(zip(("median", "p98", "most"), ms, strict=True)), **found}


def repeating(request: bytes) -> Attack:
    """One request after the other, always on a connection that is there."""

    def repeat() -> Iterator[str]:
        while True:
            with contextlib.suppress(ConnectionError), connected() as sock:
                while True:
                    yield ask(sock, request)
            yield "disconnected"

    return repeat


def hanging_up_on(request: bytes) -> Attack:
    """One request a connection, which ends before anything was read."""

    def repeat() -> Iterator[str]:
        for seconds in itertools.cycle(HANG_UPS_S):
            with contextlib.suppress(ConnectionError), connected() as sock:
                sock.sendall(request)
                time.sleep(seconds)
            yield "hung up"

    return repeat


def watching(pid: int) -> Work:
    """Look again and again where the loop of a process sleeps; it may do so where it waits for work.

    Returns how often it was looked at, and the numbers of the system calls in which it slept, with the kernel's function.
    """

    def work(stopped: Callable[[float], bool]) -> dict[str, Any]:
        looks, asleep = 0, Counter[str]()
        place = Path(f"/proc/{pid}/task/{pid}")
        while not stopped(LOOK_S):
            looks += 1
            number = (place / "syscall").read_text().split()[0]
            where = (place / "wchan").read_text()
            if number not in WAITS and where != "0":  # "0": it has been woken
                asleep[f"{number} {where}"] += 1
        return {"looks": looks, "asleep": asleep}

    return work


def child(name: str) -> int:
    """The process of the broker's that is called so."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"fdbroker.{name}" in (process / "cmdline").read_text():
                return int(process.name)
    raise LookupError(name)


def doing(attack: Attack) -> Work:
    """This again and again, nice to the machine: who gets a CPU is the kernel's affair."""

    def work(stopped: Callable[[float], bool]) -> dict[str, int]:
        os.nice(19)
        found: Counter[str] = Counter()
        for answer in attack():
            found[answer] += 1
            if stopped(0):
                break
        return found

    return work


def during(attack: Attack, node: str) -> dict[str, Any]:
    """What the other user feels during an attack, where the broker's loops sleep, and what the attack gets."""
    other = Process(SLOW, doing(attack))
    time.sleep(0.5)
    watches = {name: Process(0, watching(child(name))) for name in ("opener", "inbox")}
    found = felt(node)
    found.update((name, watch.stop()) for name, watch in watches.items())
    found["attack"] = other.stop()
    time.sleep(2)  # what is still to be closed
    return found


def beside(quick: Attack, slow: Attack, node: str = "/dev/null") -> dict[str, Any]:
    """Nobody else, the attack on nodes that never sleep, and that on nodes that do, in turns."""
    rounds = [{"quiet": felt(node), "quick": during(quick, node), "slow": during(slow, node)} for _ in range(ROUNDS)]
    return {"rounds": rounds}


def mice() -> list[str]:
    """A node of each mouse, whose first opening sleeps."""
    return [f"/dev/input/event{number}" for number in range(1, MICE + 1)]


def slow_nodes() -> list[str]:
    """All of them."""
    others = [f"/dev/{kind}{number}" for kind in ("input/mouse", "hidraw") for number in range(MICE)]
    return [KEYBOARD, *mice(), *others]


def drain(_: object) -> None:
    """Be the journal: take what comes."""
    os.makedirs(os.path.dirname(JOURNAL))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(JOURNAL)
        while True:
            sock.recv(1 << 20)


def fill() -> None:
    """The journal takes nothing more, until something reads from it."""
    for _ in range(3):  # one sender's own buffer is full before the journal's queue is
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, contextlib.suppress(BlockingIOError):
            sock.connect(JOURNAL)
            sock.setblocking(False)
            while True:
                sock.send(b"MESSAGE=full\n")


journal: list[Process] = []


def started() -> dict[str, Any]:
    for module in Path("/lab/usb").read_text().split():
        run("busybox", "insmod", f"/lab/{module}", check=True)
    wait_for("the mice", lambda: all(map(os.path.exists, slow_nodes())), 60)
    with open("/etc/passwd", "a") as users:  # each is an owner of its own
        users.writelines(f"lab{uid}:x:{uid}:{uid}::/:/bin/false\n" for uid in (SLOW, FAST))
    for node in QUICK:
        make_node(node, 1, 5)
    Path("/proc/sys/net/unix/max_dgram_qlen").write_text("512")  # as systemd sets it: a request's 64 records have room
    journal.append(Process(0, drain))
    wait_for("the journal", lambda: os.path.exists(JOURNAL))
    os.mkdir("/run/fdbroker", 0o755)
    policy = Path("/run/fdbroker/policy.yaml")
    policy.write_text(POLICY)
    words = ("serve", "--policy", str(policy), "--socket", SOCKET, "--group", str(MAY_CONNECT))
    with Path("/lab/out/broker").open("w") as said:
        subprocess.Popen((sys.executable, "-m", "fdbroker", *words), stderr=said)

    def answers() -> bool:
        with contextlib.suppress(OSError), connected() as sock:
            return sock.send(b"\0\0\0\4PING") > 0 and sock.recv(8)[4:] == b"PONG"
        return False

    wait_for("its socket", answers, 90)
    return {"kernel": os.uname().release, "nodes": len(slow_nodes()), "quiet": felt()}


def first_opens() -> dict[str, Any]:
    """How long the first opening of each mouse takes through the broker, and without it."""

    def through(_: object) -> list[float]:
        took = []
        with connected() as sock:
            for node in mice():
                began_s = time.monotonic()
                if (answer := ask(sock, message([node]))) != "granted":
                    raise ValueError(answer)
                took.append(time.monotonic() - began_s)
                time.sleep(0.2)  # until it is closed everywhere
        return sorted(took)

    quiet = felt()
    process = Process(SLOW, through)
    meanwhile = felt()
    found = process.result()
    bare = []
    for node in mice():
        began_s = time.monotonic()
        descriptor = os.open(node, os.O_RDONLY)
        bare.append(time.monotonic() - began_s)
        os.close(descriptor)
    median = {"through": round(found[MICE // 2] * 1000, 1), "bare": round(sorted(bare)[MICE // 2] * 1000, 1)}
    return {**median, "quiet": quiet, "slow": meanwhile}


def missing() -> dict[str, Any]:
    """63 times the same node, and one that is missing."""
    quick = message([QUICK[0]] * 63 + ["/dev/lab/missing"])
    return beside(repeating(quick), repeating(message([KEYBOARD] * 63 + ["/dev/input/event99"])))


def different() -> dict[str, Any]:
    """All nodes, each for the first time."""
    return beside(repeating(message(QUICK)), repeating(message(slow_nodes())))


def hanging_up() -> dict[str, Any]:
    """All nodes, for clients that are gone before, while or after they are opened."""
    return beside(hanging_up_on(message(QUICK)), hanging_up_on(message(slow_nodes())))


def unrecorded() -> dict[str, Any]:
    """All nodes, while the journal is full, so that they are opened and not granted.

    The other user asks for what no rule allows: that is answered without the journal.
    """
    os.kill(journal[0].pid, signal.SIGSTOP)
    fill()
    try:
        return beside(repeating(message(QUICK)), repeating(message(slow_nodes())), "/dev/zero")
    finally:
        os.kill(journal[0].pid, signal.SIGCONT)


def afterwards() -> dict[str, Any]:
    """The slow nodes are granted again, and all that was opened for others is closed."""

    def open_there() -> list[str]:
        found = []
        for place in Path("/proc").glob("[0-9]*/fd/*"):
            with contextlib.suppress(OSError):
                if (name := os.readlink(place)) in nodes:
                    found.append(f"{place} {name}")
        return found

    nodes = set(slow_nodes())
    wait_for("the last one to be closed", lambda: not open_there(), 60)

    def once(_: object) -> str:
        with connected() as sock:
            return ask(sock, message([KEYBOARD]))

    return {"answer": Process(SLOW, once).result(), "said": Path("/lab/out/broker").read_text()}


report([started, first_opens, missing, different, hanging_up, unrecorded, afterwards])
