"""Descriptors of messages: closed when nobody has them, never read, never waited for, and counted."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import os
import resource
import socket
import struct
import threading
import time
from unittest import mock

import pytest
from harness import ALICE, as_user

from fdbroker.errors import ProtocolViolation, QuotaExceeded
from fdbroker.inbox.attached import Ledger, Unread
from fdbroker.inbox.client import Client, User
from fdbroker.inbox.decode import Decoder
from fdbroker.inbox.rights import Rights, Sender
from fdbroker.kernel import sockets
from fdbroker.kernel.jobs import Jobs
from fdbroker.kernel.received import SO_PASSRIGHTS
from fdbroker.kernel.sealed import sealed_memfd
from fdbroker.limits import every as limits

INFO = b'{"method":"org.varlink.service.GetInfo"}\0'


def null(count=1):
    return [os.open("/dev/null", os.O_RDONLY) for _ in range(count)]


def is_open(number):
    return os.path.lexists(f"/proc/self/fd/{number}")


def wait_closed(numbers):
    gc.collect()
    end = time.monotonic() + 60
    while any(map(is_open, numbers)):
        assert time.monotonic() < end, "still open"
        time.sleep(0.005)


@pytest.fixture
def ledger():
    made = Ledger(Jobs(8))
    yield made
    end = time.monotonic() + 60
    while made._held:
        assert time.monotonic() < end, made._held
        time.sleep(0.005)
    assert made._count == 0


def test_they_are_closed_with_the_last_that_refers_to_them(ledger):
    numbers = null(3)
    attached = ledger.take(5, numbers)
    other = attached
    del attached
    assert all(map(is_open, numbers))
    del other
    wait_closed(numbers)


def test_those_of_one_message_are_handed_over_together(ledger, monkeypatch):
    """Each by itself woke the closing thread anew, for which whoever is served meanwhile waited."""
    put, handed_over = ledger._jobs.put, []

    def counted(owner, *jobs):
        handed_over.append((owner, len(jobs)))
        put(owner, *jobs)

    monkeypatch.setattr(ledger._jobs, "put", counted)
    numbers = null(limits.DESCRIPTORS_PER_MESSAGE)
    attached = ledger.take(5, numbers)
    del attached
    wait_closed(numbers)
    assert handed_over == [(5, len(numbers))]


def test_a_user_has_room_for_one_message_more_or_for_none(ledger):
    most, each = limits.HELD_DESCRIPTORS, limits.DESCRIPTORS_PER_MESSAGE
    ledger._most = most * 5
    held = [ledger.take(5, null(each)) for _ in range(most // each - 1)]
    assert ledger.has_room(5)
    held.append(ledger.take(5, null(1)))
    assert not ledger.has_room(5)
    assert ledger.has_room(6)
    held.clear()
    end = time.monotonic() + 60
    while not ledger.has_room(5):
        assert time.monotonic() < end


def test_all_users_together_leave_enough_for_connections(ledger):
    ledger._most = 40
    held = [ledger.take(uid, null(12)) for uid in (5, 6)]
    assert ledger.has_room(7)
    held.append(ledger.take(7, null(1)))
    assert not ledger.has_room(8)
    held.clear()


def test_only_a_memfd_that_cannot_change_is_a_payload(ledger, tmp_path):
    sealed = sealed_memfd("x", b"abc")
    unsealed = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.write(unsealed, b"abc")
    half = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    fcntl.fcntl(half, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    reading, writing = os.pipe()
    attached = ledger.take(5, [sealed, unsealed, half, file, reading, writing, *null()])
    assert [attached.size(index) for index in range(7)] == [3, None, None, None, None, None, None]
    assert attached.read(0, 3) == b"abc"


def test_the_bytes_of_memfds_count_while_they_are_held(ledger, monkeypatch):
    monkeypatch.setattr("fdbroker.inbox.attached._HELD_BYTES", 10)
    first = ledger.take(5, [sealed_memfd("x", b"x" * 6)])
    second = ledger.take(5, [sealed_memfd("x", b"x" * 5)])
    assert first.size(0) == 6
    with pytest.raises(QuotaExceeded, match="held_bytes"):
        second.size(0)
    assert ledger.take(6, [sealed_memfd("x", b"x" * 10)]).size(0) == 10
    numbers = first.numbers
    del first
    wait_closed(numbers)
    end = time.monotonic() + 60
    while ledger._held[5].bytes:
        assert time.monotonic() < end
    assert second.size(0) == 5


class Slow:
    """A TCP socket whose close waits: SO_LINGER, and data that its peer does not read."""

    def __init__(self, seconds):
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.sock = socket.create_connection(server.getsockname())
            self.peer, _ = server.accept()
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, seconds))
        self.sock.setblocking(False)
        try:
            while True:
                self.sock.send(b"x" * 65536)
        except BlockingIOError:
            self.sock.setblocking(True)

    def number(self):
        return self.sock.detach()


def test_a_close_that_waits_holds_up_nobody_but_its_user(ledger):
    slow = Slow(2)
    began = time.monotonic()
    attached = ledger.take(5, [slow.number()])
    del attached
    others = null(2)
    attached = ledger.take(6, others)
    del attached
    wait_closed(others)
    mine = null(1)
    attached = ledger.take(5, mine)
    del attached
    assert time.monotonic() - began < 1
    assert is_open(mine[0])
    wait_closed(mine)  # behind the slow one
    assert time.monotonic() - began > 1.5
    slow.peer.close()


def test_without_a_thread_they_wait_for_the_next(ledger, monkeypatch):
    def none(_):
        raise RuntimeError("can't start new thread")

    numbers = null(2)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none)
        attached = ledger.take(5, numbers)
        del attached
    assert all(map(is_open, numbers))
    attached = ledger.take(5, null())
    del attached
    wait_closed(numbers)


# ---- which message they belong to


def test_they_belong_to_the_message_with_the_byte_that_they_came_with(ledger):
    decoder = Decoder()
    first, second = ledger.take(5, null()), ledger.take(5, null(2))
    decoder.feed(INFO + INFO, first)  # the last of these
    decoder.feed(INFO[:5], second)
    decoder.feed(INFO[5:] + INFO)
    found = []
    while (received := decoder.next_message()) is not None:
        found.append(received[1])
    assert found == [None, first, second, None]


def test_a_message_has_them_from_one_place(ledger):
    decoder = Decoder()
    for part in (INFO[:5], INFO[5:10]):
        decoder.feed(part, ledger.take(5, null()))
    decoder.feed(INFO[10:])
    with pytest.raises(ProtocolViolation, match="several parts"):
        decoder.next_message()


# ---- sending them on


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    theirs.settimeout(30)
    with ours, theirs:
        yield Client(1, Sender(5, 5, 5, "", 5), ours, User(5, Rights(), 0)), theirs


def received(sock):
    data, numbers, _, _ = socket.recv_fds(sock, 1 << 20, 253)
    for number in numbers:
        os.close(number)
    return data, len(numbers)


def test_each_goes_with_the_first_byte_of_its_message(pair, ledger):
    client, theirs = pair
    unread = Unread(Jobs(1))
    client.push(b"none", None)
    client.push(b"two", ledger.take(5, null(2)))
    client.push(b"none again", None)
    client.push(b"one", ledger.take(5, null(1)))
    assert client.count_attached() == 3
    client.send(unread)
    assert client.count_attached() == 0
    assert not client.out
    # the kernel puts together what has none with what comes before or after, and never two that have some
    got, counts = b"", []
    while len(got) < 20:
        data, count = received(theirs)
        if count:
            counts.append((len(got + data), count))
        got += data
    assert got == b"nonetwonone againone"
    assert [count for _, count in counts] == [2, 1]


def test_a_socket_that_takes_a_part_has_the_descriptors_already(pair, ledger):
    client, theirs = pair
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    client.push(b"x" * 300_000, ledger.take(5, null(3)))
    client.push(b"y" * 10, ledger.take(5, null(1)))
    total, counts = b"", []
    while len(total) < 300_010:
        with contextlib.suppress(BlockingIOError):
            client.send(Unread(Jobs(1)))
        data, count = received(theirs)
        total += data
        counts += [count] if count else []
    assert total == b"x" * 300_000 + b"y" * 10
    assert counts == [3, 1]


def _send_when_the_kernel_takes_none(_):
    """As a user without rights, with as many descriptors in flight as it may have open."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    many = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with contextlib.suppress(OSError):
        while True:
            socket.send_fds(many[0], [b"x"], [0] * 10)
    client = Client(1, Sender(5, 5, 5, "", 5), ours, User(5, Rights(), 0))
    jobs = Jobs(1)
    client.push(b"before\0", None)
    client.push(b"with one\0", Ledger(jobs).take(5, null(1)))
    client.push(b"behind\0", None)
    client.send(Unread(jobs))
    return [theirs.recv(100).decode(), client.member.lost, len(client.attached)]


