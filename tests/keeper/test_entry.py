"""Who is let in at once, who waits, who is turned away, and what an owner pays for."""

from __future__ import annotations

import pytest

from fdbroker.keeper import entry
from fdbroker.keeper.entry import Entry
from fdbroker.limits import every as limits
from fdbroker.wire.keeper import LetIn, TurnAway, Waits

MAXIMA = {name: limit.default for name, limit in limits.USER_LIMITS.items()}
MAXIMA |= {"requests_per_second": 10, "burst": 4, "connections": 4}
DEBT = 10 * limits.DEBT_SECONDS  # the most that is owed


WORDS = {LetIn: "in", Waits: "waits", TurnAway: "away"}


class World:
    """An Entry, and what it has said."""

    def __init__(self):
        self.said = []
        self.entry = Entry(
            MAXIMA,
            lambda said: self.said.append((WORDS[type(said)], *said)),
        )
        self.number = 0

    def knock(self, owner, now_s=0.0, times=1):
        """So many connections of that owner come; returns what is said then."""
        for _ in range(times):
            self.number += 1
            if self.entry.knock(self.number, owner, now_s):
                self.said.append(("slowed", self.number))
        return self.heard()

    def heard(self):
        said, self.said = self.said, []
        return said


@pytest.fixture
def world():
    return World()


def in_debt(world, owner=5):
    """That owner has had its budget, and another one has work: its last connection is the only one left."""
    world.knock(owner, times=6)
    for number in range(1, world.number):
        world.entry.ended(number)
    world.entry.contested(0.0)


def test_who_hangs_up_waits_no_more_and_nobody_else_is_turned_away(world):
    in_debt(world)
    assert world.knock(5, times=2) == [("waits", 7), ("waits", 8)]
    world.entry.hung_up(6)  # it is in
    world.entry.hung_up(99)
    assert world.heard() == []
    world.entry.hung_up(7)
    world.entry.hung_up(7)
    assert world.heard() == [("away", 7, 0)]
    world.entry.step(DEBT)
    assert [said[:2] for said in world.heard()] == [("in", 8)]
    world.entry.hung_up(8)
    assert (world.heard(), world.entry.step(DEBT)) == ([], -1)


def test_an_owner_is_let_in_and_each_time_it_is_said_how_many_it_has(world):
    assert world.knock(5, times=2) == [("in", 1), ("in", 2)]
    assert world.knock(6) == [("in", 3)]
    world.entry.ended(1)
    world.entry.ended(1)  # it counts once
    world.entry.ended(77)
    assert world.knock(5) == [("in", 4)]
    assert world.entry.step(0.0) == -1


def test_nobody_waits_while_nobody_else_has_work(world):
    assert len(world.knock(5, times=100)) == 100
    assert world.entry.step(0.0) == -1


def test_who_is_in_debt_waits_while_others_have_work_and_others_do_not(world):
    in_debt(world)
    assert world.knock(5) == [("waits", 7)]
    assert world.knock(6) == [("in", 8)]
    assert world.entry.step(0.0) == pytest.approx(0.2)
    assert world.heard() == []
    assert world.entry.step(0.21) == -1
    assert world.heard() == [("in", 7)]


def test_who_waits_is_let_in_when_nobody_else_has_work_any_more(world):
    in_debt(world)
    world.entry.stalled(5, 1_000_000, 0.0)
    assert world.knock(5) == [("waits", 7)]
    late_s = limits.CONTEST_SECONDS + 0.01
    assert world.entry.step(late_s) == -1
    assert world.heard() == [("in", 7)]


def test_those_who_wait_come_in_by_turn_one_for_each_owner(world):
    in_debt(world, 5)
    world.knock(5, times=2)
    world.knock(6, times=6)
    for number in range(9, 15):
        world.entry.ended(number)
    world.knock(6, times=2)
    world.heard()
    world.entry.step(0.25)
    assert sorted(world.heard()) == [("in", 7), ("in", 15)]
    world.entry.contested(0.4)
    world.entry.step(0.4)
    assert sorted(world.heard()) == [("in", 8), ("in", 16)]


