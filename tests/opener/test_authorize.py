"""What an owner has in use, and what all owners together have in flight."""

from __future__ import annotations

import itertools
import os
import socket
import time
from unittest import mock

import pytest

from fdbroker import limits
from fdbroker.errors import ClientNotReading, QuotaExceeded, RateLimited
from fdbroker.kernel import sockets
from fdbroker.opener.authorize import Account, Connection, Flight, authorize_grants
from fdbroker.opener.close import Closing
from fdbroker.opener.door import Door
from fdbroker.opener.service import Opener
from fdbroker.policy.decide import View
from fdbroker.terms import Subject

MAXIMA = {name: limit.default for name, limit in limits.USER_LIMITS.items()} | {"unread_grants": 1000}


@pytest.fixture
def world(request):
    made = []

    class World:
        def __init__(self):
            self.flight = Flight(1000)
            self.accounts = {}

        def connect(self, owner, **maxima):
            ours, theirs = socket.socketpair()
            made.extend((ours, theirs))
            account = self.accounts.setdefault(owner, Account(MAXIMA, 0.0))
            subject = Subject(owner, frozenset(), owner, 1, "", "", foreign=True, owner=owner)
            seen = View((), (), (), (), MAXIMA | maxima, administrator=False)
            return Connection(len(made), ours, subject, seen, account, self.flight), theirs

    yield World()
    for sock in made:
        sock.close()


def send(connection, count):
    """As a grant: `count` descriptors with a byte."""
    null = os.open("/dev/null", os.O_RDONLY)
    socket.send_fds(connection.sock, [b"x"], [null] * count)
    os.close(null)
    connection.note_sent(1, count)


def refused(connection, count, now_s=0.0):
    try:
        authorize_grants(connection, count, now_s)
    except RateLimited as refusal:
        return refusal.cause
    except (QuotaExceeded, ClientNotReading) as refusal:
        return type(refusal).__name__
    return ""


def test_what_is_asked_for_counts_with_what_is_unread(world):
    one, client = world.connect(5, unread_grants=10)
    other, _ = world.connect(5, unread_grants=10)
    assert [refused(one, count) for count in (10, 11)] == ["", "QuotaExceeded"]
    send(one, 6)
    assert [refused(other, count) for count in (4, 5)] == ["", "QuotaExceeded"]
    assert [refused(one, count) for count in (4, 5)] == ["", "QuotaExceeded"]
    send(one, 4)
    assert refused(one, 1) == "ClientNotReading"
    for number in socket.recv_fds(client, 1, 20)[1]:
        os.close(number)
    assert refused(other, 5) == ""


def test_what_a_thread_opens_counts(world):
    """OPENING_HELD of one owner at a time, and it counts as unread already."""
    one, _ = world.connect(5)
    one.account.opening = limits.OPENING_HELD - 2
    assert [refused(one, count) for count in (2, 3)] == ["", "busy"]
    less, _ = world.connect(5, unread_grants=limits.OPENING_HELD - 1)
    assert [refused(less, count) for count in (1, 2)] == ["", "QuotaExceeded"]


def test_what_is_not_closed_yet_counts(world):
    """CLOSING_HELD of one owner."""
    one, _ = world.connect(5)
    one.account.closing, one.account.closed = 1000 + limits.CLOSING_HELD - 2, 1000
    assert [refused(one, count) for count in (2, 3)] == ["", "busy"]


def test_a_part_of_what_may_be_in_flight_is_for_owners_without_any(world):
    world.flight.most = 100
    one, _ = world.connect(5)
    send(one, 50)
    assert [refused(one, count) for count in (25, 26)] == ["", "in flight"]
    new, _ = world.connect(6)
    assert [refused(new, count) for count in (50, 51)] == ["", "in flight"]


