"""What the keeper knows of connections and owners: whose turn it is, and who pays for the nodes that are looked at."""

from __future__ import annotations

import pytest

from fdbroker.bucket import Bucket
from fdbroker.keeper.connections import Connection
from fdbroker.limits import every as limits
from fdbroker.policy.decide import View
from fdbroker.refusals import LinkViolation
from fdbroker.terms import Subject

MAXIMA = {name: limit.default for name, limit in limits.USER_LIMITS.items()}
MAXIMA |= {"requests_per_second": 2, "burst": 6}


def connection(number, work):
    subject = Subject(number, frozenset(), number, 1, "", "", foreign=True, owner=number)
    return Connection(number, subject, View((), (), (), MAXIMA, administrator=False), work)


def test_a_connection_lists_or_watches_and_never_both():
    one = connection(1, Bucket(6, 0.0))
    for event, state in (("List", "listing"), ("Offered", "idle"), ("List", "listing"), ("Outcome", "idle")):
        one.turn(event)
        assert one.state == state
    one.turn("List")
    for event in ("List", "Watch"):
        with pytest.raises(LinkViolation, match="which is listing"):
            one.turn(event)
    one.turn("Offered")
    one.turn("Watch")
    one.turn("Offered")
    assert one.state == "watching"
    for event in ("List", "Watch"):
        with pytest.raises(LinkViolation, match="which is watching"):
            one.turn(event)


def test_two_connections_are_one_only_when_they_are_the_same():
    work = Bucket(6, 0.0)
    one, other = connection(1, work), connection(1, work)
    assert len({one, other}) == 2
    assert one != other


def test_each_list_costs_one_and_each_node_one_more():
    one = connection(1, Bucket(6, 0.0))
    assert [one.take(0.0) for _ in range(7)] == [0] * 6 + [500]
    assert [one.take(1.0) for _ in range(3)] == [0, 0, 500]
    one.charge(1.0, 1)
    assert one.take(1.0) == 1000
    one.charge(1.0, 10**6)
    owed = one.work.tokens
    assert owed == -2 * limits.DEBT_SECONDS  # what comes in so many seconds, and no more
    assert one.take(1.0) == min(limits.WAIT_LIMIT_MS, (1 - owed) * 500)
