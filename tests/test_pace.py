"""A budget that may go into debt, and offences that cost more and more: by a clock of our own."""

from __future__ import annotations

from fdbroker.limits import every as limits
from fdbroker.pace import Pace

RATE, BURST = 100, 200


def test_within_the_budget_nobody_waits_and_above_it_for_as_long_as_the_debt_lasts():
    pace = Pace(BURST, 0)
    pace.spend(BURST, RATE, BURST, 0)
    assert pace.wait_s(RATE, BURST, 0) == 0
    pace.spend(1, RATE, BURST, 0)
    assert pace.wait_s(RATE, BURST, 0) == 1 / RATE
    assert pace.wait_s(RATE, BURST, 0.02) == 0


def test_nobody_owes_more_than_the_longest_wait():
    pace = Pace(BURST, 0)
    pace.spend(10**9, RATE, BURST, 0)
    assert pace.wait_s(RATE, BURST, 0) == limits.DEBT_SECONDS


def test_a_budget_grows_to_its_burst_and_no_further():
    pace = Pace(BURST, 0)
    pace.spend(BURST + 1, RATE, BURST, 1000)
    assert pace.wait_s(RATE, BURST, 1000) > 0


def test_the_first_offences_are_free_and_the_further_ones_double():
    """Whatever was left of the budget: a large burst does not pay for them."""
    pace = Pace(10**6, 0)
    assert not any(pace.offend(RATE, 10**6, 0) for _ in range(limits.OFFENCES_FREE))
    assert pace.wait_s(RATE, 10**6, 0) == 0
    assert pace.offend(RATE, 10**6, 0)
    waits = [pace.wait_s(RATE, 10**6, 0)]
    for _ in range(8):
        assert not pace.offend(RATE, 10**6, 0)
        waits.append(pace.wait_s(RATE, 10**6, 0))
    owed = [round(one * RATE) for one in waits]
    assert owed[:6] == [1, 3, 7, 15, 31, 63]
    assert owed[-1] == RATE * limits.DEBT_SECONDS


def test_offences_are_forgotten_after_a_quiet_time_and_not_before():
    pace = Pace(BURST, 0)
    for _ in range(limits.OFFENCES_FREE):
        pace.offend(RATE, BURST, 0)
    assert pace.offend(RATE, BURST, limits.OFFENCES_SECONDS)
    assert not pace.offend(RATE, BURST, 2 * limits.OFFENCES_SECONDS + 0.1)
