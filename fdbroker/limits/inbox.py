"""The maxima of the inbox: the wire to its clients, messages, and what one user may delay others by.

Runs in: inbox, clients, bridges, and what reads the policy.
"""

from __future__ import annotations

from typing import Final

# --- the wire
# bytes | design: one frame or one Varlink message | EMSGSIZE or disconnect
# shown by wire/test_frame.py::test_the_limit_is_judged_by_the_length_alone
MESSAGE_BYTES: Final = 65_536
# seconds | design: a message must be complete | disconnect
# shown by test_maxima.py::test_a_message_must_be_complete_in_time
MESSAGE_SECONDS: Final = 10
# seconds | design: from descriptors coming to their message being taken; gone 10 s after the client | disconnect
# shown by test_maxima.py::test_a_message_with_descriptors_must_be_complete_sooner
ATTACHED_SECONDS: Final = 6
# seconds | guess: a client takes something of an answer that it asked for | disconnect
# shown by test_maxima.py::test_an_answer_must_be_taken_in_time
ANSWER_SECONDS: Final = 5
# bytes | guess: that wait in the inbox for all clients together | disconnect
# shown by inbox/test_memory.py::test_above_the_sum_who_has_more_than_a_share_loses
WAITING_BYTES: Final = 134_217_728
# bytes | guess: of these, the least that one owner may have | disconnect
# shown by inbox/test_memory.py::test_a_share_is_never_less_than_this
WAITING_SHARE_BYTES: Final = 1_048_576
# bytes | guess: answers that wait for a client that does not read | disconnect
# shown by test_maxima.py::test_answers_that_wait_for_who_does_not_read
UNSENT_BYTES: Final = 262_144

# --- the audit
# uids | guess: of messages to all who are here | those are left out
# shown by inbox/test_topics.py::test_of_one_owner_so_many_who_are_here_and_not_one_more
RECIPIENTS_OF_OWNER: Final = 4
# records | measured: with grants, below 4 GiB a day | a message costs so many
# no maximum: a price; shown by attacks/test_t55_uncharged.py::test_messages_for_the_journal_have_the_same_rate
RECORDS_PER_MESSAGE: Final = 4
# bytes | likewise: each costs one record more | -
# no maximum: a price; shown by attacks/test_t55_uncharged.py::test_messages_for_the_journal_have_the_same_rate
BYTES_PER_RECORD: Final = 128

# --- messages
# messages | guess: that wait for one subscriber | the oldest is lost
# shown by test_maxima.py::test_messages_that_wait_for_a_subscriber
SUBSCRIBER_MESSAGES: Final = 1000
# bytes | guess: sixteen of the longest | the oldest is lost
# shown by test_maxima.py::test_bytes_that_wait_for_a_subscriber
SUBSCRIBER_BYTES: Final = 1_048_576
# descriptors | design | disconnect
# shown by attacks/test_t12_unasked_descriptors.py::test_where_messages_may_have_some_none_stays_and_too_many_disconnect
DESCRIPTORS_PER_MESSAGE: Final = 16
# descriptors | guess: that one user's messages hold | QuotaExceeded
# shown by inbox/test_attached.py::test_a_user_has_room_for_one_message_more_or_for_none
HELD_DESCRIPTORS: Final = 256
# bytes | guess: of memfds that one user's messages hold | QuotaExceeded
# shown by inbox/test_attached.py::test_the_bytes_of_memfds_count_while_they_are_held
HELD_BYTES: Final = 268_435_456
# descriptors | guess: sent to a subscriber, not received | the message is lost
# shown by inbox/test_attached.py::test_unread_ones_are_counted_of_each_connection_and_each_user
UNREAD_DESCRIPTORS: Final = 32
# descriptors | guess: sixteen subscribers, or ended ones | the message is lost
# shown by test_maxima.py::test_descriptors_of_a_user_that_nobody_has_read
UNREAD_OF_USER: Final = 512
# rows | measured: of the store, take as long as a message | it counts as more
# shown by test_maxima.py::test_rows_that_a_message_has_for_nothing
ROWS_PER_MESSAGE: Final = 16
# bytes | guess: a thousand users with 1 MiB each | ENOSPC
# shown by test_maxima.py::test_bytes_of_the_store
STORE_BYTES: Final = 1_073_741_824
# bytes | guess: four times SQLite's log | without: ENOSPC
# shown by test_maxima.py::test_the_reserve_is_held_whole_or_not_at_all
STORE_RESERVE_BYTES: Final = 16_777_216
# messages | guess: in one reply to Receive | the next Receive has them
# shown by test_maxima.py::test_messages_of_one_reply_to_receive
RECEIVED_MESSAGES: Final = 1000
# bytes | guess: four of the longest; one always fits | likewise
# shown by test_maxima.py::test_bytes_of_one_reply_to_receive
RECEIVED_BYTES: Final = 262_144
# messages | as many as one reply has | InvalidParameter
# shown by test_maxima.py::test_numbers_that_are_acknowledged_at_once
ACKNOWLEDGED: Final = 1000

