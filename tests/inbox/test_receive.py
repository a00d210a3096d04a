"""Reading a client's socket where few numbers are free in the table of descriptors."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import time

import pytest
from lingering import Lingering

from fdbroker.inbox.client import Client, User
from fdbroker.inbox.receive import Receiver
from fdbroker.inbox.rights import Rights, Sender
from fdbroker.kernel import received, sockets
from fdbroker.kernel.jobs import Jobs
from fdbroker.limits import every as limits

LINGER_S = 2


@pytest.fixture
def pair():
    """A client that may send, its other end, and who reads it where few numbers are free."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    received.ask_credentials(ours)
    client = Client(1, Sender(5, 5, 5, "", 5), ours, User(5, Rights(), 0))
    client.member.send = frozenset({"x"})
    receiver = Receiver(Jobs(8, 8))
    receiver._ledger._most = 192
    with ours, theirs:
        yield client, theirs, receiver
    end_s = time.monotonic() + 60
    while receiver._ledger._count:
        assert time.monotonic() < end_s
        time.sleep(0.01)


@contextlib.contextmanager
def free(count):
    """So many numbers, and no more."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    last = os.dup(0)
    os.close(last)
    resource.setrlimit(resource.RLIMIT_NOFILE, (last + count, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)


def test_what_has_no_room_is_not_closed_by_the_thread_that_reads(pair):
    """The kernel closed it there, one after the other, each for as long as its sender liked."""
    client, theirs, receiver = pair
    others = Lingering(LINGER_S, 4).give(theirs, b"x")
    began_s = time.monotonic()
    with free(1):
        received = receiver.read(client)
    assert time.monotonic() - began_s < LINGER_S / 2
    assert received.broken
    for one in others:
        one.close()


@pytest.mark.parametrize("count", [0, 1, limits.DESCRIPTORS_PER_MESSAGE, limits.DESCRIPTORS_PER_MESSAGE + 1])
def test_as_many_as_a_message_may_have_come_with_their_bytes(pair, count):
    client, theirs, receiver = pair
    sockets.send(theirs, b"abc", [0] * count)
    theirs.send(b"def")
    received = receiver.read(client)
    assert received.broken == (count > limits.DESCRIPTORS_PER_MESSAGE)
    if received.broken:
        return
    if count:
        assert received[:3] == (b"abc", os.getuid(), count)
        assert all(os.path.sameopenfile(0, number) for number in received.attached.numbers)
        assert not any(map(os.get_inheritable, received.attached.numbers))
        received = receiver.read(client)
    assert received[:4] == (b"def" if count else b"abcdef", os.getuid(), 0, None)
    with pytest.raises(BlockingIOError):
        receiver.read(client)
    theirs.close()
    received = receiver.read(client)
    assert (received.data, received.descriptors, received.broken) == (b"", 0, False)
