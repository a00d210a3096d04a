"""Closing: whatever may take its time is closed by a thread, and counts until then."""

from __future__ import annotations

import array
import contextlib
import errno
import os
import socket
import struct
import time
from functools import partial
from unittest import mock

import pytest

from fdbroker.kernel import received
from fdbroker.limits import every as limits
from fdbroker.opener import close as close_module
from fdbroker.opener.authorize import Account, Connection, Flight
from fdbroker.opener.close import Closing
from fdbroker.policy.decide import View
from fdbroker.terms import Subject

MAXIMA = {name: limit.default for name, limit in limits.USER_LIMITS.items()}
LINGER_S = 2


def lingering():
    """A TCP socket whose last close waits, for its other end does not read; and that end."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        other, _ = server.accept()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, LINGER_S))
    one.setblocking(False)
    try:
        while True:
            one.send(bytes(65536))
    except BlockingIOError:
        return one.detach(), other


@pytest.fixture
def connection():
    ours, theirs = socket.socketpair()
    subject = Subject(5, frozenset(), 5, 1, "", "", foreign=True, owner=5)
    seen = View((), (), (), MAXIMA, administrator=False)
    with ours, theirs:
        yield Connection(1, ours, subject, seen, Account(MAXIMA, 0.0), Flight(100))


def timed(action):
    began_s = time.monotonic()
    action()
    return time.monotonic() - began_s


def test_what_sleeps_is_closed_by_a_thread_and_counts_until_then(connection):
    slow, other = lingering()
    quick = os.open("/dev/null", os.O_RDONLY)
    closing, account, descriptors = Closing(), connection.account, {0: quick, 1: slow}
    with other:
        assert timed(partial(closing.close, connection, descriptors)) < LINGER_S / 4
        assert not descriptors
        assert account.closing == 2
        end = time.monotonic() + LINGER_S * 5
        while account.closing != account.closed:
            assert time.monotonic() < end
            time.sleep(0.01)
    for number in (quick, slow):
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(number)


def test_an_error_of_a_close_is_nobodys_end(monkeypatch):
    """A driver may report then what it could not write, EIO; the descriptor is closed. It ended the service."""
    closing, connection = Closing(), mock.Mock()
    connection.subject.owner, connection.account, connection.flight = 5, Account(MAXIMA, 0.0), Flight(100)
    before, close = set(os.listdir("/proc/self/fd")), os.close

    def reports(number):
        close(number)
        raise OSError(errno.EIO, "")

    number = os.open("/dev/fuse" if os.path.exists("/dev/fuse") else "/", os.O_RDONLY)
    monkeypatch.setattr(close_module.os, "close", reports)
    closing.close(connection, {0: number})
    end = time.monotonic() + 5
    while connection.account.closing != connection.account.closed:
        assert time.monotonic() < end
        time.sleep(0.01)
    monkeypatch.undo()
    assert (connection.account.closed, set(os.listdir("/proc/self/fd"))) == (1, before)


def test_refused_clients_leave_nothing_for_the_loop_to_close():
    """Descriptors that wait in their sockets are closed with these, by a thread, however many there are."""
    closing = Closing()
    slow, other = lingering()
    pairs = [socket.socketpair() for _ in range(300)]
    with other, contextlib.ExitStack() as stack:
        null = stack.enter_context(open(os.devnull))
        for index, (ours, theirs) in enumerate(pairs):
            stack.enter_context(theirs)
            received.ask_credentials(ours)
            numbers = array.array("i", [null.fileno() if index else slow])
            theirs.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)])
        os.close(slow)
        for ours, _ in pairs:
            assert timed(partial(closing.hang_up, ours, 5)) < LINGER_S / 4
        assert closing.waiting == len(pairs)
        end = time.monotonic() + LINGER_S * 5
        while closing.waiting:
            assert time.monotonic() < end
            time.sleep(0.01)
    assert {ours.fileno() for ours, _ in pairs} == {-1}


@pytest.mark.parametrize("waiting", [b"", b"x", b"x" * 100_000])
def test_what_has_bytes_alone_is_closed_at_once_even_while_its_owner_waits(waiting):
    """Behind one that waits for hours there was room for so many that nobody was let in any more."""
    closing = Closing()
    slow, other = lingering()
    first, ours = socket.socketpair(), socket.socketpair()
    with other, first[1], ours[1]:
        for sock in (first[0], ours[0]):
            received.ask_credentials(sock)
        socket.send_fds(first[1], [b"x"], [slow])
        os.close(slow)
        ours[1].sendall(waiting)
        for sock in (first[0], ours[0]):
            assert timed(partial(closing.hang_up, sock, 5)) < LINGER_S / 4
        assert (ours[0].fileno(), closing.waiting) == (-1, 1)
        end = time.monotonic() + LINGER_S * 5
        while closing.waiting:
            assert time.monotonic() < end
            time.sleep(0.01)


@pytest.mark.parametrize("waiting", [b"", b"x"])
def test_a_client_that_left_its_refusal_unread_needs_no_thread(waiting):
    """The kernel says ECONNRESET then, once: in a storm of connections each would have had to wait for a thread."""
    closing = Closing()
    ours, theirs = socket.socketpair()
    received.ask_credentials(ours)
    theirs.sendall(waiting)
    ours.sendall(b"refused")
    theirs.close()
    closing.hang_up(ours, 5)
    assert (ours.fileno(), closing.waiting) == (-1, 0)


class Counting(socket.socket):
    """Counts what is read of it."""

    reads = 0

    def recv(self, *what):
        """See socket.socket."""
        self.reads += 1
        return super().recv(*what)


def test_messages_of_many_senders_are_read_away_together(root):
    """Each byte of another sender was a read of its own, in the loop: a connection that was turned away took 39 ms."""
    closing = Closing()
    ours, theirs = socket.socketpair()
    ours = Counting(fileno=ours.detach())
    received.ask_credentials(ours)
    theirs.setblocking(False)
    count = 0
    with theirs, contextlib.suppress(BlockingIOError):
        while True:
            said = [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, struct.pack("iII", os.getpid(), 0, count % 2))]
            theirs.sendmsg([b"x"], said)
            count += 1
    assert count > 100
    closing.hang_up(ours, 5)
    assert (ours.fileno(), closing.waiting) == (-1, 0)
    assert ours.reads < 6
