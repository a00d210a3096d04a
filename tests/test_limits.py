"""The table of all limits: which test shows each of them at its value and above it, or shows what it does.

A name without a row fails, and so does a row whose test does not exist or does not speak of the limit by its name.
"""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path

import pytest

from fdbroker import limits
from fdbroker.limits import USER_LIMITS

TESTS = Path(__file__).parent
DOCS = runpy.run_path(str(TESTS.parent / "scripts" / "docs"))

# The value passes, one more is refused, cut or lost, as the limit's `above` says: both in one test.
MAXIMA = {
    # --- the wire
    "MESSAGE_BYTES": "wire/test_frame.py::test_the_limit_is_judged_by_the_length_alone",
    "RESOURCES_PER_OPEN": "test_maxima.py::test_resources_of_one_open",
    "REPLY_WITH_DESCRIPTORS_BYTES": "test_maxima.py::test_a_reply_with_descriptors",
    "PATH_BYTES": "test_maxima.py::test_a_path",
    "NAME_BYTES": "test_maxima.py::test_a_name",
    "LABEL_BYTES": "attacks/test_t46_labels.py::test_a_label_is_kept_up_to_its_limit",
    "ATTACHED_SECONDS": "test_maxima.py::test_a_message_with_descriptors_must_be_complete_sooner",
    "MESSAGE_SECONDS": "test_maxima.py::test_a_message_must_be_complete_in_time",
    "ANSWER_SECONDS": "test_maxima.py::test_an_answer_must_be_taken_in_time",
    "UNSENT_BYTES": "test_maxima.py::test_answers_that_wait_for_who_does_not_read",
    "RECIPIENTS_OF_OWNER": "inbox/test_topics.py::test_of_one_owner_so_many_who_are_here_and_not_one_more",
    "OFFERS": "test_maxima.py::test_a_listing",
    "DEVICES_KEPT": "nodes/test_find.py::test_so_many_devices_are_kept",
    "WAITING_BYTES": "inbox/test_memory.py::test_above_the_sum_who_has_more_than_a_share_loses",
    "WAITING_SHARE_BYTES": "inbox/test_memory.py::test_a_share_is_never_less_than_this",
    # --- the links between our processes
    "LINK_BYTES": "test_maxima.py::test_a_message_of_a_link",
    "KEPT_VALUES": "wire/test_codec.py::test_so_many_values_are_kept_and_then_all_are_forgotten",
    "KEPT_BYTES": "wire/test_codec.py::test_a_value_of_so_many_bytes_is_kept_and_none_that_is_longer",
    "LINK_WAITING": "test_maxima.py::test_messages_that_wait_for_a_link",
    "POLICY_LINK_BYTES": "test_maxima.py::test_a_compiled_policy",
    # --- the namespaces worker
    "LIVING_SECONDS": "namespaces/test_living.py::test_what_is_not_found_in_time_counts_as_living",
    "LIVING_OTHERS_MS": "namespaces/test_living.py::test_other_users_that_take_long_to_look_at_do_not_count_for_the_owner",
    "NAMESPACE_SECONDS": "test_maxima.py::test_a_question_to_the_worker_has_its_time",
    "MOUNTS": "test_maxima.py::test_a_copy_of_so_many_mounts_and_not_of_one_more",
    "NAMESPACE_STOPPED_MS": "attacks/test_t30_busy_worker.py::test_a_child_that_its_caller_stops_holds_up_nobody",
    "NAMESPACE_REQUESTS": "opener/test_ask.py::test_many_users_at_once_are_at_most_so_many_and_all_get_their_turn",
    "NAMESPACE_HELD": "opener/test_ask.py::test_of_one_user_so_many_may_be_held_by_those_that_wait_and_not_one_more",
    "NAMESPACE_WAIT_SECONDS": "opener/test_ask.py::test_nobody_is_given_up_before_the_limit",
    # --- what can sleep in the kernel
    "RECEIVED_THREADS": "client/test_closing.py::test_no_more_threads_than_that_and_none_is_left",
    "RECEIVED_STUCK": "client/test_closing.py::test_no_more_threads_than_that_and_none_is_left",
    "OPENING_HELD": "opener/test_authorize.py::test_what_a_thread_opens_counts",
    "CLOSING_HELD": "opener/test_authorize.py::test_what_is_not_closed_yet_counts",
    "LOOKED_AT_ONCE": "keeper/test_listing.py::test_so_many_nodes_are_looked_at_in_one_step",
    # --- the service as a whole
    "FOR_ADMINISTRATORS": "test_maxima.py::test_the_last_connections_are_for_administrators",
    "DESCRIPTORS": "test_maxima.py::test_descriptors_of_the_opener",
    "DESCRIPTORS_RESERVED": "attacks/test_t17_out_of_descriptors.py::test_accepting_pauses_nothing_spins_and_service_comes_back",
    # --- the audit
    "AUDIT_REFUSALS": "attacks/test_t24_forged_logs.py::test_the_counts_are_written_when_their_time_is_over",
    "AUDIT_USERS": "test_maxima.py::test_users_whose_refusals_are_counted",
    "AUDIT_VALUE_CHARACTERS": "test_maxima.py::test_a_value_of_a_record",
    # --- messages
    "TOPICS": "test_maxima.py::test_topics_of_a_policy_and_of_a_subscription",
    "TOPIC_BYTES": "test_maxima.py::test_the_name_of_a_topic",
    "SUBSCRIBER_MESSAGES": "test_maxima.py::test_messages_that_wait_for_a_subscriber",
    "SUBSCRIBER_BYTES": "test_maxima.py::test_bytes_that_wait_for_a_subscriber",
    "DESCRIPTORS_PER_MESSAGE": "attacks/test_t12_unasked_descriptors.py::test_where_messages_may_have_some_none_stays_and_who_sends_too_many_is_disconnected",
    "HELD_DESCRIPTORS": "inbox/test_attached.py::test_a_user_has_room_for_one_message_more_or_for_none",
    "HELD_BYTES": "inbox/test_attached.py::test_the_bytes_of_memfds_count_while_they_are_held",
    "UNREAD_DESCRIPTORS": "inbox/test_attached.py::test_unread_ones_are_counted_of_each_connection_and_each_user",
    "UNREAD_OF_USER": "test_maxima.py::test_descriptors_of_a_user_that_nobody_has_read",
    "ATTACHED_BYTES": "test_maxima.py::test_a_payload_in_a_memfd",
    "ATTACHED_BYTES_MAX": "test_maxima.py::test_what_a_policy_may_say_of_payloads",
    "USERS": "test_maxima.py::test_users_that_may_subscribe",
    "ROWS_PER_MESSAGE": "test_maxima.py::test_rows_that_a_message_has_for_nothing",
    "KEEP_SECONDS": "test_maxima.py::test_a_message_is_kept_for_so_long_where_a_topic_says_nothing",
    "STORE_BYTES": "test_maxima.py::test_bytes_of_the_store",
    "STORE_RESERVE_BYTES": "test_maxima.py::test_the_reserve_is_held_whole_or_not_at_all",
    "RECEIVED_MESSAGES": "test_maxima.py::test_messages_of_one_reply_to_receive",
    "RECEIVED_BYTES": "test_maxima.py::test_bytes_of_one_reply_to_receive",
    "ACKNOWLEDGED": "test_maxima.py::test_numbers_that_are_acknowledged_at_once",
    # --- fairness
    "TURN_UNITS": "inbox/test_turns.py::test_work_that_cannot_be_divided_counts_as_more",
    "ASKED_AT_ONCE": "inbox/test_turns.py::test_one_user_has_few_questions_with_the_opener_while_others_have_work",
    "KNOCKS_FREE": "test_maxima.py::test_knocks_while_others_of_the_user_wait",
    "DEBT_SECONDS": "test_pace.py::test_nobody_owes_more_than_the_longest_wait",
    "OFFENCES_FREE": "test_pace.py::test_the_first_offences_are_free_and_the_further_ones_double",
    "IDLE_SECONDS": "test_maxima.py::test_a_budget_is_forgotten_when_it_was_not_used_for_so_long",
    # --- the bridges
    "BRIDGE_MESSAGES": "bridges/test_outbox.py::test_the_queue_is_bounded_and_drops_the_oldest",
    "BRIDGE_BYTES": "bridges/test_outbox.py::test_the_queue_is_bounded_and_drops_the_oldest",
    "NOTIFICATION_SUMMARY": "bridges/test_notifications.py::test_lengths_are_cut",
    "NOTIFICATION_BODY": "bridges/test_notifications.py::test_lengths_are_cut",
    "NOTIFICATIONS_BURST": "bridges/test_notifications.py::test_all_users_together_are_held_back",
    "NOTIFICATIONS_PER_USER_BURST": "bridges/test_notifications.py::test_one_user_is_held_back_and_others_are_not",
    "NOTIFICATION_USERS": "bridges/test_notifications.py::test_so_many_users_are_known_at_once",
    # --- the policy
    "POLICY_FILE_BYTES": "test_maxima.py::test_bytes_of_a_policy_file",
    "POLICY_BYTES": "test_maxima.py::test_bytes_of_all_files_of_a_policy",
    "POLICY_FILES": "test_maxima.py::test_files_of_a_policy",
    "POLICY_GROUPS": "test_maxima.py::test_groups_that_a_policy_names",
    "POLICY_DEPTH": "test_maxima.py::test_levels_of_a_policy",
    "POLICY_FINDINGS": "test_maxima.py::test_errors_that_are_said_at_once",
    "WAIT_LIMIT_MS": "test_maxima.py::test_a_wait_that_is_promised",
}

