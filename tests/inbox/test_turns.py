"""Whose turn it is, by a clock of our own: shares, rests, and how many questions of one user the opener has."""

from __future__ import annotations

import socket

import pytest

from fdbroker.inbox import turns as module
from fdbroker.inbox.client import Client
from fdbroker.inbox.rights import Rights, Sender
from fdbroker.inbox.turns import Turns
from fdbroker.limits import every as limits

ALLOWED = Rights(messages_per_second=10, burst=20)
SIZE = ALLOWED.burst * limits.UNITS_PER_REQUEST
UNIT_S = limits.UNIT_US / 1e6
RATE = ALLOWED.messages_per_second * limits.UNITS_PER_REQUEST


class Clock:
    def __init__(self):
        self.now_s = 1000.0

    def monotonic(self):
        return self.now_s


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def work(turns, user, units):
    """A turn in which this user alone had work."""
    while units > 0:
        turns.work(user, min(units, limits.TURN_UNITS))
        units -= limits.TURN_UNITS
        turns.end()


def contest(turns):
    """Another user does something, now."""
    work(turns, turns.join(2, ALLOWED), 1)


def test_of_each_turn_a_user_gets_its_share_over_all_connections(clock):
    turns = Turns(UNIT_S)
    one, other = turns.join(1, ALLOWED), turns.join(2, ALLOWED)
    assert turns.join(1, ALLOWED) is one
    turns.work(one, turns.share)
    assert not turns.may_work(one)
    assert turns.may_work(other)
    turns.end()
    assert turns.may_work(one)


def test_shares_are_small_while_others_have_work(clock):
    turns = Turns(UNIT_S)
    one = turns.join(1, ALLOWED)
    work(turns, one, 64)
    assert turns.share == limits.TURN_UNITS_ALONE
    contest(turns)
    work(turns, one, 64)
    assert turns.share == limits.TURN_UNITS


def test_who_is_alone_never_rests(clock):
    turns = Turns(UNIT_S)
    one = turns.join(1, ALLOWED)
    work(turns, one, 100 * SIZE)
    assert not one.rests_until_s
    contest(turns)
    work(turns, one, 1)
    clock.now_s += limits.CONTEST_SECONDS
    work(turns, one, SIZE)
    assert not turns.resting


def test_who_goes_on_above_its_budget_rests_twice_as_long_each_time(clock):
    turns = Turns(UNIT_S)
    one = turns.join(1, Rights(messages_per_second=1000, burst=20))  # so the debt of a lot is shorter than any rest
    rests = []
    while len(rests) < 12:
        contest(turns)
        work(turns, one, 1)
        if one.rests_until_s:
            assert not turns.may_work(one)
            rests.append(round(one.rests_until_s - clock.now_s, 3))
            clock.now_s = one.rests_until_s
            turns.rested()
    first = limits.REST_MS / 1000
    assert rests == [min(first * 2**index, limits.DEBT_SECONDS) for index in range(len(rests))]
    assert one in turns.slowed


def test_within_its_budget_nobody_rests(clock):
    turns = Turns(UNIT_S)
    one = turns.join(1, ALLOWED)
    contest(turns)
    work(turns, one, SIZE - limits.TURN_UNITS)
    for _ in range(200):
        clock.now_s += 0.1
        contest(turns)
        work(turns, one, RATE // 10)
        assert not one.rests_until_s


def test_rests_are_forgotten(clock):
    turns = Turns(UNIT_S)
    one = turns.join(1, ALLOWED)
    for _ in range(2):
        while not one.rests_until_s:
            contest(turns)
            work(turns, one, 8)
        rest_s = one.rests_until_s - clock.now_s
        clock.now_s = one.rests_until_s
        turns.rested()
        assert rest_s < 3 * limits.REST_MS / 1000
        clock.now_s += limits.OFFENCES_SECONDS + SIZE / RATE
        assert turns.may_work(one)


def test_work_that_cannot_be_divided_counts_as_more(clock):
    turns = Turns(UNIT_S)
    one = turns.join(1, ALLOWED)
    turns.work(one, limits.TURN_UNITS)
    assert one.used == limits.TURN_UNITS
    turns.work(one, limits.TURN_UNITS + 1)
    assert one.used == limits.TURN_UNITS + limits.UNDIVIDED_FACTOR * (limits.TURN_UNITS + 1)


def test_one_user_has_few_questions_with_the_opener_while_others_have_work(clock):
    """The others come in their order, and a question that is larger than that alone."""
    turns = Turns(UNIT_S)
    one = turns.join(1, ALLOWED)
    pairs = [socket.socketpair() for _ in range(4)]
    try:
        clients = [Client(number, Sender(1, 1, 1, "", 1), ours, one) for number, (ours, _) in enumerate(pairs)]
        assert all(turns.may_ask(one, client, 1) for client in clients)  # it is alone
        for client in clients:
            turns.answered(one, client)
        assert one.asked == 0
        contest(turns)
        work(turns, one, 64)
        asked = [turns.may_ask(one, client, 1) for client in clients]
        assert asked == [True] * limits.ASKED_AT_ONCE + [False] * (4 - limits.ASKED_AT_ONCE)
        after = turns.answered(one, clients[0])
        assert after is clients[limits.ASKED_AT_ONCE]
        assert turns.may_ask(one, after, 1)
        for client in clients:
            turns.answered(one, client)
        assert turns.may_ask(one, clients[0], 64)
        assert not turns.may_ask(one, clients[1], 1)
    finally:
        for ours, theirs in pairs:
            ours.close()
            theirs.close()


def test_who_stalls_the_loop_pauses_a_hundred_times_as_long(clock, monkeypatch):
    """STALL_UNITS, STALL_PAUSE: nobody comes between, and the longest rest otherwise is a second."""
    unit_s = 7 * limits.UNIT_US / 1e6  # a slow machine's own
    stall_s = limits.STALL_UNITS * unit_s
    spent = iter([stall_s * 0.9, stall_s * 5])
    for stalls in (False, True):
        turns = Turns(unit_s)
        one = turns.join(1, ALLOWED)
        contest(turns)
        monkeypatch.setattr(module, "clock", lambda: next(spent))
        turns.count(one, 0.0, one.used)
        turns.end()
        rest_s = one.rests_until_s - clock.now_s
        assert (rest_s >= stall_s * 5 * limits.STALL_PAUSE * 0.99) == stalls
        assert one.stalled_s == 0.0


def test_a_unit_is_as_long_as_this_machine_is_slow_and_never_less_than_its_limit(monkeypatch):
    """UNITS_OF_START, UNIT_US: on an emulated machine all work takes fifty times as long, and none of it is a stall."""
    for came_up_s, unit_s in ((0.0, limits.UNIT_US / 1e6), (5.0, 5.0 / limits.UNITS_OF_START)):
        monkeypatch.setattr(module.time, "process_time", lambda came_up_s=came_up_s: came_up_s)
        assert module.unit_of_this_machine_s() == unit_s
