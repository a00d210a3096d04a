"""The maxima of the keeper: lists, counts of refusals, and who connects too often.

Runs in: keeper, inbox.
"""

from __future__ import annotations

from typing import Final

# --- the wire
# resources | guess: a machine has some hundred nodes | the list is cut
# shown by test_maxima.py::test_a_listing
OFFERS: Final = 4096

# --- what can sleep in the kernel
# nodes | measured: 30 us each, less than an open; of one listing | next turn
# shown by keeper/test_listing.py::test_so_many_nodes_are_looked_at_in_one_step
LOOKED_AT_ONCE: Final = 4

# --- the audit
# seconds | guess: an admin reads at this pace | counted, not repeated
# no maximum: an interval of ours: how often counts are written; shown by
# keeper/test_refusals.py::test_the_same_is_written_once_and_its_count_when_its_time_is_over
AUDIT_REPEAT_SECONDS: Final = 10
# refusals | guess: of one user in AUDIT_REPEAT_SECONDS | counted, not written
# shown by keeper/test_refusals.py::test_above_so_many_different_ones_only_their_number_and_owner_is_said
AUDIT_REFUSALS: Final = 32
# refusals | guess: five minutes of AUDIT_REFUSALS | counted, not written
# shown by keeper/test_refusals.py::test_one_owner_makes_no_more_records_in_a_day_than_there_is_room_for
AUDIT_BURST: Final = 1000
# seconds | measured: below 4 GiB a day | counted, not written
# shown by keeper/test_refusals.py::test_one_owner_makes_no_more_records_in_a_day_than_there_is_room_for
AUDIT_SECONDS_PER_REFUSAL: Final = 4

# --- fairness: the inbox counts a user's work in units of about 5 us
# times | guess: what it took, so that it is one percent of the time | -
# no maximum: a factor; shown by inbox/test_turns.py::test_who_stalls_the_loop_pauses_a_hundred_times_as_long
STALL_PAUSE: Final = 100
# connections | guess: of one user in DEBT_SECONDS, while others of it wait | an offence each
# shown by test_maxima.py::test_knocks_while_others_of_the_user_wait
KNOCKS_FREE: Final = 16
# offences | guess: of one user, before they cost something | each costs twice the last
# shown by test_pace.py::test_the_first_offences_are_free_and_the_further_ones_double
OFFENCES_FREE: Final = 32
# seconds | guess: without an offence | they are forgotten
# no maximum: how long they are remembered; shown by
# test_pace.py::test_offences_are_forgotten_after_a_quiet_time_and_not_before
OFFENCES_SECONDS: Final = 5
# seconds | guess: after it a budget is full again | it is forgotten
# shown by test_maxima.py::test_a_budget_is_forgotten_when_it_was_not_used_for_so_long
IDLE_SECONDS: Final = 60
