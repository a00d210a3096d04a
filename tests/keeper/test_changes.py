"""When lists are made again: once for many changes, later for changes that change nothing, and not without any."""

from __future__ import annotations

import os
import select

import pytest

from fdbroker.keeper import changes
from fdbroker.keeper.changes import Changes
from fdbroker.kernel import inotify


@pytest.fixture
def made():
    one = Changes()
    yield one
    os.close(one.descriptor)


def test_without_a_change_there_is_nothing_to_do(made):
    assert (made.waiting, made.timeout_s(0.0)) == (False, -1)
    assert not made.take(1e9, news=False)


def test_changes_that_come_together_are_one(made):
    made.note(10.0)
    assert made.waiting
    assert made.timeout_s(10.0) == pytest.approx(changes._SETTLE_S)
    assert not made.take(10.05, news=False)
    assert made.take(10.1, news=False)
    assert made.timeout_s(10.1) == changes._MOUNT_S  # once more, for what is mounted a moment later
    assert not made.take(12.0, news=False)
    assert made.take(12.1, news=False)
    assert (made.waiting, made.timeout_s(12.1)) == (False, -1)


@pytest.mark.parametrize(("news", "waits_s"), [(True, [0.1] * 6), (False, [0.1, 0.2, 0.4, 0.8, 1.6, 2.0])])
def test_changes_that_change_no_list_are_looked_at_more_and_more_rarely(made, news, waits_s):
    """A user with write access can change a node's times at any rate."""
    now_s, waited_s = 10.0, []
    for _ in waits_s:
        made.note(now_s)
        waited_s.append(made.timeout_s(now_s))
        now_s += waited_s[-1] + 1e-6
        assert made.take(now_s, news=news)
    assert waited_s == pytest.approx(waits_s)


def test_after_a_quiet_time_a_change_is_looked_at_soon(made):
    now_s = 10.0
    for _ in range(5):
        made.note(now_s)
        now_s += made.timeout_s(now_s) + 1e-6
        assert made.take(now_s, news=False)
    made.note(now_s + changes._SETTLE_MOST_S - 0.1)
    assert made.timeout_s(now_s + changes._SETTLE_MOST_S - 0.1) > 1
    made.note(now_s + changes._SETTLE_MOST_S + 0.1)
    assert made.timeout_s(now_s + changes._SETTLE_MOST_S + 0.1) == pytest.approx(changes._SETTLE_S)


def test_what_is_taken_is_told_no_more_and_what_comes_then_is(made, tmp_path):
    inotify.watch_directory(made.descriptor, str(tmp_path))
    (tmp_path / "a").touch()
    assert select.select([made.descriptor], [], [], 5)[0]
    made.note(10.0)
    assert made.take(11.0, news=True)
    assert not select.select([made.descriptor], [], [], 0)[0]
    (tmp_path / "b").touch()
    assert select.select([made.descriptor], [], [], 5)[0]