def test_a_message_is_lost_when_the_kernel_sends_no_descriptors_and_its_subscriber_stays():
    """ETOOMANYREFS: others of the inbox's user have too many in flight."""
    assert as_user(ALICE, [], _send_when_the_kernel_takes_none, None) == ["before\0behind\0", 1, 0]


def _refusing(client, error):
    """The client's socket, but the kernel refuses whatever has descriptors with it."""
    refusing = mock.Mock(wraps=client.sock)
    refusing.sendmsg.side_effect = OSError(error, "")
    return refusing


@pytest.mark.parametrize("by", ["the kernel", "hand"])
def test_a_subscriber_that_takes_no_descriptors_loses_the_messages_that_have_some_and_stays(pair, ledger, by):
    """SO_PASSRIGHTS=0 of its own: the kernel says EPERM, which ended the subscription."""
    client, theirs = pair
    try:
        theirs.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, by == "hand")
    except OSError:  # before Linux 6.16
        by = "hand"
    if by == "hand":
        client.sock = _refusing(client, errno.EPERM)
    client.push(b"before\0", None)
    client.push(b"with one\0", ledger.take(5, null(1)))
    client.push(b"behind\0", None)
    client.send(Unread(Jobs(1)))
    assert received(theirs) == (b"before\0behind\0", 0)
    assert (client.member.lost, len(client.attached)) == (1, 0)


