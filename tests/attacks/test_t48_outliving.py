"""T48: a process of the service that was taken over, or hangs, outlives it, with all that it has.

Started by hand: under systemd whatever is left in the control group is killed.
"""

from __future__ import annotations

import os
import signal
import time

import pytest
from harness import ALICE, MEM, node, running, status_of

POLICY = f"""
version: 1
users: {{{ALICE}: {{devices: [{{path: /dev/snd/pcm, access: rw}}], sockets: [{{namespace: vpn}}]}}}}
"""


@pytest.mark.parametrize("how", ["told to stop", "killed"])
def test_the_launchers_end_takes_all_with_it_although_they_do_nothing_any_more(dev, how):
    """What was taken over does not care that its links are closed either. Told to stop, it waits STOP_SECONDS for them."""
    node("/dev/snd/pcm", MEM["zero"])
    with running(POLICY) as broker:
        broker.expected_code = None
        others = {name: pid for name, pid in broker.pids.items() if name != "launcher"}
        assert sorted(others) == ["inbox", "keeper", "namespaces", "opener", "witness", "worker"]
        for pid in others.values():
            os.kill(pid, signal.SIGSTOP)
        broker.process.send_signal(signal.SIGTERM if how == "told to stop" else signal.SIGKILL)
        broker.process.wait(30)
        try:
            end = time.monotonic() + 10
            while left := [name for name, pid in others.items() if _runs(pid)]:
                assert time.monotonic() < end, left
                time.sleep(0.02)
        finally:
            for pid in others.values():
                if _runs(pid):
                    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("name", ["opener", "keeper", "inbox", "namespaces", "witness"])
def test_the_end_of_one_is_the_end_of_all(dev, name):
    node("/dev/snd/pcm", MEM["zero"])
    with running(POLICY) as broker:
        broker.expected_code = None
        others = {other: pid for other, pid in broker.pids.items() if other not in ("launcher", name)}
        for pid in others.values():
            os.kill(pid, signal.SIGSTOP)
        os.kill(broker.pids[name], signal.SIGKILL)
        assert broker.process.wait(30) == 70
        end = time.monotonic() + 10
        try:
            while left := [other for other, pid in others.items() if _runs(pid)]:
                assert time.monotonic() < end, left
                time.sleep(0.02)
        finally:
            for pid in others.values():
                if _runs(pid):
                    os.kill(pid, signal.SIGKILL)


def _runs(pid):
    try:
        return status_of(pid)["State"][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
