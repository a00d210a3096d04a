"""The maxima of the opener, and of what it shares with the other processes.

Runs in: every process; the opener loads none but these.
"""

from __future__ import annotations

from typing import Final

# --- the wire
# resources | design; far below SCM_MAX_FD (253) | InvalidParameter
# shown by test_maxima.py::test_resources_of_one_open
RESOURCES_PER_OPEN: Final = 64
# namespaces | guess: of one owner, the most that a policy may say | load fails
# shown by test_maxima.py::test_living_namespaces_of_a_policy
LIVING_NAMESPACES: Final = 64
# bytes | unix(7): one skb, so a stream socket takes it whole or not at all | QuotaExceeded
# shown by test_maxima.py::test_a_reply_with_descriptors
REPLY_WITH_DESCRIPTORS_BYTES: Final = 32_768
# bytes | PATH_MAX with its NUL is 4096 (linux/limits.h) | Denied
# shown by test_maxima.py::test_a_path
PATH_BYTES: Final = 4095
# bytes | NAME_MAX (linux/limits.h): one path component | Denied
# shown by test_maxima.py::test_a_name
NAME_BYTES: Final = 255
# bytes | a page, as of /proc/PID/attr/current | the label counts as unknown; in a policy: load fails
# shown by attacks/test_t46_labels.py::test_a_label_is_kept_up_to_its_limit
LABEL_BYTES: Final = 4096

# --- the links between our processes
# bytes | one request of 64 KiB and its lengths fit twice | the service ends
# shown by test_maxima.py::test_a_message_of_a_link
LINK_BYTES: Final = 131_072
# values | guess: what programs ask for again and again | all are forgotten
# shown by wire/test_codec.py::test_so_many_values_are_kept_and_then_all_are_forgotten
KEPT_VALUES: Final = 256
# bytes | guess: sixteen resources with long paths | not remembered
# shown by wire/test_codec.py::test_a_value_of_so_many_bytes_is_kept_and_none_that_is_longer
KEPT_BYTES: Final = 2048
# messages | guess: five for each of 20,000 connections | the service ends
# shown by test_maxima.py::test_messages_that_wait_for_a_link
LINK_WAITING: Final = 131_072
# messages | guess: refusals; more are not answered | nothing more is asked
# shown by
# flow/test_opener.py::test_a_flood_of_refusals_that_the_keeper_does_not_read_waits_at_the_inbox_and_none_is_lost
KEEPER_WAITING: Final = 64
# bytes | guess: a large policy, compiled, is 1 MiB | load fails
# shown by test_maxima.py::test_a_compiled_policy
POLICY_LINK_BYTES: Final = 16_777_216

# --- the namespaces worker
# seconds | guess: twice what the worker gives a child | OpenFailed
# shown by namespaces/test_queue.py::test_nobody_is_given_up_before_the_limit
NAMESPACE_WAIT_SECONDS: Final = 10

# --- what can sleep in the kernel
# threads | guess: of different owners at the same time, in the opener | wait
# no maximum: threads of ours; shown by kernel/test_jobs.py::test_no_more_threads_than_allowed
OPENING_THREADS: Final = 16
# threads | guess: of different owners, in opener and inbox each | wait
# no maximum: threads of ours; shown by kernel/test_jobs.py::test_no_more_threads_than_allowed
CLOSING_THREADS: Final = 32
# seconds | guess: of a job that a thread does | another thread goes on
# no maximum: time of ours; shown by kernel/test_jobs.py::test_what_ends_a_job_may_be_the_owners_next_one
STUCK_SECONDS: Final = 1
# threads | guess: a quarter for one owner; TasksMax of the unit has room | wait
# no maximum: threads of ours; shown by kernel/test_jobs.py::test_so_many_jobs_may_be_stuck_and_a_quarter_of_one_owner
STUCK_THREADS: Final = 128
# descriptors | guess: one owner's requests that are being opened | RateLimited
# shown by opener/test_authorize.py::test_what_a_thread_opens_counts
OPENING_HELD: Final = 128
# descriptors | guess: of one owner, that wait to be closed | RateLimited
# shown by opener/test_authorize.py::test_what_is_not_closed_yet_counts
CLOSING_HELD: Final = 128
# resources | measured: of one request; to judge, open or record one takes about 10 us, behind links 36 | next turn
# shown by opener/test_open.py::test_so_many_nodes_are_judged_in_one_turn
RESOURCES_AT_ONCE: Final = 16
# connections | guess: of an owner at its maximum, to see whether their clients have closed them | they count
# shown by opener/test_authorize.py::test_what_its_clients_have_closed_does_not_count
LEAVING_LOOKED: Final = 64
# groups | measured: 65,536 take 1 ms | counts as one connection more
# no maximum: a price; shown by test_maxima.py::test_groups_that_a_connection_may_have
GROUPS_PER_CONNECT: Final = 1024
# devices | guess: that are found again and again; a descriptor each | all are closed
# shown by nodes/test_find.py::test_so_many_devices_are_kept
DEVICES_KEPT: Final = 32
# milliseconds | guess: a look at all unread sockets takes 1 ms | wait
# no maximum: an interval of ours; shown by opener/test_authorize.py::test_what_was_read_meanwhile_is_room_again
FLIGHT_LOOK_MS: Final = 50

