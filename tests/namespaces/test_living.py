"""Which namespaces still are, for a user that names its mounts as it likes."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from types import SimpleNamespace
from unittest import mock

import harness
import pytest
from harness import ALICE, BOB, CAROL
from subordinate import crowd

from fdbroker import limits
from fdbroker.kernel import processes
from fdbroker.namespaces import living
from fdbroker.terms import Namespace
from fdbroker.wire.worker import Ask


def test_a_mount_whose_path_has_ends_of_lines_in_it_is_one_mount(root):
    name = "a\rb\rc\x0bd\x85e"
    with harness.folder() as where:
        (where / name).mkdir()
        (where / "namespace").touch()
        harness.mount("x", str(where / name), "tmpfs")
        harness.mount("/proc/self/ns/net", str(where / "namespace"), "none", harness.MS_BIND)
        try:
            assert set(living._mounted(str(os.getpid()))) >= {os.stat("/proc/self/ns/net").st_ino}
        finally:
            harness.unmount(str(where / "namespace"))
            harness.unmount(str(where / name))


@pytest.fixture
def network(root):
    """An own network namespace of the machine's user namespace, held by a descriptor: its number."""
    before = os.open("/proc/self/ns/net", os.O_RDONLY)
    assert harness.LIBC.unshare(harness.CLONE_NEWNET) == 0
    held = os.open("/proc/self/ns/net", os.O_RDONLY)
    assert harness.LIBC.setns(before, harness.CLONE_NEWNET) == 0
    yield held
    for number in (before, held):
        os.close(number)


def ask(inode, *uids):
    return Ask(1, 5, Namespace("net"), 5, (inode,), 1, uids=tuple((uid, uid) for uid in uids))


def test_what_is_not_found_in_time_counts_as_living(monkeypatch):
    """LIVING_SECONDS: as many descriptors as one likes to have made it take five seconds of a CPU for each question."""
    assert living.living(ask(1, 0), time.monotonic() + 60) == set()
    assert living.living(ask(1, 0), time.monotonic()) == {1}
    monkeypatch.setattr(living, "_entered", lambda *_, **__: time.sleep(0.01) or ())
    began_s = time.monotonic()
    assert living.living(ask(1, 0), began_s + 0.2) == {1}
    assert time.monotonic() - began_s < 5


def test_a_thread_that_has_entered_one_holds_it(network):
    """Its process is elsewhere: 64 lived at the same time with a limit of 16."""
    inode, entered, done = os.fstat(network).st_ino, threading.Event(), threading.Event()
    number = os.dup(network)

    def enter():
        harness.LIBC.setns(number, harness.CLONE_NEWNET)
        entered.set()
        done.wait()

    thread = threading.Thread(target=enter)
    thread.start()
    try:
        assert entered.wait(30)
        with mock.patch.object(living, "_opened", return_value=()):
            assert living.living(ask(inode, 0), time.monotonic() + 60) == {inode}
    finally:
        done.set()
        thread.join()
        os.close(number)


def test_one_of_somebody_elses_with_the_same_number_does_not_count(network):
    """The kernel gives numbers again: root's new namespace was counted for a user, who was refused."""
    inode = os.fstat(network).st_ino
    child = os.fork()
    if child == 0:  # root's, and in it
        harness.LIBC.setns(network, harness.CLONE_NEWNET)
        signal.pause()
    try:
        assert living.living(ask(inode, 50_001), time.monotonic() + 60) == set()
        assert living.living(ask(inode, 0), time.monotonic() + 60) == {inode}
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@contextlib.contextmanager
def sleeping(*uids, count=1, holds=()):
    """So many processes with these real, effective and saved uids: their pids."""
    pids = []
    try:
        for _ in range(count):
            reading, writing = os.pipe()
            pids.append(os.fork())
            if pids[-1] == 0:
                for number in set(range(3, 1000)) - {writing, *holds}:
                    with contextlib.suppress(OSError):
                        os.close(number)
                os.setresuid(*uids)
                os.close(writing)
                signal.pause()
            os.close(writing)
            os.read(reading, 1)  # the end: it is that user
            os.close(reading)
        yield pids
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@pytest.fixture(params=["6.13", "older"])
def kernel(request, monkeypatch):
    """Whether uids are told without the groups."""
    if request.param == "older":
        monkeypatch.setattr(processes, "uids_of", lambda _: None)
    return request.param


