"""Whose turn it is: the same share of every turn of the loop for each user, and a rest for who makes too much work.

Runs in: inbox. An attacker controls how much it sends, on how many connections, and what of it is refused.

A user is an owner: all connections of all its uids together. Work is counted in units of about 5 us: a read, a
message, a row that is stored; what takes long, by its time. A user above its budget is not read for a while, and
nothing else happens to it; a user who is alone never has to rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar, cast

from fdbroker.inbox.client import Client, User
from fdbroker.inbox.rights import Rights
from fdbroker.limits import inbox as limits
from fdbroker.limits.keeper import AUDIT_REPEAT_SECONDS, OFFENCES_SECONDS, STALL_PAUSE
from fdbroker.limits.opener import CONTEST_SECONDS, DEBT_SECONDS, STALL_UNITS, UNIT_US

_SHARE, _SHARE_ALONE = limits.TURN_UNITS, limits.TURN_UNITS_ALONE
_UNDIVIDED = limits.UNDIVIDED_FACTOR
_REST_S = limits.REST_MS / 1000
_DEBT_S, _FORGOTTEN_S = DEBT_SECONDS, OFFENCES_SECONDS
_CONTEST_S = CONTEST_SECONDS
_ASKED = limits.ASKED_AT_ONCE
_USERS_KEPT = 4096
_LONG, _STALL, _STALL_PAUSE = limits.LONG_UNITS, STALL_UNITS, STALL_PAUSE
_Method = TypeVar("_Method", bound=Callable[..., None])
clock = time.thread_time  # of this thread's own work: what other processes do meanwhile counts for nobody
# Units are taken from the budget in lots: looking at the clock for each message would cost as much as some messages.
_LOT = 64


def timed(method: _Method) -> _Method:
    """What this method of the inbox does for a client counts by the time that it takes, where that is long.

    However a client makes it long: with a message that is hard to decode, or with thousands of epoll(7) watches of its
    own socket, all of which each read and write of ours has to wake.
    """

    def measured(inbox: Any, client: Client, *arguments: Any) -> None:
        began_s, before = clock(), client.user.used
        method(inbox, client, *arguments)
        inbox.turns.count(client.user, began_s, before)

    return cast("_Method", measured)


def unit_of_this_machine_s() -> float:
    """How long a unit takes here, at least UNIT_US, by the CPU time in which this process came up.

    An emulated machine takes fifty times as long for all that it does, and would find all work of honest clients long.
    """
    return max(UNIT_US / 1e6, time.process_time() / limits.UNITS_OF_START)


class Turns:
    """All users that were here lately. `unit_s` is how long a unit takes."""

    def __init__(self, unit_s: float) -> None:
        self._unit_s = unit_s
        self._by_owner: dict[int, User] = {}
        self._worked: dict[User, None] = {}  # in this turn
        self._latest: User | None = None
        self._contested_s = -float(_CONTEST_S)  # when another user than before had work
        self.resting: dict[User, None] = {}
        self.share = _SHARE_ALONE  # of each user, in one turn
        self.slowed: dict[User, None] = {}  # who has begun to rest, to be recorded

    def join(self, owner: int, allowed: Rights) -> User:
        """The user of a connection that begins; what the policy allows it now is for all of its connections."""
        user = self._by_owner.get(owner)
        if user is None:
            now_s = time.monotonic()
            if len(self._by_owner) >= _USERS_KEPT:
                self._forget_idle(now_s)
            user = self._by_owner[owner] = User(owner, allowed, now_s)
        user.allow(allowed)
        user.clients += 1
        return user

    def _forget_idle(self, now_s: float) -> None:
        for owner, user in list(self._by_owner.items()):
            if not user.clients and not user.rests_until_s and user.pace.is_idle(now_s):
                del self._by_owner[owner]

    def leave(self, user: User, client: Client) -> None:
        """Its connection has ended."""
        user.clients -= 1
        user.held.pop(client.number, None)
        user.waiting.pop(client.number, None)

    def work(self, user: User, units: int) -> None:
        """So much was done for the user, or will be, at one go: what is over its share nobody could come between."""
        user.used += units if units <= _SHARE else units * _UNDIVIDED
        self._worked[user] = None

    def spend(self, user: User, began_s: float, units: int) -> None:
        """So much was done for the user; what took long since `began_s` of `clock` counts by its time instead."""
        spent = int((clock() - began_s) / self._unit_s)
        self.work(user, spent if spent > max(units, _LONG) else units)

    def count(self, user: User, began_s: float, before: int) -> None:
        """What was done for the user since `began_s` of `clock`, when `before` units of this turn had been counted."""
        # a unit takes several times as long on a busy machine
        self._stall(user, int((clock() - began_s) / self._unit_s) - (user.used - before) * _UNDIVIDED)

    def sent(self, user: User, sent_s: float) -> None:
        """The opener has answered the user, which took it so much of its time."""
        self._stall(user, int(sent_s / self._unit_s))

    def _stall(self, user: User, units: int) -> None:
        """What took more units than was counted for it, and how long it held up others."""
        if units > _LONG:
            self.work(user, units)
            if units > _STALL:
                user.stalled_s = max(user.stalled_s, units * self._unit_s)

    def may_work(self, user: User) -> bool:
        """Whether the user has something left of its share of this turn."""
        return user.used < self.share and not user.rests_until_s

    def offend(self, user: User) -> None:
        """Something of the user was refused for its rate, or broken."""
        user.pace.offend(user.rate, user.size, time.monotonic())
        self._charge(user)

    def end(self) -> None:
        """The turn is over: take what was done from the budgets, and let rest who has none left."""
        for user in self._worked:
            if user is not self._latest:
                if self._latest is not None:
                    self._contested_s = time.monotonic()
                self._latest = user
            user.owed += user.used
            user.used = 0
            if user.owed >= _LOT:
                self._charge(user)
        self._worked.clear()

    def _charge(self, user: User) -> None:
        now_s = time.monotonic()
        if now_s >= user.forgiven_s:
            user.rests = 0
        # who had to rest has no burst until that is forgotten
        size = min(user.size, _LOT) if user.rests else user.size
        user.pace.spend(user.owed, user.rate, size, now_s)
        user.owed = 0
        contested = now_s - self._contested_s < _CONTEST_S
        self.share = _SHARE if contested else _SHARE_ALONE
        if contested and not user.rests_until_s:
            wait_s = max(user.pace.wait_s(user.rate, size, now_s), user.stalled_s * _STALL_PAUSE)
            user.stalled_s = 0.0
            if wait_s:
                user.rests_until_s = now_s + max(wait_s, min(_REST_S * (1 << user.rests), _DEBT_S))
                user.forgiven_s = user.rests_until_s + _FORGOTTEN_S
                user.rests = min(user.rests + 1, 16)
                self.resting[user] = None
                if now_s >= user.quiet_until_s:
                    user.quiet_until_s = now_s + AUDIT_REPEAT_SECONDS
                    self.slowed[user] = None

    def timeout_s(self) -> float:
        """Until the first rest of those who are resting is over."""
        return max(0.0, min(user.rests_until_s for user in self.resting) - time.monotonic())

    def rested(self) -> list[Client]:
        """Those connections that may go on, because their user's rest is over."""
        clients: list[Client] = []
        now_s = time.monotonic()
        for user in [user for user in self.resting if user.rests_until_s <= now_s]:
            del self.resting[user]
            user.rests_until_s = 0.0
            clients += user.held.values()
            user.held.clear()
        return clients

    # ---- questions to the opener

    def may_ask(self, user: User, client: Client, weight: int) -> bool:
        """Whether the opener may be asked for `weight` resources more now; else the client waits for `answered`."""
        if user.asked and user.asked + weight > _ASKED and self.share == _SHARE:
            user.waiting[client.number] = client
            return False
        user.waiting.pop(client.number, None)
        user.asked += weight
        client.asking = weight
        return True

    @staticmethod
    def answered(user: User, client: Client) -> Client | None:
        """The opener has answered, or need not any more; who should ask next."""
        user.asked -= client.asking
        client.asking = 0
        if not user.waiting or user.asked >= _ASKED:
            return None
        return user.waiting.pop(next(iter(user.waiting)))
