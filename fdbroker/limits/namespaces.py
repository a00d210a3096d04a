"""The maxima of the namespaces worker and of its children.

Runs in: namespaces worker.
"""

from __future__ import annotations

from typing import Final

# --- the namespaces worker
# seconds | guess: a thousand times what it takes | OpenFailed (ETIMEDOUT)
# shown by test_maxima.py::test_a_question_to_the_worker_has_its_time
NAMESPACE_SECONDS: Final = 5
# mounts | measured: sixteen copies take 25 MiB of the kernel's memory | OpenFailed (ENOSPC)
# shown by test_maxima.py::test_a_copy_of_so_many_mounts_and_not_of_one_more
MOUNTS: Final = 4096
# seconds | guess: of looking what an owner's processes and root's hold | all count as living
# shown by namespaces/test_living.py::test_what_is_not_found_in_time_counts_as_living
LIVING_SECONDS: Final = 1
# times | design: of what looking took, so that of one owner it takes a fifth of a CPU | its next new namespace waits
# shown by attacks/test_t30_busy_worker.py::test_looking_at_what_an_owner_holds_takes_a_fifth_of_a_cpu
LIVING_RESTS: Final = 4
# milliseconds | measured: of listing mount namespaces, then of looking at others', 0.1 ms each | the rest holds nothing
# shown by namespaces/test_living.py::test_other_users_that_take_long_to_look_at_do_not_count_for_the_owner
LIVING_OTHERS_MS: Final = 250
# milliseconds | design: its caller has stopped the child | OpenFailed
# shown by attacks/test_t30_busy_worker.py::test_a_child_that_its_caller_stops_holds_up_nobody
NAMESPACE_STOPPED_MS: Final = 500
# requests | guess: each is a process for a moment; one of each user | wait
# shown by namespaces/test_queue.py::test_many_users_at_once_are_at_most_so_many_and_all_get_their_turn
NAMESPACE_REQUESTS: Final = 16
# descriptors | guess: one user's, in requests that wait and in what waits to be closed | RateLimited
# shown by namespaces/test_queue.py::test_of_one_user_so_many_may_be_held_by_those_that_wait_and_not_one_more
NAMESPACE_HELD: Final = 128