# No maximum of what somebody may do or have: why, and the test that shows what it does.
OTHERS = {
    "OPENING_THREADS": ("threads of ours", "kernel/test_jobs.py::test_no_more_threads_than_allowed"),
    "STALL_UNITS": (
        "a measure of ours",
        "inbox/test_turns.py::test_who_stalls_the_loop_pauses_a_hundred_times_as_long",
    ),
    "STALL_PAUSE": ("a factor", "inbox/test_turns.py::test_who_stalls_the_loop_pauses_a_hundred_times_as_long"),
    "UNIT_US": ("a measure of ours", "test_maxima.py::test_a_message_that_takes_long_counts_by_its_time"),
    "UNITS_OF_START": (
        "a measure of ours",
        "inbox/test_turns.py::test_a_unit_is_as_long_as_this_machine_is_slow_and_never_less_than_its_limit",
    ),
    "LONG_UNITS": ("a measure of ours", "test_maxima.py::test_a_message_that_takes_long_counts_by_its_time"),
    "RECORDS_PER_CONNECTION": (
        "what a first record costs",
        "attacks/test_t55_uncharged.py::test_records_have_a_rate",
    ),
    "STUCK_SECONDS": ("time of ours", "kernel/test_jobs.py::test_what_ends_a_job_may_be_the_owners_next_one"),
    "STUCK_THREADS": (
        "threads of ours",
        "kernel/test_jobs.py::test_so_many_jobs_may_be_stuck_and_a_quarter_of_one_owner",
    ),
    "CLOSING_THREADS": ("threads of ours", "kernel/test_jobs.py::test_no_more_threads_than_allowed"),
    "FLIGHT_LOOK_MS": ("an interval of ours", "opener/test_authorize.py::test_what_was_read_meanwhile_is_room_again"),
    "BROKEN_SECONDS": (
        "an interval of ours",
        "attacks/test_t58_broken_policy.py::test_it_ends_a_while_after_the_last_client",
    ),
    "BROKEN_LOOK_SECONDS": (
        "an interval of ours",
        "attacks/test_t58_broken_policy.py::test_every_client_is_told_and_a_mended_policy_serves_the_next",
    ),
    "ACCEPT_PAUSE_MS": ("an interval of ours", "test_maxima.py::test_accepting_goes_on_after_its_pause"),
    "STOP_SECONDS": (
        "the longest time that a stop takes; who ends in time ends it earlier",
        "attacks/test_t48_outliving.py::test_the_launchers_end_takes_all_with_it_although_they_do_nothing_by_themselves_any_more",
    ),
    "DRAIN_SECONDS": (
        "an interval of ours",
        "attacks/test_t24_forged_logs.py::test_counts_are_written_at_the_stop_whoever_takes_its_answers_slowly",
    ),
    "POLICY_SECONDS": (
        "the longest time that a reload takes, on a machine that cannot do it",
        "privileged/test_forged_links.py::test_a_keeper_that_does_not_take_a_policy_ends_the_service",
    ),
    "START_SECONDS": (
        "the longest time that a start takes, on a machine that cannot do it; with 0 it fails at once",
        "launcher/test_journal.py::test_without_a_journal_and_a_standard_error_there_is_no_place_for_records",
    ),
    "AUDIT_REPEAT_SECONDS": (
        "an interval of ours: how often counts are written",
        "attacks/test_t24_forged_logs.py::test_the_counts_are_written_when_their_time_is_over",
    ),
    "UNITS_PER_REQUEST": ("a factor: a budget is made with it", "test_maxima.py::test_a_users_budget"),
    "UNITS_PER_RESOURCE": ("a weight of work", "test_maxima.py::test_resources_that_are_asked_for_count"),
    "BYTES_PER_UNIT": ("a weight of work", "test_maxima.py::test_bytes_that_are_read_count"),
    "DELIVERED_BYTES_PER_UNIT": ("a weight of work", "test_maxima.py::test_delivered_bytes_count"),
    "DELIVERIES_PER_UNIT": ("a weight of work", "test_maxima.py::test_deliveries_count"),
    "TURN_UNITS_ALONE": (
        "TURN_UNITS while nobody else has work: another share, judged by the same line",
        "inbox/test_turns.py::test_shares_are_small_while_others_have_work",
    ),
    "UNDIVIDED_FACTOR": ("a factor", "inbox/test_turns.py::test_work_that_cannot_be_divided_counts_as_more"),
    "CONTEST_SECONDS": ("how long others are remembered", "inbox/test_turns.py::test_who_is_alone_never_rests"),
    "REST_MS": (
        "the least that a rest takes; the most is DEBT_SECONDS",
        "inbox/test_turns.py::test_who_goes_on_above_its_budget_rests_twice_as_long_each_time",
    ),
    "OFFENCES_SECONDS": (
        "how long they are remembered",
        "test_pace.py::test_offences_are_forgotten_after_a_quiet_time_and_not_before",
    ),
    "BRIDGE_LOSSES_SECONDS": (
        "an interval of ours",
        "bridges/test_outbox.py::test_losses_are_said_at_once_and_then_summed_up",
    ),
    "BUS_SECONDS": (
        "how long others are waited for, who are not ours",
        "privileged/test_bridges.py::test_a_desktop_that_hangs_is_waited_for_a_while",
    ),
    "NOTIFICATIONS_PER_SECOND": (
        "a rate: what may come at once is its burst",
        "bridges/test_notifications.py::test_all_users_together_are_held_back",
    ),
    "NOTIFICATIONS_PER_USER": (
        "a rate: what may come at once is its burst",
        "bridges/test_notifications.py::test_one_user_is_held_back_and_others_are_not",
    ),
    "JOURNAL_RETRY_MS": (
        "a number that a client is told",
        "test_maxima.py::test_a_full_journal_says_when_to_come_again",
    ),
    "RECORDS_PER_MESSAGE": (
        "a price",
        "attacks/test_t55_uncharged.py::test_messages_for_the_journal_have_the_same_rate",
    ),
    "BYTES_PER_RECORD": (
        "a price",
        "attacks/test_t55_uncharged.py::test_messages_for_the_journal_have_the_same_rate",
    ),
    "GROUPS_PER_CONNECT": ("a price", "opener/test_authorize.py::test_a_connection_costs_what_its_groups_cost"),
    "VALUES_PER_UNIT": ("a price", "flow/test_inbox.py::test_a_message_costs_what_decoding_it_costs"),
    "REFUSED_AT_ONCE": (
        "what is done in one turn",
        "attacks/test_t58_broken_policy.py::test_many_are_refused_and_some_at_a_time",
    ),
    "BUSY_RETRY_MS": (
        "a number that a client is told",
        "test_maxima.py::test_too_many_descriptors_on_their_way_say_when_to_come_again",
    ),
}