def test_those_who_wait_count_and_who_is_one_too_many_is_turned_away(world):
    in_debt(world)
    assert world.knock(5, times=4) == [("waits", 7), ("waits", 8), ("waits", 9), ("away", 10, 4)]
    world.entry.ended(6)
    assert world.knock(5) == [("waits", 11)]


def test_the_limit_is_that_of_who_came_last(world):
    in_debt(world)
    world.entry.owner(5, 0.0).maxima = MAXIMA | {"connections": 2}
    assert world.knock(5, times=2) == [("waits", 7), ("away", 8, 2)]


def test_a_few_knocks_are_free_and_then_each_is_an_offence(world):
    in_debt(world)
    free = limits.KNOCKS_FREE + limits.OFFENCES_FREE
    said = world.knock(5, times=free)
    assert ("slowed", world.number) not in said
    assert ("slowed", world.number + 1) in world.knock(5)
    assert not [one for one in world.knock(5, times=50) if one[0] == "slowed"]


def test_knocks_of_another_second_are_free_again(world):
    in_debt(world)
    world.entry.owner(5, 0.0).spend(10**6, 0.0)
    late_s = limits.DEBT_SECONDS * 0.999
    world.knock(5, 0.0, times=limits.KNOCKS_FREE)
    world.entry.contested(late_s)
    world.entry.owner(5, late_s).spend(10**6, late_s)
    again_s = limits.DEBT_SECONDS * 1.5
    world.entry.contested(again_s)
    world.knock(5, again_s, times=limits.KNOCKS_FREE)
    assert not world.entry.owner(5, again_s).pace.offend(10, 4, again_s)  # it is the first offence, so it is free


@pytest.mark.parametrize(
    ("what", "cost"),
    [
        (lambda world: world.entry.weighs(1, 7, 0.0), 7),
        (lambda world: world.entry.stalled(5, 10_000, 0.0), 10),  # a hundredth of a second, times STALL_PAUSE
        (lambda world: None, 0),
        (lambda world: world.entry.weighs(99, 7, 0.0), 0),
    ],
)
def test_what_an_owner_makes_us_do_is_paid_before_its_next_connection(world, what, cost):
    world.knock(5, times=4)
    what(world)
    world.entry.contested(0.0)
    assert world.entry.owner(5, 0.0).wait_s(0.0) == pytest.approx(min(cost, DEBT) / 10)


def test_who_breaks_the_rules_often_pays_and_that_is_said_once(world):
    world.knock(5)
    said = [world.entry.broke(1, 0.0) for _ in range(limits.OFFENCES_FREE + 5)]
    assert said == [*[False] * limits.OFFENCES_FREE, True, *[False] * 4]
    assert not world.entry.broke(99, 0.0)
    world.entry.contested(0.0)
    assert world.knock(5) == [("waits", 2)]
    assert world.knock(6) == [("in", 3)]


def test_so_many_owners_are_kept_and_then_those_without_anything_in_use_go(world, monkeypatch):
    monkeypatch.setattr(entry, "_OWNERS_KEPT", 4)
    one = world.entry
    kept = [one.owner(owner, 0.0) for owner in range(4)]
    world.knock(0)
    kept[1].work.take(2, 6, 500.0)
    kept[2].offend(500.0)
    one.owner(4, 500.0)
    assert [one.owner(owner, 500.0) is kept[owner] for owner in range(3)] == [True] * 3
    assert one.owner(3, 500.0) is not kept[3]


def test_an_owner_whose_connections_wait_is_kept(world, monkeypatch):
    in_debt(world)
    world.knock(5)
    world.entry.ended(6)
    monkeypatch.setattr(entry, "_OWNERS_KEPT", 1)
    before = world.entry.owner(5, 0.0)
    world.entry.owner(6, 1e6)
    assert world.entry.owner(5, 1e6) is before
