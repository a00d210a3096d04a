"""The maxima of the launcher, and of the refuser that it starts while the policy is broken.

Runs in: launcher, refuser.
"""

from __future__ import annotations

from typing import Final

# --- what can sleep in the kernel
# connections | guess: while the policy is broken | next turn
# no maximum: what is done in one turn; shown by
# attacks/test_t58_broken_policy.py::test_many_are_refused_and_some_at_a_time
REFUSED_AT_ONCE: Final = 64

# --- the service as a whole
# descriptors | RLIMIT_NOFILE asked for; the hard limit wins | accepting pauses
# shown by test_maxima.py::test_descriptors_of_the_opener
DESCRIPTORS: Final = 65_536
# seconds | design: after the last client that a broken policy refused | exit 78
# no maximum: an interval of ours; shown by
# attacks/test_t58_broken_policy.py::test_it_ends_a_while_after_the_last_client
BROKEN_SECONDS: Final = 10
# seconds | design: a broken policy's files are looked at so often | refused
# no maximum: an interval of ours; shown by
# attacks/test_t58_broken_policy.py::test_every_client_is_told_and_a_mended_policy_serves_the_next
BROKEN_LOOK_SECONDS: Final = 1
# seconds | design: SIGTERM answers what is in flight | children are killed
# no maximum: the longest time that a stop takes; who ends in time ends it earlier; shown by
# attacks/test_t48_outliving.py::test_the_launchers_end_takes_all_with_it_although_they_do_nothing_any_more
STOP_SECONDS: Final = 5
# seconds | as START_SECONDS: until all use a new policy | the service ends
# no maximum: the longest time that a reload takes, on a machine that cannot do it; shown by
# privileged/test_forged_links.py::test_a_keeper_that_does_not_take_a_policy_ends_the_service
POLICY_SECONDS: Final = 40
# seconds | ten times what was measured at a load of 20 on two CPUs | start fails
# no maximum: the longest time that a start takes, on a machine that cannot do it; with 0 it fails at once; shown by
# launcher/test_journal.py::test_without_a_journal_and_a_standard_error_there_is_no_place_for_records
START_SECONDS: Final = 40
