"""What the keeper knows of connections and owners: whose turn it is, and who pays for the nodes that are looked at."""

from __future__ import annotations

import pytest

from fdbroker import limits
from fdbroker.bucket import Bucket
from fdbroker.keeper import connections
from fdbroker.keeper.connections import Connection, Owners
from fdbroker.policy.decide import View
from fdbroker.refusals import LinkViolation
from fdbroker.terms import Subject

MAXIMA = {name: limit.default for name, limit in limits.USER_LIMITS.items()}
MAXIMA |= {"requests_per_second": 2, "burst": 6}


def connection(number, work):
    subject = Subject(number, frozenset(), number, 1, "", "", foreign=True, owner=number)
    return Connection(number, subject, View((), (), (), (), MAXIMA, administrator=False), work)


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


def test_all_connections_of_an_owner_pay_from_one_bucket_and_new_ones_too():
    owners = Owners()
    first, other = owners.of(5, 6, 0.0), owners.of(6, 6, 0.0)
    assert first is not other
    connection(1, first).charge(0.0, 6)
    assert connection(2, owners.of(5, 6, 0.0)).take(0.0) > 0
    assert connection(3, owners.of(6, 6, 0.0)).take(0.0) == 0


def test_so_many_owners_are_kept_and_then_those_without_debt_go(monkeypatch):
    monkeypatch.setattr(connections, "_OWNERS_KEPT", 3)
    owners = Owners()
    kept = [owners.of(owner, 6, 0.0) for owner in range(3)]
    kept[1].take(2, 6, 100.0)
    owners.of(3, 6, 100.0)
    assert owners.of(1, 6, 100.0) is kept[1]
    assert owners.of(0, 6, 100.0) is not kept[0]
    assert owners.of(2, 6, 100.0) is not kept[2]
