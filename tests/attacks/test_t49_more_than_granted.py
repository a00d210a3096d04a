"""T49: a granted descriptor gives more than it says: a part of another one's, or a way to open it again."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import socket

from harness import ALICE, BOB, LIBC, MEM, Raw, as_user, node, outcome, running

POLICY = """
version: 1
everyone: {devices: [{path: /dev/pool/shared, access: rw}, {path: /dev/pool/read}]}
"""


def _hold(address, path, access, theirs):
    """Take one, and let the test look at it."""
    with Raw(address) as client:
        assert outcome(client.open(path, access=access)) == "granted"
        socket.send_fds(theirs, [b"x"], client.descriptors)
        return True


def _spoil(address, path):
    """BOB sets what an open file description has, on his own."""
    with Raw(address) as client:
        assert outcome(client.open(path, access="rw")) == "granted"
        number = client.descriptors[0]
        fcntl.fcntl(number, fcntl.F_SETFL, os.O_APPEND)  # and not O_NONBLOCK any more
        return fcntl.fcntl(number, fcntl.F_GETFL) & (os.O_NONBLOCK | os.O_APPEND)


def test_nothing_that_one_user_does_to_its_descriptor_shows_in_anothers(dev):
    """Offset, O_NONBLOCK and locks belong to the open file description: of each grant its own."""
    node("/dev/pool/shared", MEM["zero"])
    with running(POLICY) as broker:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            held = []
            for _ in range(2):
                as_user(ALICE, [], _hold, broker.socket, "/dev/pool/shared", "rw", theirs)
                held += socket.recv_fds(ours, 1, 1)[1]
            before = [fcntl.fcntl(number, fcntl.F_GETFL) for number in held]
            assert all(flags & os.O_NONBLOCK for flags in before)
            assert as_user(BOB, [], _spoil, broker.socket, "/dev/pool/shared") == os.O_APPEND
            assert [fcntl.fcntl(number, fcntl.F_GETFL) for number in held] == before
            kcmp_file = 0
            for one, other in ((held[0], held[1]), (held[1], held[0])):
                assert LIBC.syscall(312, os.getpid(), os.getpid(), kcmp_file, one, other) != 0
            for number in held:
                os.close(number)


def _make_more(address):
    """What may be tried with a read-only descriptor of a node that only root may open; the names of what worked."""
    worked = []

    def attempt(name, action):
        with contextlib.suppress(OSError):
            action()
            worked.append(name)

    with Raw(address) as client:
        assert outcome(client.open("/dev/pool/read")) == "granted"
        number = client.descriptors[0]
        for name, flags in (("rw", os.O_RDWR), ("wo", os.O_WRONLY), ("ro", os.O_RDONLY)):
            attempt(f"again {name}", lambda flags=flags: os.close(os.open(f"/proc/self/fd/{number}", flags)))
        attempt("write", lambda: os.write(number, b"x"))
        attempt("mode", lambda: os.fchmod(number, 0o666))
        attempt("owner", lambda: os.fchown(number, ALICE, -1))
        attempt("time", lambda: os.utime(number))
        attempt("xattr", lambda: os.setxattr(number, "user.x", b"x"))
        attempt("flags", lambda: _set(number, os.O_RDWR))
        at_empty_path = 0x1000
        attempt("link", lambda: _checked(LIBC.linkat(number, b"", -100, b"/dev/shm/link", at_empty_path)))
    return worked


def _set(number, flags):
    fcntl.fcntl(number, fcntl.F_SETFL, flags)
    if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE != flags & os.O_ACCMODE:
        raise PermissionError


def _checked(result):
    if result != 0:
        raise OSError(ctypes.get_errno(), "")


def test_a_descriptor_to_read_is_not_made_into_one_to_write(dev):
    node("/dev/pool/read", MEM["full"])
    with running(POLICY) as broker:
        assert as_user(ALICE, [], _make_more, broker.socket) == []
