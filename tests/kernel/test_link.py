"""What a link has epoll tell: what can be read, unless it is to wait, and room only while something waits for it."""

from __future__ import annotations

import select
import socket

import pytest

from fdbroker.kernel.link import Link


@pytest.fixture
def world():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, select.epoll() as epoll:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
        yield Link(ours), theirs, epoll


def told(link, epoll):
    return dict(epoll.poll(0)).get(link.fileno(), 0)


def test_it_is_told_of_what_can_be_read_and_not_of_room_that_nobody_waits_for(world):
    link, theirs, epoll = world
    link.poll(epoll)
    assert told(link, epoll) == 0
    theirs.send(b"x")
    assert told(link, epoll) == select.EPOLLIN
    link.poll(epoll, read=False)
    assert told(link, epoll) == 0
    link.poll(epoll)
    assert told(link, epoll) == select.EPOLLIN


def test_it_is_told_of_room_while_something_waits_for_it(world):
    link, theirs, epoll = world
    while not link.waiting:
        link.send(b"x" * 500)
    link.poll(epoll)
    assert told(link, epoll) == 0
    while link.waiting:
        assert theirs.recv(1000)
        if told(link, epoll):
            assert told(link, epoll) == select.EPOLLOUT
            link.flush()
    link.poll(epoll)
    assert told(link, epoll) == 0


def test_it_is_told_of_room_at_all_when_asked_to(world):
    link, _, epoll = world
    link.poll(epoll, read=False, write=True)
    assert told(link, epoll) == select.EPOLLOUT
    link.poll(epoll, read=False)
    assert told(link, epoll) == 0


def test_the_end_of_the_other_is_told_whatever_is_polled_for(world):
    link, theirs, epoll = world
    link.poll(epoll, read=False)
    theirs.close()
    assert told(link, epoll) & select.EPOLLHUP
    assert link.receive() == b""


def test_epoll_is_asked_only_when_something_else_is_wanted(world):
    """It is once in each turn of a loop, for each link."""
    link, _, _ = world
    calls = []

    class Epoll:
        def register(self, descriptor, events):
            calls.append(("register", events))

        def modify(self, descriptor, events):
            calls.append(("modify", events))

    for read in (True, True, False, False, True):
        link.poll(Epoll(), read=read)
    assert calls == [("register", select.EPOLLIN), ("modify", 0), ("modify", select.EPOLLIN)]