# --- the service as a whole
# descriptors | OWN_DESCRIPTORS, one request twice (64 node, 64 open) | accepting pauses
# shown by attacks/test_t17_out_of_descriptors.py::test_accepting_pauses_nothing_spins_and_service_comes_back
DESCRIPTORS_RESERVED: Final = 256
# descriptors | links, folders, DEVICES_KEPT, one batch twice | of all requests that wait, and closing: RateLimited
# shown by opener/test_authorize.py::test_what_requests_hold_that_wait_leaves_what_the_process_needs
OWN_DESCRIPTORS: Final = 96
# connections | guess: the last ones, so that Admin works | QuotaExceeded
# shown by opener/test_authorize.py::test_the_last_places_are_for_new_owners_and_the_very_last_for_administrators
FOR_ADMINISTRATORS: Final = 16
# milliseconds | guess: EMFILE is over when others closed | tries again
# no maximum: an interval of ours; shown by test_maxima.py::test_accepting_goes_on_after_its_pause
ACCEPT_PAUSE_MS: Final = 100
# seconds | guess: of STOP_SECONDS, for what clients have yet to take | disconnect
# no maximum: an interval of ours; shown by
# attacks/test_t24_forged_logs.py::test_counts_are_written_at_the_stop_whoever_takes_its_answers_slowly
DRAIN_SECONDS: Final = 3

# --- the audit
# users | guess: memory below 32 MiB | all counts are written
# shown by test_maxima.py::test_users_whose_refusals_are_counted
AUDIT_USERS: Final = 256
# characters | a record stays below PIPE_BUF (4096) | cut, marked by …
# shown by test_maxima.py::test_a_value_of_a_record
AUDIT_VALUE_CHARACTERS: Final = 512
# records | measured: the first has what the journal has not | a connection's first record costs so many more
# no maximum: what a first record costs; shown by attacks/test_t55_uncharged.py::test_records_have_a_rate
RECORDS_PER_CONNECTION: Final = 1

# --- fairness: the inbox counts a user's work in units of about 5 us
# microseconds | measured: a read, or a small message | -
# no maximum: a measure of ours; shown by test_maxima.py::test_a_message_that_takes_long_counts_by_its_time
UNIT_US: Final = 5
# units | guess: for one message, 5 ms | the user pauses
# no maximum: a measure of ours; shown by inbox/test_turns.py::test_who_stalls_the_loop_pauses_a_hundred_times_as_long
STALL_UNITS: Final = 1000
# seconds | guess: since another user had work | nobody has to rest
# no maximum: how long others are remembered; shown by inbox/test_turns.py::test_who_is_alone_never_rests
CONTEST_SECONDS: Final = 1
# seconds | design: the longest rest, or wait for a connection | no more is owed
# shown by test_pace.py::test_nobody_owes_more_than_the_longest_wait
DEBT_SECONDS: Final = 1

# --- the policy
# groups | half of LINK_BYTES: all that a client may be in | load fails
# shown by test_maxima.py::test_groups_that_a_policy_names
POLICY_GROUPS: Final = 16_384
# errors or warnings | guess: nobody reads more at once | the rest is counted
# shown by test_maxima.py::test_errors_that_are_said_at_once
POLICY_FINDINGS: Final = 200
# milliseconds | guess: what RateLimited promises at most | capped
# shown by test_maxima.py::test_a_wait_that_is_promised
WAIT_LIMIT_MS: Final = 10_000
# milliseconds | guess: what RateLimited says when the journal is full | -
# no maximum: a number that a client is told; shown by test_maxima.py::test_a_full_journal_says_when_to_come_again
JOURNAL_RETRY_MS: Final = 100
# milliseconds | guess: … when too many descriptors are on their way | -
# no maximum: a number that a client is told; shown by
# test_maxima.py::test_too_many_descriptors_on_their_way_say_when_to_come_again
BUSY_RETRY_MS: Final = 1000


def reserved(descriptors: int) -> int:
    """Of a process that may have so many descriptors open, how many are not for connections."""
    return max(DESCRIPTORS_RESERVED, descriptors // 16)


def shared(most: int) -> int:
    """Of a maximum for all owners together: the part that owners may use who have something in use already."""
    return most - most // 4
