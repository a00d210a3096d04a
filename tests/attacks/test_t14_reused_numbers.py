"""T14: the number of a queued descriptor is closed and reused before it is sent."""

from __future__ import annotations

import os
import socket

from fdbroker.kernel.link import Link


class Owner:
    """Owns a descriptor of a file, as a socket object owns its own: -1 once it is closed."""

    def __init__(self, path):
        self.number = os.open(path, os.O_RDONLY)

    def fileno(self):
        return self.number

    def close(self):
        if self.number >= 0:
            os.close(self.number)
        self.number = -1

    __del__ = close


def test_what_waits_is_held_by_its_owner_not_by_its_number():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    link = Link(ours)
    with theirs:
        while not link.waiting:  # until the socket's queue is full
            link.send(b"x" * 1000)
        target = Owner("/dev/null")
        number = target.fileno()
        link.send(b"with descriptor", target)
        del target  # nobody but the link holds it now
        reused = os.open("/dev/zero", os.O_RDONLY)
        assert reused != number
        os.close(reused)
        got = None
        while got is None:
            data, numbers, _, _ = socket.recv_fds(theirs, 2000, 5)
            link.flush()
            if data == b"with descriptor":
                got = numbers
        assert len(got) == 1
        assert os.readlink(f"/proc/self/fd/{got[0]}") == "/dev/null"
        os.close(got[0])
        link.close()


def test_what_its_owner_closed_is_not_sent_as_something_else():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    link = Link(ours)
    with theirs:
        while not link.waiting:
            link.send(b"x" * 1000)
        target = Owner("/dev/null")
        link.send(b"with descriptor", target)
        target.close()
        reused = os.open("/dev/zero", os.O_RDONLY)
        theirs.setblocking(False)
        received = []
        while link.waiting or not received or received[-1] != b"end":
            try:
                data, numbers, _, _ = socket.recv_fds(theirs, 2000, 5)
                assert not numbers
                received.append(data)
            except BlockingIOError:
                pass
            link.flush()
            if not link.waiting and b"end" not in received:
                link.send(b"end")
        os.close(reused)
        assert b"with descriptor" not in received
        link.close()
