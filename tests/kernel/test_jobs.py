"""Jobs: in order for one owner, side by side for several, and never more threads than allowed."""

from __future__ import annotations

import threading
import time

import pytest

from fdbroker.kernel.jobs import Jobs
from fdbroker.limits import every as limits


def wait_for(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_the_jobs_of_one_owner_are_done_one_after_the_other_in_order():
    jobs, done, running = Jobs(8), [], []

    def job(number):
        running.append(number)
        assert len(running) == 1
        time.sleep(0.001)
        done.append(number)
        running.pop()

    for number in range(50):
        jobs.put(5, lambda number=number: job(number))
    wait_for(lambda: len(done) == 50)
    assert done == list(range(50))


def test_a_slow_owner_holds_up_nobody_else():
    jobs, go_on, done = Jobs(4), threading.Event(), []
    for _ in range(20):
        jobs.put(5, go_on.wait)
    for owner in range(100, 140):
        jobs.put(owner, lambda owner=owner: done.append(owner))
    wait_for(lambda: len(done) == 40)
    go_on.set()
    wait_for(lambda: jobs._threads == 0)


@pytest.mark.parametrize("most", [limits.OPENING_THREADS, limits.CLOSING_THREADS])
def test_no_more_threads_than_allowed(most):
    """The next owner waits, and is served when a thread is free."""
    jobs, go_on, begun = Jobs(most), threading.Event(), []
    for owner in range(most + 1):
        jobs.put(owner, lambda owner=owner: (begun.append(owner), go_on.wait()))
    wait_for(lambda: len(begun) == most)
    time.sleep(0.05)
    assert len(begun) == jobs._threads == most
    go_on.set()
    wait_for(lambda: len(begun) == most + 1)
    wait_for(lambda: jobs._threads == 0)


def test_owners_with_many_jobs_take_turns():
    jobs, go_on, done = Jobs(1), threading.Event(), []
    jobs.put(9, go_on.wait)
    for owner in (5, 6):
        for number in range(3):
            jobs.put(owner, lambda one=(owner, number): done.append(one))
    go_on.set()
    wait_for(lambda: len(done) == 6)
    assert done == [(5, 0), (6, 0), (5, 1), (6, 1), (5, 2), (6, 2)]


def test_without_a_thread_the_next_start_does_it(monkeypatch):
    jobs, done = Jobs(2), []

    def refuse(*_, **__):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading, "Thread", refuse)
        jobs.put(5, lambda: done.append(1))
        assert jobs._threads == 0
    jobs.start()
    wait_for(lambda: done == [1])


# ---- jobs that do not end


def test_what_ends_a_job_may_be_the_owners_next_one():
    jobs, go_on, done = Jobs(4, limits.STUCK_THREADS), threading.Event(), []
    jobs.put(5, lambda: (go_on.wait(), done.append("first")))
    jobs.put(5, go_on.set)
    began_s = time.monotonic()
    wait_for(lambda: done)
    assert time.monotonic() - began_s >= limits.STUCK_SECONDS * 0.9  # not before: jobs are done in order
    wait_for(lambda: jobs._threads == 0)


def test_when_as_many_owners_are_stuck_as_there_are_threads_others_are_served():
    jobs, go_on, done = Jobs(4, limits.STUCK_THREADS), threading.Event(), []
    for owner in range(8):
        jobs.put(owner, go_on.wait)
    jobs.put(99, lambda: done.append(99))
    wait_for(lambda: done)
    assert len(jobs._running) >= 4
    go_on.set()
    wait_for(lambda: jobs._threads == 0)


def test_so_many_jobs_may_be_stuck_and_a_quarter_of_one_owner(monkeypatch):
    """And the last quarter is for owners that have none: a few owners do not take all threads."""
    monkeypatch.setattr("fdbroker.kernel.jobs._STUCK_S", 0.01)
    most = 16  # limits.STUCK_THREADS, in small
    jobs, go_on, begun = Jobs(2, most), threading.Event(), []

    def put(owner):
        jobs.put(owner, lambda: (begun.append(owner), go_on.wait()))

    for owner in range(3):
        for _ in range(most):
            put(owner)
    wait_for(lambda: len(begun) == limits.shared(most))
    time.sleep(0.2)
    assert sorted(begun) == [0] * (most // 4) + [1] * (most // 4) + [2] * (most // 4)
    for owner in range(3, 20):
        put(owner)
    wait_for(lambda: len(begun) == most + 2)  # two more run that count
    time.sleep(0.2)
    assert len(begun) == most + 2
    go_on.set()
    wait_for(lambda: len(begun) == 3 * most + 17 and jobs._threads == 0)
