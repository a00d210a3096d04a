"""What a child abroad finds out before it makes a namespace."""

from __future__ import annotations

import os

from fdbroker.kernel.processes import Process
from fdbroker.namespaces.answer import count_mounts


def test_mounts_are_counted_as_far_as_anybody_wants_to_know():
    with open("/proc/self/mountinfo", "rb") as file:
        count = len(file.readlines())
    with Process(os.getpid()) as process:
        assert count_mounts(process, 10_000) == count
        assert count >= count_mounts(process, 1) > 1