# Of the policy's `limits:`, at what it says; what it may say at all: test_maxima.py, for each of them.
OF_USERS = {
    "connections": "attacks/test_t22_off_by_one.py::test_connections",
    "requests_per_second": "attacks/test_t22_off_by_one.py::test_burst_and_rate",
    "burst": "attacks/test_t22_off_by_one.py::test_burst_and_rate",
    "records_per_second": "attacks/test_t55_uncharged.py::test_records_have_a_rate",
    "record_burst": "attacks/test_t55_uncharged.py::test_records_have_a_rate",
    "unread_grants": "attacks/test_t22_off_by_one.py::test_unread_grants",
    "namespaces": "attacks/test_t30_busy_worker.py::test_a_user_has_so_many_living_namespaces_and_not_one_more",
    "subscriptions": "inbox/test_topics.py::test_so_many_subscriptions_of_a_user_and_not_one_more",
    "stored_messages": "inbox/test_store.py::test_a_senders_share_is_its_own_and_comes_back",
    "stored_bytes": "inbox/test_store.py::test_a_senders_share_is_its_own_and_comes_back",
}
NOT_IN_THIS_VERSION = {"leases"}

# Maxima that are not ours.
OF_THE_MACHINE = {
    # /proc/sys/fs/file-max is of the whole machine, and root's processes may go above it: to come there would take the
    # descriptors of everybody who works on it. The way in the code is that of EMFILE, and the test says ENFILE to it.
    "ENFILE": "attacks/test_t17_out_of_descriptors.py::test_whatever_accept_lacks_one_client_is_told_and_the_next_is_served",
    "EMFILE": "attacks/test_t17_out_of_descriptors.py::test_at_emfile_the_reserve_says_the_refusal",
}

