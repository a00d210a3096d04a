"""What an owner has in use, and what all owners together have in flight."""

from __future__ import annotations

import contextlib
import os
import socket

import pytest

from fdbroker.errors import ClientNotReading, QuotaExceeded, RateLimited
from fdbroker.inbox.attached import drain
from fdbroker.kernel import received
from fdbroker.limits import every as limits
from fdbroker.opener.authorize import Account, Connection, Flight, authorize_connection, authorize_grants
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
            seen = View((), (), (), MAXIMA | maxima, administrator=False)
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
    assert one.lingers()
    assert (world.flight.count, len(one.account.connections)) == (7, 1)
    client.close()
    assert not one.lingers()
    assert not one.account.connections
    assert (world.flight.count, world.flight.unread) == (0, set())


@pytest.mark.parametrize("descriptors", [0, 1])
def test_what_a_client_has_sent_counts_until_it_is_read_if_it_may_be_slow_to_close(world, descriptors):
    """The inbox reads it; bytes alone are not waited for, for an inbox without a descriptor for its copy reads none."""
    one, client = world.connect(5)
    received.ask_credentials(one.sock)
    socket.send_fds(client, [b"x" * 1000], [0] * descriptors)
    one.close()
    assert (one.lingers(), len(one.account.connections)) == (bool(descriptors), descriptors)
    if descriptors:
        drain(one.sock)
        assert not one.lingers()
    assert (len(one.account.connections), one.sock.fileno()) == (0, -1)


def test_an_account_with_something_in_use_is_not_forgotten():
    for name in ("opening", "closing", "connections"):
        account = Account(MAXIMA, 0.0)
        assert account.is_idle(1e6)
        setattr(account, name, 1)
        assert not account.is_idle(1e6)


@pytest.mark.parametrize(
    ("connections", "left", "administrator", "limit"),
    [
        (10, 100, False, ""),
        (11, 100, True, "connections"),
        (2, 26, False, ""),  # of the last quarter none is for who has another
        (2, 25, False, "descriptors"),
        (1, 25, False, ""),
        (1, limits.FOR_ADMINISTRATORS + 1, False, ""),
        (1, limits.FOR_ADMINISTRATORS, False, "descriptors"),
        (10, 1, True, ""),
    ],
)
def test_the_last_places_are_for_new_owners_and_the_very_last_for_administrators(
    world, connections, left, administrator, limit
):
    seen = View((), (), (), MAXIMA | {"connections": 10}, administrator=administrator)
    for _ in range(connections - 1):
        world.connect(5)
    account = world.accounts.get(5) or Account(MAXIMA, 0.0)
    expected = pytest.raises(QuotaExceeded, match=f"limit {limit}") if limit else contextlib.nullcontext()
    with expected:
        authorize_connection(seen, account, left, 100)


def test_what_its_clients_have_closed_does_not_count(world):
    """At the maximum, whoever closes a connection and makes another is not refused because the inbox is busy.

    LEAVING_LOOKED of them are looked at; what has ended and is unread does count.
    """
    made = [world.connect(5) for _ in range(3)]
    account = made[0][0].account
    assert account.leaving() == 0
    made[0][1].close()
    assert account.leaving() == 1
    made[1][1].close()
    made[1][0].state = "gone"
    assert account.leaving() == 1
    for _ in range(limits.LEAVING_LOOKED):
        world.connect(5)[1].close()
    assert account.leaving() in (limits.LEAVING_LOOKED - 1, limits.LEAVING_LOOKED)


def test_what_requests_hold_that_wait_leaves_what_the_process_needs(world):
    """A node and an open descriptor for each resource, and what threads close; else threads could use up all.

    A quarter is for owners who hold nothing.
    """
    one, _ = world.connect(5)
    other, _ = world.connect(6)
    room = limits.DESCRIPTORS_RESERVED - limits.OWN_DESCRIPTORS
    world.flight.held_most = room
    assert refused(one, room // 2) == ""
    assert refused(one, room // 2 + 1) == "busy"
    one.account.opening = 10
    world.flight.held = 2 * one.account.opening
    world.flight.closing = limits.shared(room) - world.flight.held - 2
    assert (refused(one, 1), refused(one, 2)) == ("", "busy")
    assert (refused(other, 2), refused(other, room // 2)) == ("", "busy")
    world.flight.closed = world.flight.closing
    assert refused(one, 2) == ""