def test_a_refusal_of_bytes_alone_is_no_lost_message(pair):
    """Else it would be tried for ever: there is nothing to leave out."""
    client, _ = pair
    client.sock = mock.Mock()
    client.sock.send.side_effect = PermissionError
    client.push(b"before\0", None)
    client.push(b"with one\0", mock.Mock(numbers=(0,)))
    with pytest.raises(PermissionError):
        client.send(Unread(Jobs(1)))


def test_unread_ones_are_counted_of_each_connection_and_each_user():
    unread = Unread(Jobs(1))
    most, of_user = limits.UNREAD_DESCRIPTORS, limits.UNREAD_OF_USER
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(3)]
    (first, _), (second, _), (third, _) = pairs
    try:
        for ours in (first, second):
            numbers = null(1)
            sockets.send(ours, b"x", numbers)
            os.close(numbers[0])
        unread.add(5, first, most)
        assert not unread.may_send(5, first, 1)
        assert unread.may_send(5, first, 0)
        assert unread.may_send(5, second, most)
        assert not unread.may_send(5, second, most + 1)
        unread.add(5, second, of_user - most)
        assert not unread.may_send(5, third, 1)
        assert unread.may_send(6, third, most)
        received(pairs[1][1])
        assert unread.may_send(5, second, most)
        assert not unread.may_send(5, first, 1)
        received(pairs[0][1])
        assert unread.may_send(5, first, most)
    finally:
        for both in pairs:
            for one in both:
                one.close()


