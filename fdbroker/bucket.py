"""The token bucket that bounds how often a user asks, or sends.

Runs in: opener, keeper, inbox, D-Bus bridge, each with buckets of its own. An attacker controls when it is asked; the
clock is the caller's.
"""

from __future__ import annotations

import math

from fdbroker.limits import opener as limits

_WAIT_LIMIT_MS = limits.WAIT_LIMIT_MS
# After this long without a request a bucket is full again, unless the policy gives a rate that low.
_IDLE_S = 60


class Bucket:
    """Holds at most `burst` tokens, and gets so many a second; both may change from one request to the next.

    It may owe some: nothing is let through before that is paid.
    """

    __slots__ = ("refilled_at_s", "tokens")

    def __init__(self, burst: int, now_s: float) -> None:
        self.tokens = float(burst)
        self.refilled_at_s = now_s

    def take(self, rate: int, burst: int, now_s: float, cost: int = 1) -> int:
        """Take `cost` tokens: 0, or in how many milliseconds, at most WAIT_LIMIT_MS, that may be tried again.

        What costs more than `burst` is let through when the bucket is full, which then owes the rest.
        """
        wanted = float(min(cost, burst))
        self.tokens = min(float(burst), self.tokens + (now_s - self.refilled_at_s) * rate)
        self.refilled_at_s = now_s
        if self.tokens < wanted:
            return min(math.ceil((wanted - self.tokens) * 1000 / rate), _WAIT_LIMIT_MS)
        self.tokens -= cost
        return 0

    def charge(self, rate: int, burst: int, now_s: float, cost: int) -> None:
        """Count work that is done already. The bucket never owes more than comes in within DEBT_SECONDS."""
        self.take(rate, burst, now_s, 0)
        self.tokens = min(self.tokens, max(self.tokens - cost, -float(rate * limits.DEBT_SECONDS)))

    def is_idle(self, now_s: float) -> bool:
        """Whether nothing would be lost if another bucket took its place."""
        return now_s - self.refilled_at_s > _IDLE_S
