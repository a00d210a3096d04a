"""Which namespaces still are, for a user that names its mounts as it likes."""

from __future__ import annotations

import os
import signal
import threading
import time
from unittest import mock

import harness
import pytest

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