def test_an_ended_connection_stays_until_its_other_end_has_them_or_is_gone():
    unread = Unread(Jobs(1))
    for by_reading in (True, False):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        numbers = null(1)
        sockets.send(ours, b"x", numbers)
        os.close(numbers[0])
        unread.add(5, ours, limits.UNREAD_OF_USER)
        unread.end(5, ours)
        unread.sweep()
        assert unread.waiting
        assert ours.fileno() >= 0
        assert not unread.may_send(5, theirs, 1)
        if by_reading:
            assert received(theirs) == (b"x", 1)
            unread.sweep()
        theirs.close()
        unread.sweep()
        assert not unread.waiting
        assert ours.fileno() < 0
        assert unread.may_send(5, theirs, 1)


def test_who_ends_many_connections_with_something_unread_is_sent_nothing_more_and_none_is_forgotten():
    """The kernel counts what is unread for as long as the other end lives; whoever has none is still sent some."""
    unread = Unread(Jobs(1))
    unread._ended_max = 8
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(4)]
    for ours, theirs in pairs[:3]:
        numbers = null(1)
        assert unread.may_send(5, ours, 1) == (pairs.index((ours, theirs)) < 2)
        sockets.send(ours, b"x", numbers)
        os.close(numbers[0])
        unread.add(5, ours, 1)
        unread.end(5, ours)
        assert ours.fileno() >= 0
    assert unread.may_send(6, pairs[3][0], 1)
    assert unread._count == 3
    for _, theirs in pairs:
        theirs.close()
    pairs[3][0].close()
    unread.sweep()
    assert not unread.waiting
    assert unread.waiting == {}


@pytest.mark.parametrize("with_descriptors", [False, True])
def test_the_ended_connections_of_one_owner_do_not_keep_descriptors_from_all_others(with_descriptors):
    """With a small RLIMIT_NOFILE, one owner's of which something waits to be closed were all that there may be."""
    jobs = mock.Mock()  # which have no end
    unread = Unread(jobs)
    unread._ended_max = 8
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(12)]
    (ours, theirs), (second, _) = pairs[:2]
    for one, other in pairs[2:]:
        if with_descriptors:
            numbers = null(1)
            sockets.send(one, b"x", numbers)
            os.close(numbers[0])
            unread.add(5, one, 1)
        else:
            other.send(b"x")
        unread.end(5, one)
    assert len(unread._ended) == 10
    assert unread.may_send(6, ours, 1)
    assert unread.may_send(5, second, 1) != with_descriptors
    for one in (ours, theirs, second, *(other for _, other in pairs[1:])):
        one.close()
    unread._draining.clear()
    unread.sweep()
    assert (unread._ended, unread._ended_of, unread._ended_count) == ({}, {}, 0)


def test_a_quarter_of_the_ended_connections_is_kept_for_owners_with_none():
    unread = Unread(mock.Mock())
    unread._ended_max = 8
    unread._ended_of.update({5: 2, 6: 2, 7: 1})
    unread._ended_count = 5
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        assert [unread.may_send(owner, ours, 1) for owner in (5, 7, 8)] == [False, True, True]
        unread._ended_count = 6
        assert [unread.may_send(owner, ours, 1) for owner in (5, 7, 8)] == [False, False, True]
        unread._ended_count = 8
        assert [unread.may_send(owner, ours, 1) for owner in (5, 7, 8)] == [False, False, False]


def test_where_no_descriptor_is_left_the_kernel_collects_another_time(monkeypatch):
    """EMFILE of socketpair(2) was raised in a job, and that ends the process."""
    jobs, ended = [], mock.Mock(side_effect=OSError(errno.EMFILE, ""))
    monkeypatch.setattr("fdbroker.inbox.attached.collect", ended)
    unread = Unread(mock.Mock(put=lambda _, job: jobs.append(job)))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        ours.send(b"x")
        unread.add(5, ours, 1)
        for count in (1, 2):
            unread._looked_s = 0.0
            unread.sweep_at_times()
            assert len(jobs) == count
            jobs[-1]()
            assert ended.call_count == count