ROWS = [
    *MAXIMA.items(),
    *((name, test) for name, (_, test) in OTHERS.items()),
    *OF_USERS.items(),
    *OF_THE_MACHINE.items(),
]


def test_every_limit_has_a_row_and_every_row_is_of_a_limit():
    assert sorted([*MAXIMA, *OTHERS]) == sorted(DOCS["maxima"]())
    assert sorted([*MAXIMA, *OTHERS]) == sorted(
        name for name in vars(limits) if name.isupper() and name != "USER_LIMITS"
    )
    assert sorted([*OF_USERS, *NOT_IN_THIS_VERSION]) == sorted(USER_LIMITS)


def source(test):
    """The lines of a test, with its decorators, or "" where there is none of that name."""
    file, _, name = test.partition("::")
    text = (TESTS / file).read_text()
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            return "\n".join(text.splitlines()[first - 1 : node.end_lineno])
    return ""


def speaks_of(name, text):
    """As a whole word; a module may have its value as `_NAME`."""
    return re.search(rf"(?<![A-Za-z0-9_])_?{name}(?![A-Za-z0-9_])", text) is not None


@pytest.mark.parametrize(("name", "test"), ROWS, ids=[name for name, _ in ROWS])
def test_the_test_of_a_row_is_there_and_speaks_of_its_limit(name, test):
    text = source(test)
    assert text, f"{test} does not exist"
    assert speaks_of(name, text), f"{test} does not say {name}"
    assert re.search(r"\bassert\b|\bpytest\.raises\b|\bwait_for\b", text), f"{test} asserts nothing"


