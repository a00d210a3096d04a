"""Whose connection is let in, and when: who comes too often, while others have work here, waits.

Runs in: keeper. An attacker controls how many connections come, how fast, and with how many of its user's uids. What
the opener says of them counts; nothing here knows a socket.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping

from fdbroker.bucket import Bucket
from fdbroker.limits import opener as limits
from fdbroker.limits.keeper import KNOCKS_FREE, STALL_PAUSE
from fdbroker.pace import Pace
from fdbroker.wire.keeper import LetIn, TurnAway, Waits

_OWNERS_KEPT = 1024


class Owner:
    """What one owner has in use, and how much work it has made: over all of its connections."""

    __slots__ = ("connections", "knocking_since_s", "knocks", "maxima", "pace", "waiting", "work")

    def __init__(self, maxima: Mapping[str, int], now_s: float) -> None:
        self.maxima = maxima  # of the connection that came last
        self.connections = 0  # that were let in and have not ended
        self.work = Bucket(maxima["burst"], now_s)  # of listing
        self.pace = Pace(max(maxima["burst"], maxima["connections"]), now_s)
        self.waiting: deque[int] = deque()  # numbers of connections, to be let in when the debt is over
        self.knocks = 0  # that came while others waited, in a second from then on
        self.knocking_since_s = now_s

    def is_idle(self, now_s: float) -> bool:
        """Whether nothing would be lost if a new one took its place."""
        return not (self.connections or self.waiting) and self.work.is_idle(now_s) and self.pace.is_idle(now_s)

    def spend(self, connections: int, now_s: float) -> None:
        """So many connections were let in, or work was done that counts as many."""
        self.pace.spend(connections, *self._rate(), now_s)

    def offend(self, now_s: float) -> bool:
        """The user broke a rule, or comes again and again; returns whether that costs something for the first time."""
        return self.pace.offend(*self._rate(), now_s)

    def wait_s(self, now_s: float) -> float:
        """In how many seconds its next connection may be let in."""
        return self.pace.wait_s(*self._rate(), now_s)

    def _rate(self) -> tuple[int, int]:
        return self.maxima["requests_per_second"], max(self.maxima["burst"], self.maxima["connections"])


class Entry:
    """All owners, and all connections from the knock to the end.

    `maxima` are those of an owner that is not known yet. It calls `say` with what the opener is to hear.
    """

    def __init__(self, maxima: Mapping[str, int], say: Callable[[LetIn | Waits | TurnAway], None]) -> None:
        self.maxima = maxima
        self._say = say
        self._owners: dict[int, Owner] = {}
        self._inside: dict[int, Owner] = {}  # by number, from being let in to the end
        self._waiting: set[Owner] = set()  # whose connections wait
        self._waiting_until_s = 0.0  # when the first of them may come in
        self._contested_s = -float(limits.CONTEST_SECONDS)  # when several owners had work

    def owner(self, owner: int, now_s: float) -> Owner:
        """What that owner has in use. It outlives the connections, or a new one would bring a new budget."""
        found = self._owners.get(owner)
        if found is None:
            if len(self._owners) >= _OWNERS_KEPT:
                self._owners = {one: kept for one, kept in self._owners.items() if not kept.is_idle(now_s)}
            found = self._owners[owner] = Owner(self.maxima, now_s)
        return found

    def knock(self, number: int, owner: int, now_s: float) -> bool:
        """A connection has come: it is let in now, or waits, or is turned away.

        Many that come while others of their owner wait are an offence each. Returns whether that is the first which
        costs something.
        """
        one = self.owner(owner, now_s)
        if not (one.waiting or self._wait_s(one, now_s)):
            self._welcome(number, one, now_s)
            return False
        if now_s - one.knocking_since_s > limits.DEBT_SECONDS:
            one.knocks, one.knocking_since_s = 0, now_s
        one.knocks += 1
        slowed = one.knocks > KNOCKS_FREE and one.offend(now_s)
        maximum = one.maxima["connections"]
        if one.connections + len(one.waiting) >= maximum:
            self._say(TurnAway(number, maximum))
        else:
            self._say(Waits(number))
            one.waiting.append(number)
            self._waiting.add(one)
            self._waiting_until_s = min(self._wait_s(each, now_s) for each in self._waiting) + now_s
        return slowed

    def ended(self, number: int) -> None:
        """That connection is gone, and so is all that was unread in it."""
        one = self._inside.pop(number, None)
        if one is not None:
            one.connections -= 1

    def hung_up(self, number: int) -> None:
        """Its client has: nobody waits for that connection any more, if it does."""
        for one in self._waiting:
            if number in one.waiting:
                one.waiting.remove(number)
                self._say(TurnAway(number, 0))
                if not one.waiting:
                    self._waiting.discard(one)
                return

    def weighs(self, number: int, connections: int, now_s: float) -> None:
        """To identify its client was as much work as so many connections more."""
        if number in self._inside:
            self._inside[number].spend(connections, now_s)

    def stalled(self, owner: int, took_us: int, now_s: float) -> None:
        """To say something to a client of that owner, or to hang up, took so long: what it waits for with epoll(7)."""
        one = self.owner(owner, now_s)
        one.spend(int(took_us / 1e6 * one.maxima["requests_per_second"] * STALL_PAUSE), now_s)

    def broke(self, number: int, now_s: float) -> bool:
        """That connection ends because its client broke a rule; returns whether that begins to cost something."""
        return number in self._inside and self._inside[number].offend(now_s)

    def contested(self, now_s: float) -> None:
        """Several owners have work: only then must any of them wait."""
        self._contested_s = now_s

    def step(self, now_s: float) -> float:
        """Let one of each owner in whose debt is over; returns in how many seconds there is more to do, or -1."""
        if self._waiting and now_s >= self._waiting_until_s:
            for one in tuple(self._waiting):
                if not self._wait_s(one, now_s):
                    self._welcome(one.waiting.popleft(), one, now_s)
                if not one.waiting:
                    self._waiting.discard(one)
            self._waiting_until_s = min((self._wait_s(one, now_s) for one in self._waiting), default=0.0) + now_s
        return max(0.0, self._waiting_until_s - now_s) if self._waiting else -1

    def _wait_s(self, one: Owner, now_s: float) -> float:
        return one.wait_s(now_s) if now_s - self._contested_s < limits.CONTEST_SECONDS else 0.0

    def _welcome(self, number: int, one: Owner, now_s: float) -> None:
        one.connections += 1
        one.spend(1, now_s)
        self._inside[number] = one
        self._say(LetIn(number))
