"""The maxima of the bridges.

Runs in: bridges.
"""

from __future__ import annotations

from typing import Final

# --- the bridges
# messages | guess: that wait for the broker | the oldest is dropped
# shown by bridges/test_outbox.py::test_the_queue_is_bounded_and_drops_the_oldest
BRIDGE_MESSAGES: Final = 1000
# bytes | guess: sixteen of the longest | the oldest is dropped
# shown by bridges/test_outbox.py::test_the_queue_is_bounded_and_drops_the_oldest
BRIDGE_BYTES: Final = 1_048_576
# seconds | guess: an admin reads at this pace | counted, then said
# no maximum: an interval of ours; shown by bridges/test_outbox.py::test_losses_are_said_at_once_and_then_summed_up
BRIDGE_LOSSES_SECONDS: Final = 10
# seconds | guess: a bus or a desktop that is asked answers | an error; given up
# no maximum: the time for an answer of another program; shown by
# privileged/test_bridges.py::test_a_desktop_that_hangs_is_waited_for_a_while
BUS_SECONDS: Final = 10
# characters | guess: more than a desktop shows | cut, marked by …
# shown by bridges/test_notifications.py::test_lengths_are_cut
NOTIFICATION_SUMMARY: Final = 200
# characters | guess: more than a desktop shows | cut, marked by …
# shown by bridges/test_notifications.py::test_lengths_are_cut
NOTIFICATION_BODY: Final = 2000
# notifications | guess: on average, of all users | dropped, counted
# no maximum: a rate, whose burst is the maximum; shown by
# bridges/test_notifications.py::test_all_users_together_are_held_back
NOTIFICATIONS_PER_SECOND: Final = 5
# notifications | guess: at once, of all users | dropped, counted
# shown by bridges/test_notifications.py::test_all_users_together_are_held_back
NOTIFICATIONS_BURST: Final = 20
# notifications | guess: a second, of one user | dropped, counted
# no maximum: a rate, whose burst is the maximum; shown by
# bridges/test_notifications.py::test_one_user_is_held_back_and_others_are_not
NOTIFICATIONS_PER_USER: Final = 1
# notifications | guess: at once, of one user | dropped, counted
# shown by bridges/test_notifications.py::test_one_user_is_held_back_and_others_are_not
NOTIFICATIONS_PER_USER_BURST: Final = 5
# users | guess: that send within a minute | dropped, counted
# shown by bridges/test_notifications.py::test_so_many_users_are_known_at_once
NOTIFICATION_USERS: Final = 256
