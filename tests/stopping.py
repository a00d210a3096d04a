"""Callers that stop the child which makes a namespace in their user namespace: users of a container, and its root.

The container's ids are those that newuidmap(1) would give it. Its root may send a signal to whatever is in there, so it
does that all the time, to all: to that child as well, from when it has come until it would leave.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Iterator

from floods import FIRST
from harness import CLONE_NEWNS, CLONE_NEWUSER, LIBC, MS_BIND, MS_REC, Raw, mount

from fdbroker.kernel import pinned

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4
_ROOT = FIRST + 60_000  # who the container's root is outside: nothing else on the machine runs with that uid
_DOUBLED = 11  # times, of the mounts there: copying them takes milliseconds, and is done in the user namespace
NEW = {"namespace": {"type": "mnt", "create": True}}


class Container:
    """Its users, from `first` on, have each asked for a new namespace, and wait; none of them runs any more."""

    def __init__(self, telling: int) -> None:
        self._telling = telling

    def stop_all(self) -> None:
        """From now on its root stops what it can."""
        os.write(self._telling, b"s")


@contextlib.contextmanager
def container(address: str, first: int, count: int) -> Iterator[Container]:
    """A container with so many users; it is gone with the block, or with this process."""
    (said, saying), (told, telling) = os.pipe(), os.pipe()
    leader = os.fork()
    if leader == 0:
        try:
            os.close(said)
            os.close(telling)
            _contain(address, count, saying, told)
        finally:
            os._exit(1)
    os.close(saying)
    os.close(told)
    try:
        assert os.read(said, 1) == b"n"  # it has its namespace
        for name in ("uid_map", "gid_map"):
            with open(f"/proc/{leader}/{name}", "w") as file:
                file.write(f"0 {_ROOT} 1\n1 {first} {count}\n")
        os.write(telling, b"m")
        for _ in range(count):
            assert os.read(said, 1) == b"a"
        yield Container(telling)
    finally:
        os.close(telling)
        os.waitpid(leader, 0)
        os.close(said)


def _contain(address: str, count: int, saying: int, told: int) -> None:
    os.setgroups([])
    os.setresgid(_ROOT, _ROOT, _ROOT)
    os.setresuid(_ROOT, _ROOT, _ROOT)
    LIBC.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)  # else the maps are root's alone to write
    assert LIBC.unshare(CLONE_NEWUSER | CLONE_NEWNS) == 0
    os.write(saying, b"n")
    os.read(told, 1)
    mount("many", "/tmp", "tmpfs")
    os.mkdir("/tmp/more")
    for _ in range(_DOUBLED):
        mount("/tmp", "/tmp/more", "none", MS_BIND | MS_REC)
    users = []
    for uid in range(1, count + 1):
        users.append(os.fork())
        if users[-1] == 0:
            try:
                _ask(address, uid, saying)
            finally:
                os._exit(1)
    poll = select.poll()
    poll.register(told)
    if os.read(told, 1):
        while not poll.poll(0):
            os.kill(-1, signal.SIGSTOP)
    for pid in users:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _ask(address: str, uid: int, saying: int) -> None:
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    with Raw(address) as client:
        client.send_call("io.fdbroker.Broker.Open", {"resources": [NEW]})
        os.write(saying, b"a")
        while True:
            signal.pause()


def stopped(worker: int) -> set[int]:
    """The pids of what the worker's children have started that is stopped."""
    return {pid for child in _children(worker) for pid in _children(child) if pinned.state(pid) == b"T"}


def _children(pid: int) -> list[int]:
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(word) for word in file.read().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