# --- fairness: the inbox counts a user's work in units of about 5 us
# units | measured: of CPU time, until the inbox serves | a slow machine's unit
# no maximum: a measure of ours; shown by
# inbox/test_turns.py::test_a_unit_is_as_long_as_this_machine_is_slow_and_never_less_than_its_limit
UNITS_OF_START: Final = 20_000
# units | guess: for one message, 0.3 ms | it counts by its time
# no maximum: a measure of ours; shown by test_maxima.py::test_a_message_that_takes_long_counts_by_its_time
LONG_UNITS: Final = 60
# units | a read, a message and its resource, and beside it a message sent | a user's budget: times its rate
# no maximum: a factor: a budget is made with it; shown by test_maxima.py::test_a_users_budget
UNITS_PER_REQUEST: Final = 6
# units | measured: the opener's part of one of a batch | -
# no maximum: a weight of work; shown by test_maxima.py::test_resources_that_are_asked_for_count
UNITS_PER_RESOURCE: Final = 2
# bytes | guess: reading and decoding them | counts as more
# no maximum: a weight of work; shown by test_maxima.py::test_bytes_that_are_read_count
BYTES_PER_UNIT: Final = 8192
# bytes | measured: to subscribers, joined and sent | likewise
# no maximum: a weight of work; shown by test_maxima.py::test_delivered_bytes_count
DELIVERED_BYTES_PER_UNIT: Final = 16_384
# deliveries | measured: a send to each subscriber for all of a turn | likewise
# no maximum: a weight of work; shown by test_maxima.py::test_deliveries_count
DELIVERIES_PER_UNIT: Final = 16
# values | measured: objects and arrays of JSON, 0.1 us each | counts as more
# no maximum: a price; shown by flow/test_inbox.py::test_a_message_costs_what_decoding_it_costs
VALUES_PER_UNIT: Final = 64
# units | guess: what one user may delay others by | next turn
# shown by inbox/test_turns.py::test_work_that_cannot_be_divided_counts_as_more
TURN_UNITS: Final = 8
# units | guess: the same, while nobody else has work | next turn
# no maximum: TURN_UNITS while nobody else has work: another share, judged by the same line; shown by
# inbox/test_turns.py::test_shares_are_small_while_others_have_work
TURN_UNITS_ALONE: Final = 2048
# times | guess: work above TURN_UNITS that cannot be divided counts as more | -
# no maximum: a factor; shown by inbox/test_turns.py::test_work_that_cannot_be_divided_counts_as_more
UNDIVIDED_FACTOR: Final = 4
# resources | guess: of one user, that the opener has yet to open | the others wait
# shown by inbox/test_turns.py::test_one_user_has_few_questions_with_the_opener_while_others_have_work
ASKED_AT_ONCE: Final = 2
# milliseconds | guess: the first rest; shorter ones cost more than they save | twice as long each time
# no maximum: the least that a rest takes; the most is DEBT_SECONDS; shown by
# inbox/test_turns.py::test_who_goes_on_above_its_budget_rests_twice_as_long_each_time
REST_MS: Final = 50
