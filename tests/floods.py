"""Floods of one user, and what another user feels of them: for tests/attacks/test_t47_floods.py and scripts/fairness.

A flood runs in a process of MALLORY's, with the limits that the policy gives to everybody, and never spins where it
could wait: what it can do to others it does through the broker. It is nice(2) to the machine, for who gets a CPU is the
kernel's affair; what the broker does for it is not.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import multiprocessing
import os
import resource
import select
import signal
import socket
import statistics
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from harness import RATES, Broker

MALLORY, VICTIM = 50004, 50005
FIRST, COUNT = 200_000, 65_536  # MALLORY's subordinate uids
SUBUID = f"{MALLORY}:{FIRST}:{COUNT}\n"
RECIPIENTS = range(52000, 53000)
CONNECTIONS = 64
ROUND = 100  # of each kind of request, in one phase
_together = 1
KINDS = ("ping", "open", "send")

# every limit at its default, but for the other user, who measures as often as it can
POLICY = f"""\
version: 1
topics: {{inbox: {{}}, news: {{}}, mail: {{deliver: [queue]}}}}
everyone: {{send: ["*"], subscribe: [news], devices: [{{path: /dev/null, access: rw, class: mem, device: "1:3"}}]}}
users:
  {VICTIM}: {{limits: {{{RATES}}}}}
""" + "".join(f"  {uid}: {{subscribe: [mail]}}\n" for uid in RECIPIENTS)


def frame(payload: bytes) -> bytes:
    return struct.pack("!I", len(payload)) + payload


def call(method: str, more: bool = False, **parameters: Any) -> bytes:
    message = {"method": f"io.fdbroker.{method}", "parameters": parameters, **({"more": True} if more else {})}
    return json.dumps(message).encode() + b"\0"


PING = frame(b"PING")
SEND = frame(b"x")
INFO = b'{"method":"org.varlink.service.GetInfo"}\0'
LIST = call("Broker.List")
OPEN = call("Broker.Open", resources=[{"device": "/dev/null"}])
BATCH = call("Broker.Open", resources=[{"device": "/dev/null"}] * 64)
DENIED = call("Broker.Open", resources=[{"device": "/dev/mem"}])
NEWS = call("Inbox.Send", topic="news", payload="x")
MAIL = call("Inbox.Send", topic="mail", payload="x")
SUBSCRIBE = call("Inbox.Subscribe", more=True, topics=["news"])


def connected(address: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(address)
    return sock


def pipelined(
    message: bytes,
    most: int = CONNECTIONS,
    *,
    reads: bool = True,
    pieces: int = 0,
    connect: Callable[[str], socket.socket] = connected,
) -> Callable[[str], None]:
    """As many connections, and as much of this message on each, as the broker takes."""

    def flood(address: str) -> None:
        at_once = max(1, most // _together)
        stream = message * max(1, pieces or 16384 // len(message))
        poll = select.epoll()
        made: dict[int, socket.socket] = {}
        at: dict[int, int] = {}
        while True:
            while len(made) < at_once:
                sock = connect(address)
                sock.setblocking(False)
                made[sock.fileno()] = sock
                at[sock.fileno()] = 0
                poll.register(sock, select.EPOLLOUT | (select.EPOLLIN if reads else 0))
            for number, events in poll.poll():
                sock = made[number]
                try:
                    if events & select.EPOLLOUT:
                        at[number] = (at[number] + sock.send(stream[at[number] :])) % len(stream)
                    if events & ~select.EPOLLOUT:
                        data, descriptors, _, _ = socket.recv_fds(sock, 65536, 253)
                        for descriptor in descriptors:
                            os.close(descriptor)
                        if not data:
                            raise ConnectionResetError
                except BlockingIOError:
                    pass
                except OSError:
                    poll.unregister(number)
                    del made[number], at[number]
                    sock.close()

    return flood


def as_many(uids: int) -> Callable[[str], None]:
    """Requests on as many connections, each of another one of MALLORY's uids: needs to be root between them."""
    each = itertools.cycle(range(FIRST, FIRST + uids))

    def connect(address: str) -> socket.socket:
        uid = next(each)
        os.setresuid(uid, uid, 0)
        try:
            return connected(address)
        finally:
            os.setresuid(0, 0, 0)

    return pipelined(OPEN, uids, connect=connect)