@pytest.mark.parametrize("uids", [(BOB, 0, 0), (BOB, ALICE, ALICE), (0, ALICE, BOB), (ALICE, BOB, ALICE)])
def test_one_that_any_id_of_a_process_is_the_owners_of_counts(network, kernel, uids):
    """So it is while a user runs a setuid program, and holds what it gave to that."""
    inode = os.fstat(network).st_ino
    with sleeping(*uids, holds=[network]):
        assert living.living(ask(inode, BOB), time.monotonic() + 60) == {inode}
        assert living.living(ask(inode, CAROL), time.monotonic() + 60) == set()


@pytest.fixture
def slow(monkeypatch):
    """Processes that take so long to look at, on a clock that only they move; which of them were looked at."""
    now_s, took_s, looked = [0.0], {}, []
    uids_of, entered = living._uids, living._entered

    def uids(pid):
        if int(pid) in took_s:
            looked.append(int(pid))
            now_s[0] += took_s[int(pid)]
        return uids_of(pid)

    def slowly_entered(folder, *rest, its):
        if its and int(folder.split("/")[2]) in took_s:
            now_s[0] += took_s[int(folder.split("/")[2])]
        return entered(folder, *rest, its=its)

    monkeypatch.setattr(living, "time", SimpleNamespace(monotonic=lambda: now_s[0]))
    monkeypatch.setattr(living, "_uids", uids)
    monkeypatch.setattr(living, "_entered", slowly_entered)
    return took_s, looked


def test_other_users_that_take_long_to_look_at_do_not_count_for_the_owner(network, kernel, slow):
    """LIVING_OTHERS_MS: 400 idle processes in 65,536 groups each had every other user refused."""
    took_s, looked = slow
    inode = os.fstat(network).st_ino
    with sleeping(ALICE, ALICE, ALICE, count=5) as pids:
        took_s.update(dict.fromkeys(pids, limits.LIVING_OTHERS_MS / 1000 / 2))
        assert living.living(ask(inode, BOB), limits.LIVING_SECONDS) == set()
        assert len(looked) == 2
        took_s.update(dict.fromkeys(pids, limits.LIVING_SECONDS * 2))
        assert living.living(ask(inode, BOB), 2 * limits.LIVING_SECONDS) == set()
        assert len(looked) == 3
        with sleeping(BOB, BOB, BOB, holds=[network]), sleeping(ALICE, ALICE, ALICE):
            assert living.living(ask(inode, BOB), 10 * limits.LIVING_SECONDS) == {inode}
        assert len(looked) == 3  # the owner's come first


@pytest.mark.parametrize("uids", [(BOB, BOB, BOB), (BOB, 0, 0), (ALICE, 0, 0), (BOB, ALICE, ALICE)])
def test_the_owners_that_take_long_count_and_so_do_roots(kernel, slow, uids):
    """Or a user would have as many as it likes: it would hold so much that nobody sees all of it in time."""
    took_s, _ = slow
    with sleeping(*uids, count=2) as pids:
        took_s.update(dict.fromkeys(pids, limits.LIVING_SECONDS * 2))
        assert living.living(ask(1, BOB), limits.LIVING_SECONDS) == {1}


def test_groups_of_other_users_cost_the_owner_little(network, monkeypatch):
    """Where the kernel tells uids with the groups alone, by the time that all of them take in this run."""
    inode = os.fstat(network).st_ino
    with crowd(ALICE, 400) as pids:
        began_s = time.monotonic()
        assert living.living(ask(inode, BOB), began_s + 60) == set()
        took_s = time.monotonic() - began_s
        monkeypatch.setattr(processes, "uids_of", lambda _: None)
        looked, uids_of = [], living._uids
        monkeypatch.setattr(living, "_uids", lambda pid: looked.append(int(pid)) or uids_of(pid))
        assert living.living(ask(inode, BOB), time.monotonic() + 60) == set()
        assert not set(pids) <= set(looked)
        began_s = time.monotonic()
        for pid in pids[::20]:
            uids_of(pid)
        assert took_s < (time.monotonic() - began_s) * 20 / 2
