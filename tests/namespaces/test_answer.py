"""What a child abroad finds out before it makes a namespace."""

from __future__ import annotations

import os
import signal

from harness import folder, need_count_of_mounts

from fdbroker.kernel import namespaces
from fdbroker.kernel.pinned import Process
from fdbroker.namespaces.answer import count_mounts


def _count(most, pid=None):
    pid = os.getpid() if pid is None else pid
    descriptor = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY)
    try:
        with Process(pid) as process:
            return count_mounts(process.folder, descriptor, most)
    finally:
        os.close(descriptor)


def test_mounts_are_counted_as_far_as_anybody_wants_to_know(monkeypatch):
    with open("/proc/self/mountinfo", "rb") as file:
        count = len(file.readlines())
    assert _count(10_000) == count
    monkeypatch.setattr(namespaces, "mounts_in", lambda _: None)  # as before Linux 6.12
    assert _count(10_000) == count
    assert count >= _count(1) > 1


def test_mounts_count_that_a_process_does_not_see(root):
    """All of its mount namespace is copied, and it sees those below its root."""
    need_count_of_mounts()
    reading, writing = os.pipe()
    with folder() as empty:
        child = os.fork()
        if child == 0:
            os.chroot(empty)
            os.write(writing, b"x")
            signal.pause()
        try:
            os.read(reading, 1)
            with open(f"/proc/{child}/mountinfo") as file:
                assert file.read() == ""
            assert _count(10_000, child) == _count(10_000)
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(reading)
            os.close(writing)