def connecting(message: bytes = b"", *, listens: bool = False) -> Callable[[str], None]:
    """Connections without end, each with this message at most."""

    def flood(address: str) -> None:
        while True:
            with contextlib.suppress(OSError), connected(address) as sock:
                if message:
                    sock.sendall(message)
                if listens:
                    sock.settimeout(1)
                    sock.recv(100)

    return flood


def dripping(address: str) -> None:
    """A byte at a time of a message that never ends, on every connection."""
    made = [connected(address) for _ in range(CONNECTIONS)]
    for sock in made:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
        sock.sendall(struct.pack("!I", 65535))
    while True:
        for index, sock in enumerate(made):
            try:
                sock.send(b"x", socket.MSG_DONTWAIT)
            except BlockingIOError:
                time.sleep(0.0001)
            except OSError:
                sock.close()
                made[index] = connected(address)
                with contextlib.suppress(OSError):
                    made[index].sendall(struct.pack("!I", 65535))


def subscribing(address: str) -> None:
    """Sixteen subscribers, half of which never read, and messages for them."""
    held = [connected(address) for _ in range(16)]
    for sock in held:
        sock.sendall(SUBSCRIBE)
    if os.fork() == 0:
        poll = select.poll()
        for sock in held[:8]:
            poll.register(sock, select.POLLIN)
        try:
            while os.getppid() != 1:
                for number, _ in poll.poll(1000):
                    os.read(number, 65536)
        finally:
            os._exit(0)
    pipelined(NEWS, CONNECTIONS - 16)(address)


def stuffing(address: str) -> None:
    """Messages with sixteen descriptors each."""
    made = [connected(address) for _ in range(8)]
    numbers = [os.open("/dev/null", os.O_RDONLY) for _ in range(16)]
    while True:
        for index, sock in enumerate(made):
            try:
                socket.send_fds(sock, [SEND], numbers)
                sock.recv(65536, socket.MSG_DONTWAIT)
            except BlockingIOError:
                pass
            except OSError as error:
                if error.errno == errno.ETOOMANYREFS:
                    time.sleep(0.001)
                    continue
                sock.close()
                made[index] = connected(address)


MANY_UIDS = (99, 700, 2000)  # of one user; 99 were enough to take all that can be in flight
FLOODS: dict[str, Callable[[str], None]] = {
    "PING": pipelined(PING),
    "SEND": pipelined(SEND),
    "GetInfo": pipelined(INFO),
    "List": pipelined(LIST),
    "Open": pipelined(OPEN),
    "Open of 64": pipelined(BATCH),
    "Open, denied": pipelined(DENIED),
    "SEND, stored for 1,000": pipelined(MAIL),
    "never reads": pipelined(LIST, reads=False),
    "one request at a time": pipelined(OPEN, 1, pieces=1),
    "a byte at a time": dripping,
    "subscribers": subscribing,
    "descriptors": stuffing,
    "connects": connecting(),
    "connects, PING": connecting(PING, listens=True),
    "garbage": connecting(struct.pack("!I", 0xFFFFFFFF), listens=True),
    **{f"Open, as {uids} uids": as_many(uids) for uids in MANY_UIDS},
}


# what one user may do at once with as many connections as it may have
TOGETHER = ("PING", "SEND", "List", "Open, denied", "never reads", "descriptors")


