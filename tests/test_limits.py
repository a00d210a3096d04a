"""The table of all limits: which test shows each of them at its value and above it, or shows what it does.

A name without a row fails, and so does a row whose test does not exist or does not speak of the limit by its name.
"""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path

import pytest

from fdbroker.limits import every as limits
from fdbroker.limits.policy import USER_LIMITS

TESTS = Path(__file__).parent
DOCS = runpy.run_path(str(TESTS.parent / "scripts" / "docs"))

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
    *((name, one.test) for name, one in DOCS["maxima"]().items()),
    *OF_USERS.items(),
    *OF_THE_MACHINE.items(),
]


def test_every_limit_has_a_row_and_every_row_is_of_a_limit():
    assert sorted(DOCS["maxima"]()) == sorted(name for name in vars(limits) if name.isupper() and name != "USER_LIMITS")
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
    assert [speaks_of(name, text) for name in ("OF_USERS", "USERS", "ROWS", "USER")] == [True, False, False, False]


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