def test_what_was_read_meanwhile_is_room_again(world):
    """It is looked at again at most once in FLIGHT_LOOK_MS."""
    world.flight.most = 100
    one, client = world.connect(5)
    send(one, 70)
    new, _ = world.connect(6)
    assert refused(new, 40, 10.0) == "in flight"
    for number in socket.recv_fds(client, 1, 100)[1]:
        os.close(number)
    late_s = limits.FLIGHT_LOOK_MS / 1000
    assert refused(new, 40, 10.0 + late_s / 2) == "in flight"
    assert refused(new, 40, 10.0 + late_s * 2) == ""
    assert world.flight.count == 0


def test_a_connection_that_ends_with_something_unread_still_counts(world):
    one, client = world.connect(5)
    send(one, 7)
    one.close()
    assert (world.flight.count, one.account.count_connections()) == (7, 1)
    client.close()
    assert one.account.count_connections() == 0
    assert (world.flight.count, world.flight.unread) == (0, set())


@pytest.mark.parametrize("descriptors", [0, 1])
def test_what_a_client_has_sent_counts_until_it_is_read_if_it_may_be_slow_to_close(world, descriptors):
    """The inbox reads it; bytes alone are not waited for, for an inbox without a descriptor for its copy reads none."""
    one, client = world.connect(5)
    sockets.ask_credentials(one.sock)
    socket.send_fds(client, [b"x" * 1000], [0] * descriptors)
    one.close()
    assert one.account.count_connections() == descriptors
    if descriptors:
        sockets.drain(one.sock)
        assert one.account.count_connections() == 0
    assert one.sock.fileno() == -1


def test_an_account_with_something_in_use_is_not_forgotten():
    for name in ("opening", "closing"):
        account = Account(MAXIMA, 0.0)
        assert account.is_idle(1e6)
        setattr(account, name, 1)
        assert not account.is_idle(1e6)


@pytest.mark.parametrize(("groups", "cost"), [(0, 1), (limits.GROUPS_PER_CONNECT, 2), (65_536, 65)])
def test_a_connection_costs_what_its_groups_cost(groups, cost):
    """GROUPS_PER_CONNECT: a process in 65,536 groups kept the opener busy, as one in none."""
    maxima = {"connections": 5, "burst": 5, "requests_per_second": 100, "record_burst": 5}
    account = Account(maxima, 0.0)
    for _ in range(5):
        account.note_connect(0.0, 0)
    assert account.wait_s(0.0) == 0
    account.note_connect(0.0, groups)
    assert account.wait_s(0.0) == cost / maxima["requests_per_second"]


def test_what_a_client_makes_long_costs_its_owner_connections():
    """Watches of its own sockets, which all wake when it is refused: as if it took a hundred times as long."""
    account = Account(MAXIMA, 0.0)
    for _ in range(100):
        account.note_stall(0.0, limits.STALL_UNITS * limits.UNIT_US / 1e6)
    assert account.wait_s(0.0) == 0
    for _ in range(3):
        account.note_stall(0.0, 0.02)
    assert account.wait_s(0.0) == limits.DEBT_SECONDS


@pytest.mark.parametrize("way", ["its connection ends", "it is refused"])
def test_how_long_it_takes_to_hang_up_is_counted(world, monkeypatch, way):
    one, _ = world.connect(5)
    clock = itertools.count(0.0, 0.5)
    monkeypatch.setattr(time, "thread_time", lambda: next(clock))
    noted = []
    monkeypatch.setattr(Account, "note_stall", lambda account, _now_s, took_s: noted.append((account, took_s)))
    closing = Closing()
    if way == "it is refused":
        door = mock.Mock(_accounts=mock.Mock(known={5: one.account}.get), _closing=closing)
        Door._let_go(door, one.sock, QuotaExceeded("connections", 1), 5)
    else:
        opener = mock.Mock(_connections={one.number: one})
        opener._door.note_ended = lambda account, took_s: Account.note_stall(account, 0.0, took_s)
        Opener._close(opener, one, 0)
    assert noted == [(one.account, 0.5)]