def _become(uid: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def _flood(names: list[str], address: str) -> None:
    os.setpgid(0, 0)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if " uids" not in names[0]:
        _become(MALLORY)
    os.nice(19)
    global _together  # noqa: PLW0603 -- they share what connections one user may have
    _together = len(names)
    for name in names[1:]:
        if os.fork() == 0:
            names = [name]
            break
    while True:
        with contextlib.suppress(OSError):  # turned away, or disconnected: it comes again
            FLOODS[names[0]](address)
        time.sleep(0.001)


@contextlib.contextmanager
def flooding(address: str, *names: str) -> Iterator[None]:
    """These floods, all at once, of one user."""
    process = multiprocessing.get_context("fork").Process(target=_flood, args=(list(names), address), daemon=True)
    process.start()
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
        process.close()


def _one(sock: socket.socket, message: bytes, clocks: list[int]) -> tuple[int, int]:
    """How long an answer takes, and how long these processes worked meanwhile, for whomever; in nanoseconds."""
    worked = sum(map(time.clock_gettime_ns, clocks))
    began = time.perf_counter_ns()
    sock.sendall(message)
    data, descriptors, _, _ = socket.recv_fds(sock, 65536, 4)
    took = time.perf_counter_ns() - began
    worked = sum(map(time.clock_gettime_ns, clocks)) - worked
    for descriptor in descriptors:
        os.close(descriptor)
    assert data, "the broker hung up on who did nothing"
    assert message != SEND or data == bytes(4), data
    assert message != OPEN or b'"grants"' in data, data
    assert message != PING or data == frame(b"PONG"), data
    return took, worked


def prefer(pids: Iterable[int]) -> None:
    """Let what else the machine does disturb these processes less."""
    for pid in pids:
        os.setpriority(os.PRIO_PROCESS, pid, -15)


def _victim(address: str, link: Any, pids: list[int], uid: int) -> None:
    prefer([0])
    clocks = [~pid << 3 | 2 for pid in pids]  # clock_getcpuclockid(3)
    _become(uid)
    framed, varlink = connected(address), connected(address)
    plan = ((framed, PING), (varlink, OPEN), (framed, SEND))
    with contextlib.suppress(EOFError):
        while count := link.recv():
            times: list[list[tuple[int, int]]] = [[], [], []]
            for _ in range(count):
                for kind, (sock, message) in zip(times, plan, strict=True):
                    kind.append(_one(sock, message, clocks if message == OPEN else clocks[:1]))  # the inbox alone
                    time.sleep(0.0005)
            link.send(times)


class Victim:
    """Another user, with a connection for each protocol: how long its requests take."""

    def __init__(self, broker: Broker, uid: int = VICTIM):
        pids = [broker.pids[name] for name in ("inbox", "opener")]
        prefer(pids)
        self.link, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("fork").Process(
            target=_victim, args=(broker.socket, theirs, pids, uid), daemon=True
        )
        self.process.start()
        theirs.close()

    def measure(self, count: int = ROUND) -> dict[str, tuple[int, int]]:
        """Of so many requests of each kind: p99 of the time, and of the broker's work meanwhile, in nanoseconds."""
        self.link.send(count)
        assert self.link.poll(60), "another user is not served at all"
        found = zip(KINDS, self.link.recv(), strict=True)
        return {kind: (p99([one[0] for one in both]), p99([one[1] for one in both])) for kind, both in found}

    def close(self) -> None:
        self.link.close()
        self.process.kill()
        self.process.join()
        self.process.close()

    def __enter__(self) -> Victim:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def p99(times: list[int]) -> int:
    return sorted(times)[len(times) * 99 // 100 - 1]


class Felt(NamedTuple):
    """What another user feels of a flood, in one kind of request: p99s of each phase, in nanoseconds.

    Of the time from request to answer, and of what the broker's two processes worked in it. The second is what the
    flood can change; the first has also in it what else the machine did.
    """

    quiet: list[tuple[int, int]]
    loud: list[tuple[int, int]]

    def _ratio(self, which: int) -> float:
        loud, quiet = (statistics.median(one[which] for one in phases) for phases in (self.loud, self.quiet))
        return loud / quiet

    @property
    def time(self) -> float:
        """Ratio of the medians."""
        return self._ratio(0)

    @property
    def work(self) -> float:
        """Likewise."""
        return self._ratio(1)


def settle(victim: Victim) -> None:
    """Until what the policy gives a user at once is used up: the flood then goes on for as long as it likes."""
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        victim.measure(20)


def felt(broker: Broker, names: Sequence[str], rounds: int = 2, phases: int = 3) -> dict[str, Felt]:
    """What another user feels of these floods together, once their burst is over; quiet and loud phases alternate."""
    found = {kind: Felt([], []) for kind in KINDS}
    with Victim(broker) as victim:
        victim.measure()
        for _ in range(rounds):
            for _ in range(phases):
                for kind, measured in victim.measure().items():
                    found[kind].quiet.append(measured)
            with flooding(broker.socket, *names):
                settle(victim)
                for _ in range(phases):
                    for kind, measured in victim.measure().items():
                        found[kind].loud.append(measured)
            time.sleep(0.05)
    return found
