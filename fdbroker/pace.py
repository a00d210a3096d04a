"""How much work each user may make for others: a budget that may go into debt, and offences that cost more and more.

Runs in: opener (connections), inbox (messages), each with paces of its own. An attacker controls what it spends and
how often it offends; the clock is the caller's. Nothing is refused here: who is in debt is served later.
"""

from __future__ import annotations

from fdbroker.limits import keeper as limits
from fdbroker.limits.opener import DEBT_SECONDS

_DEBT_S = DEBT_SECONDS
_FREE = limits.OFFENCES_FREE
_FORGOTTEN_S = limits.OFFENCES_SECONDS


class Pace:
    """Holds at most `burst` units, gets `rate` a second, and owes at most what comes in DEBT_SECONDS.

    Rate and burst may change from one call to the next. The first OFFENCES_FREE offences cost nothing, each further one
    twice as much as that before, until there was none for OFFENCES_SECONDS.
    """

    __slots__ = ("_offences", "_offended_at_s", "_refilled_at_s", "_units")

    def __init__(self, burst: int, now_s: float) -> None:
        self._units = float(burst)
        self._refilled_at_s = now_s
        self._offences = 0
        self._offended_at_s = now_s

    def spend(self, cost: int, rate: int, burst: int, now_s: float) -> None:
        """So much work was done for the user, or will be."""
        self._refill(rate, burst, now_s)
        self._units = max(self._units - cost, -float(rate * _DEBT_S))

    def offend(self, rate: int, burst: int, now_s: float) -> bool:
        """The user did what a good client does not; returns whether this is the first time that it costs something."""
        if now_s - self._offended_at_s > _FORGOTTEN_S:
            self._offences = 0
        self._offences += 1
        self._offended_at_s = now_s
        counted = self._offences - _FREE
        if counted > 0:
            # a debt, whatever was left: else a large burst would pay for a thousand of them
            self._refill(rate, burst, now_s)
            self._units = min(self._units, 0.0)
            self.spend(1 << min(counted - 1, 30), rate, burst, now_s)
        return counted == 1

    def wait_s(self, rate: int, burst: int, now_s: float) -> float:
        """In how many seconds the debt is over; 0 when there is none."""
        self._refill(rate, burst, now_s)
        return max(0.0, -self._units / rate)

    def is_idle(self, now_s: float) -> bool:
        """Whether nothing would be lost if another pace took its place, unless the rate is far below the burst."""
        return now_s - max(self._refilled_at_s, self._offended_at_s) > limits.IDLE_SECONDS

    def _refill(self, rate: int, burst: int, now_s: float) -> None:
        self._units = min(float(burst), self._units + (now_s - self._refilled_at_s) * rate)
        self._refilled_at_s = now_s
