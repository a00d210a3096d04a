"""Which owner a uid has: a user, the user whose subordinate uid it is, a range by itself, or the one of all others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from harness import replaced_file
from hypothesis import given
from hypothesis import strategies as st

from fdbroker.policy import names
from fdbroker.policy.owners import EVERY_UID, Owners
from fdbroker.policy.ranges import make_owners
from fdbroker.terms import INVALID_ID, OTHERS

USERS = (0, 1000, 1001, 1002, 5000)


@pytest.mark.parametrize(
    ("ranges", "uid", "owner"),
    [
        ([], 1000, 1000),
        ([], 1003, None),
        ([(1000, 100000, 165535)], 99999, None),
        ([(1000, 100000, 165535)], 100000, 1000),
        ([(1000, 100000, 165535)], 165535, 1000),
        ([(1000, 100000, 165535)], 165536, None),
        ([(1000, 100000, 100009), (1001, 100010, 100019)], 100009, 1000),
        ([(1000, 100000, 100009), (1001, 100010, 100019)], 100010, 1001),
        # root's, an unknown user's, and one of a uid that is no user's: owners of their own
        ([(0, 100000, 100009)], 100005, 100000),
        ([(None, 100000, 100009)], 100005, 100000),
        ([(77, 100000, 100009)], 100005, 100000),
        # two users' ranges share uids: neither is charged
        ([(1000, 100000, 100009), (1001, 100009, 100019)], 100000, 100000),
        ([(1000, 100000, 100009), (1001, 100009, 100019)], 100019, 100000),
        ([(1000, 100000, 100009), (1000, 100009, 100019)], 100019, 1000),
        ([(1000, 100000, 100019), (1001, 100005, 100006), (1000, 100018, 100020)], 100020, 100000),
        # a range over a user's uid: that user is itself, and the range never counts for it
        ([(1000, 4990, 5010)], 5000, 5000),
        ([(1000, 4990, 5010)], 5001, 4990),
        ([(1000, 5000, 5010)], 5001, 5001),
        ([(1000, 5000, 5000)], 5000, 5000),
        ([(1000, 1000, 1002)], 1001, 1001),
    ],
)
def test_each_uid_has_the_owner_that_the_design_says(ranges, uid, owner):
    assert make_owners(USERS, ranges).of(uid) == owner


@given(
    st.frozensets(st.integers(0, 60)),
    st.lists(st.tuples(st.one_of(st.none(), st.integers(0, 60)), st.integers(0, 60), st.integers(0, 20)), max_size=8),
)
def test_nobody_is_charged_for_anybody_else(users, given_ranges):
    """A user is charged for its own uid and for uids that its ranges alone hold; every uid of a range has an owner."""
    ranges = [(user, first, first + size) for user, first, size in given_ranges]
    table = make_owners(users, ranges)
    for uid in range(90):
        holders = {user for user, first, last in ranges if first <= uid <= last}
        owner = table.of(uid)
        if uid in users:
            assert owner == uid
        elif not holders:
            assert owner is None
        else:
            assert owner is not None
            assert owner not in users or holders == {owner}
            assert any(first <= uid <= last for first, last in table.uids(owner))
    assert table.uids(OTHERS) == EVERY_UID


def test_an_owner_has_its_uid_and_its_ranges():
    table = make_owners(
        USERS, [(1000, 100000, 100009), (1001, 100010, 100019), (1000, 200000, 200009), (0, 300000, 300009)]
    )
    assert table.uids(1000) == ((1000, 1000), (100000, 100009), (200000, 200009))
    assert table.uids(1002) == ((1002, 1002),)
    assert table.uids(300000) == ((300000, 300009),)
    assert Owners().uids(7) == ((7, 7),)


def test_subuid_is_read_as_newuidmap_reads_it(root):
    lines = ["fdbroker-test-50001:100000:65536", "50002:200000:10", "nobody-knows-me:300000:5", "# comment", "x:1", ""]
    lines += ["a:b:c", "fdbroker-test-50003:400000:0", f"50003:{INVALID_ID - 2}:99", "50003:4294967295:1", "a\r:5:5"]
    with replaced_file("/etc/subuid", "\n".join(lines)):
        assert names.Listed().subordinate_uids() == [
            (50001, 100000, 165535),
            (50002, 200000, 200009),
            (None, 300000, 300004),
            (50003, INVALID_ID - 2, INVALID_ID - 1),
            (None, 5, 9),
        ]
        table = names.Listed().owners()
        assert [table.of(uid) for uid in (50001, 100000, 200009, 300004, 0, os.getuid())] == [
            *(50001, 50001, 50002, 300000, 0, os.getuid())
        ]
    assert table != names.Listed().owners() or not Path("/etc/subuid").exists()


@pytest.mark.parametrize("path", ["/etc/passwd", "/etc/group", "/etc/subuid"])
def test_a_changed_file_is_seen(root, path):
    """Each of the three alone: who is a user, who is in a group, and whose the subordinate uids are."""
    with replaced_file(path, Path(path).read_text() if os.path.exists(path) else ""):
        before = names.databases()
        assert names.databases() == before
        with replaced_file(path, "x:1:1\n"):
            assert names.databases() != before
        assert names.databases() == before
