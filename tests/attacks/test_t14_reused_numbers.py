"""T14: the number of a queued descriptor is closed and reused before it is sent."""

from __future__ import annotations

import os
import socket

import pytest

from fdbroker.errors import LinkViolation
from fdbroker.kernel.link import Link


def _full_link():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    link = Link(ours)
    while not link.waiting:
        link.send(b"x" * 1000)
    return link, theirs


def test_what_carries_a_descriptor_is_never_queued():
    link, theirs = _full_link()
    with theirs:
        number = os.open("/dev/null", os.O_RDONLY)
        waiting = link.waiting
        assert not link.send_with_descriptors(b"with descriptor", [number])
        assert link.waiting == waiting
        os.close(number)
        theirs.setblocking(False)
        while True:
            try:
                data, numbers, _, _ = socket.recv_fds(theirs, 2000, 5)
                assert data == b"x" * 1000
                assert not numbers
            except BlockingIOError:
                if not link.waiting:
                    break
            link.flush()
        link.close()


def test_it_does_not_overtake_what_waits():
    link, theirs = _full_link()
    with theirs:
        theirs.recv(2000)  # room, but not flushed yet
        number = os.open("/dev/null", os.O_RDONLY)
        assert not link.send_with_descriptors(b"with descriptor", [number])
        while link.waiting:
            theirs.recv(2000)
            link.flush()
        for _ in range(50):
            theirs.recv(2000)
        assert link.send_with_descriptors(b"with descriptor", [number])
        os.close(number)
        link.close()


def test_more_waiting_messages_than_any_honest_other_end_leaves_are_a_violation(monkeypatch):
    from fdbroker.kernel import link as module

    link, theirs = _full_link()
    monkeypatch.setattr(module, "_LINK_WAITING", link.waiting + 2)
    with theirs:
        link.send(b"y")
        link.send(b"y")
        with pytest.raises(LinkViolation):
            link.send(b"y")
        link.close()
