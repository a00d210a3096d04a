"""The token bucket against exact numbers: it never gives a token that was not earned, and says when the next one is."""

from __future__ import annotations

import math
from fractions import Fraction

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fdbroker.bucket import Bucket
from fdbroker.limits import every as limits

STEPS = st.integers(0, 4000).map(lambda eighths: Fraction(eighths, 8))  # which a float holds exactly


class Machine(RuleBasedStateMachine):
    """Invariant: what was taken since any refill is at most what was there and what came since; the rest is owed."""

    def __init__(self):
        super().__init__()
        self.now = Fraction(1000)
        self.bucket = Bucket(10, float(self.now))
        self.tokens, self.since = Fraction(10), self.now

    def earned(self, rate, burst):
        return min(Fraction(burst), self.tokens + (self.now - self.since) * rate)

    @rule(step=STEPS)
    def time_passes(self, step):
        self.now += step

    @rule(rate=st.integers(1, 1000), burst=st.integers(1, 50), cost=st.integers(1, 60))
    def take(self, rate, burst, cost):
        had, wanted = self.earned(rate, burst), min(cost, burst)
        wait_ms = self.bucket.take(rate, burst, float(self.now), cost)
        self.tokens, self.since = had, self.now
        if had >= wanted:
            assert wait_ms == 0
            self.tokens -= cost
            return
        assert wait_ms == min(math.ceil((wanted - had) * 1000 / rate), limits.WAIT_LIMIT_MS)
        if wait_ms < limits.WAIT_LIMIT_MS:  # who waits so long gets it, if nobody else takes it, and not much earlier
            assert self.tokens + Fraction(wait_ms, 1000) * rate >= wanted
            assert self.tokens + Fraction(wait_ms - 1, 1000) * rate < wanted

    @rule(rate=st.integers(1, 1000), burst=st.integers(1, 50), cost=st.integers(0, 3000))
    def charge(self, rate, burst, cost):
        self.bucket.charge(rate, burst, float(self.now), cost)
        self.tokens, self.since = self.earned(rate, burst), self.now
        self.tokens -= max(0, min(cost, self.tokens + rate * limits.DEBT_SECONDS))  # what is owed already stays

    @invariant()
    def agrees(self):
        assert self.bucket.tokens == self.tokens
        assert self.bucket.is_idle(float(self.now)) == (self.now - self.since > 60)


TestBucket = Machine.TestCase
TestBucket.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