def test_what_is_no_test_or_does_not_say_it_is_found():
    assert source("test_limits.py::test_of_nothing") == ""
    text = source("test_limits.py::test_every_limit_has_a_row_and_every_row_is_of_a_limit")
    assert [speaks_of(name, text) for name in ("OF_USERS", "USERS", "MAXIMA", "USER")] == [True, False, True, False]


def test_the_memory_of_the_unit_is_enough_for_dozens_of_users_who_all_use_what_they_may():
    """docs/limits.md, "Memory": the sum is that of the limits as they are, and of the unit as it ships."""
    rows, users = DOCS["memory"]()
    assert [size for _, size in rows][2] == limits.WAITING_BYTES
    assert users >= 32


def test_the_tasks_of_the_unit_are_enough_for_all_threads():
    """Where there were fewer, threads that do not end would keep others from being started: by all users, or by a few."""
    closing = limits.CLOSING_THREADS + limits.STUCK_THREADS + 1  # one looks for stuck ones; in opener and inbox each
    processes = 9  # launcher, opener, keeper, inbox, witness, worker, its holder, and some to spare
    wanted = processes + limits.OPENING_THREADS + 2 * closing
    assert _tasks("fdbroker.service") >= wanted
    # each request may have a child, and that a child in the caller's namespaces
    assert _tasks("fdbroker.service.d/namespaces.conf") >= wanted + 2 * limits.NAMESPACE_REQUESTS


def _tasks(unit):
    (found,) = re.findall(r"^TasksMax=(\d+)$", (TESTS.parent / "units" / unit).read_text(), re.MULTILINE)
    return int(found)
