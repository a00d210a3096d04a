"""What the tests of owners share: connections of many uids of one user, and processes in all its subordinate gids."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import struct

from harness import CLONE_NEWUSER, LIBC

GROUPS = 65_536  # NGROUPS_MAX of linux/limits.h; as many subordinate gids useradd(8) gives everybody
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4


@contextlib.contextmanager
def being(uid):
    """Root's process is a user's for a moment."""
    os.setresuid(uid, uid, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


class Many:
    """Connections of many uids, in this process: each is used as the uid that made it."""

    def __init__(self, address):
        self.address = address
        self.socks = []
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    def connect(self, uid):
        with being(uid):
            sock = socket.socket(socket.AF_UNIX)
            self.socks.append(sock)
            # not settimeout: without a place in the backlog a connect that does not block says EAGAIN at once
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 10, 0))
            sock.connect(self.address)
            sock.settimeout(10)
            return sock

    def send(self, sock, uid, data, descriptors=()):
        with being(uid), contextlib.suppress(BrokenPipeError, ConnectionResetError, BlockingIOError):
            socket.send_fds(sock, [data], descriptors)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for sock in self.socks:
            sock.close()


@contextlib.contextmanager
def crowd(uid, count):
    """So many processes of a user, which sleep, each in GROUPS groups: their pids.

    It is root of a user namespace, with the ids that newuidmap(1) and newgidmap(1) would give it.
    """
    (said, saying), (told, telling) = os.pipe(), os.pipe()
    leader = os.fork()
    if leader == 0:
        try:
            os.close(telling)
            _crowd(uid, count, saying, told)
        finally:
            os._exit(1)
    os.close(saying)
    os.close(told)
    try:
        assert os.read(said, 1) == b"n"  # it has its namespace
        for name in ("uid_map", "gid_map"):
            with open(f"/proc/{leader}/{name}", "w") as file:
                file.write(f"0 {uid} 1\n1 300000 {GROUPS}\n")
        os.write(telling, b"m")
        with open(said, closefd=False) as file:
            pids = [int(word) for word in file.readline().split()]
        assert len(pids) == count
        yield pids
    finally:
        os.close(telling)
        os.waitpid(leader, 0)
        os.close(said)


def _crowd(uid, count, saying, told):
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    LIBC.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)  # else the maps are root's alone to write
    assert LIBC.unshare(CLONE_NEWUSER) == 0
    os.write(saying, b"n")
    os.read(told, 1)
    os.setgroups(range(1, GROUPS + 1))
    leader, pids = os.getpid(), []
    for _ in range(count):
        pid = os.fork()
        if pid == 0:
            LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            while os.getppid() == leader:
                signal.pause()
            os._exit(0)
        pids.append(pid)
    os.write(saying, f"{' '.join(map(str, pids))}\n".encode())
    os.read(told, 1)  # until the test has ended, or its process
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
