"""The descriptors that messages hold, against a count: by user, by all, by bytes, until they are closed."""

from __future__ import annotations

import os
import time
from unittest import mock

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fdbroker.errors import QuotaExceeded
from fdbroker.inbox import attached as module
from fdbroker.inbox.attached import Ledger
from fdbroker.kernel.jobs import Jobs
from fdbroker.kernel.sealed import sealed_memfd
from fdbroker.limits import every as limits

HELD, HELD_BYTES, IN_ALL = 40, 100, 100
MESSAGE = limits.DESCRIPTORS_PER_MESSAGE
UIDS = st.integers(1, 4)


class Machine(RuleBasedStateMachine):
    """Invariant: exactly what some message still has is open, and counts for who sent it."""

    def __init__(self):
        super().__init__()
        self.patched = mock.patch.multiple(module, _HELD=HELD, _HELD_BYTES=HELD_BYTES)
        self.patched.start()
        with mock.patch.object(module, "held_in_all", return_value=IN_ALL):
            self.jobs = Jobs(8)
            self.ledger = Ledger(self.jobs)
        self.held = []  # (uid, Attached, sizes that count)

    def count(self, uid=None):
        return sum(len(one.numbers) for owner, one, _ in self.held if uid in (None, owner))

    def has_room(self, uid):
        if not self.count(uid):  # a part of all is kept for those who have nothing
            return self.count() + MESSAGE <= IN_ALL
        return self.count() + MESSAGE <= limits.shared(IN_ALL) and self.count(uid) + MESSAGE <= min(HELD, IN_ALL // 4)

    @rule(uid=UIDS)
    def ask(self, uid):
        assert self.ledger.has_room(uid) == self.has_room(uid)

    @precondition(lambda self: len(self.held) < 30)
    @rule(uid=UIDS, sizes=st.lists(st.integers(0, 60), min_size=1, max_size=MESSAGE))
    def take(self, uid, sizes):
        if not self.ledger.has_room(uid):
            assert self.ledger.take(uid, []).over
            return
        numbers = [sealed_memfd("m", b"x" * size) for size in sizes]
        self.held.append((uid, self.ledger.take(uid, numbers), []))

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 29), index=st.integers(0, MESSAGE - 1))
    def look(self, which, index):
        """As for a payload in a memfd: its bytes count from now on."""
        uid, one, counted = self.held[which % len(self.held)]
        index %= len(one.numbers)
        size = os.fstat(one.numbers[index]).st_size
        if sum(sum(sizes) for owner, _, sizes in self.held if owner == uid) + size > HELD_BYTES:
            with pytest.raises(QuotaExceeded):
                one.size(index)
            return
        assert one.size(index) == size
        counted.append(size)

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 29))
    def let_go(self, which):
        numbers = self.held.pop(which % len(self.held))[1].numbers
        self.settle()
        for number in numbers:
            with pytest.raises(OSError):
                os.fstat(number)

    def settle(self):
        """They are closed by a thread of their user's."""
        end = time.monotonic() + 60
        while self.ledger._count != self.count() or self.jobs._threads:
            assert time.monotonic() < end, "they are not closed"
            time.sleep(0.0005)

    @invariant()
    def agrees(self):
        self.settle()
        assert self.ledger._count == self.count()
        uids = {uid for uid, _, _ in self.held}
        assert set(self.ledger._held) == uids
        for uid in uids:
            held = self.ledger._held[uid]
            assert held.count == self.count(uid)
            assert held.bytes == sum(sum(sizes) for owner, _, sizes in self.held if owner == uid) <= HELD_BYTES
        for _, one, _ in self.held:
            for number in one.numbers:
                os.fstat(number)

    def teardown(self):
        self.held.clear()
        self.settle()
        assert (self.ledger._count, self.ledger._held) == (0, {})
        self.patched.stop()


TestLedger = Machine.TestCase
TestLedger.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
