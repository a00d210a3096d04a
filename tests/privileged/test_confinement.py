"""What each process keeps, read back from the kernel. What can be done with it: test_taken_over.py."""

from __future__ import annotations

import os
import time

import pytest
from harness import EVERYONE_NULL, GROUP, MEM, ask, node, running, status_of

NONE = "0" * 16
ROOTS_ONLY = 'version: 1\neveryone: {devices: [{path: "/dev/snd/*", access: rw}]}\n'


def test_capabilities_follow_from_the_policy(dev):
    node("/dev/snd/pcm", MEM["zero"])
    with running(EVERYONE_NULL) as broker:
        assert status_of(broker.pids["opener"])["CapPrm"] == NONE
    with running(ROOTS_ONLY) as broker:
        assert int(status_of(broker.pids["opener"])["CapPrm"], 16) == 1 << 1  # CAP_DAC_OVERRIDE
    with running(ROOTS_ONLY.replace("rw", "ro")) as broker:
        assert int(status_of(broker.pids["opener"])["CapPrm"], 16) == 1 << 2  # CAP_DAC_READ_SEARCH
        assert ask(broker.socket, "/dev/snd/pcm") == "granted"
    os.chown("/dev/snd/pcm", 0, GROUP)
    os.chmod("/dev/snd/pcm", 0o660)
    with running(ROOTS_ONLY) as broker:
        status = status_of(broker.pids["opener"])
        assert status["CapPrm"] == NONE
        assert status["Groups"].split() == [str(GROUP)]
        assert ask(broker.socket, "/dev/snd/pcm", access="rw") == "granted"


def test_nothing_is_effective_but_while_a_node_is_opened(dev):
    node("/dev/snd/pcm", MEM["zero"])
    with running(ROOTS_ONLY) as broker:
        for _ in range(20):
            assert ask(broker.socket, "/dev/snd/pcm") == "granted"
            assert ask(broker.socket, "/dev/none") == "Denied"
            for name in broker.pids:
                assert status_of(broker.pids[name])["CapEff"] == NONE


def test_what_the_kernel_says_of_the_three(dev):
    with running(ROOTS_ONLY) as broker:
        for name, pid in broker.pids.items():
            status = status_of(pid)
            for kind in ("CapInh", "CapEff", "CapBnd", "CapAmb"):
                assert status[kind] == NONE, (name, kind)
            assert status["NoNewPrivs"] == "1"
            assert status["Threads"] == "1"
            assert status["Seccomp"] == "2"
            if name != "launcher":
                uids = set(status["Uid"].split())
                assert len(uids) == 1
                assert int(uids.pop()) in range(61184, 65520)
        assert status_of(broker.pids["launcher"])["CapPrm"] == NONE
        assert status_of(broker.pids["inbox"])["CapPrm"] == NONE
        assert status_of(broker.pids["opener"])["Uid"] != status_of(broker.pids["inbox"])["Uid"]
        for name in ("opener", "inbox"):
            # dumpable off: what its user owns nowhere belongs to root here
            assert os.stat(f"/proc/{broker.pids[name]}/environ").st_uid == 0


@pytest.mark.parametrize("victim", ["launcher", "opener", "inbox"])
def test_when_one_dies_all_end_and_the_service_fails(dev, victim):
    with running(EVERYONE_NULL) as broker:
        broker.expected_code = None
        os.kill(broker.pids[victim], 9)
        code = broker.process.wait(10)
        assert code == (-9 if victim == "launcher" else 70), broker.text()
        for pid in broker.pids.values():
            for _ in range(200):
                if not os.path.exists(f"/proc/{pid}") or status_of(pid)["State"].startswith("Z"):
                    break
                time.sleep(0.02)
            else:
                raise AssertionError(f"{pid} still runs")
        if victim != "launcher":
            assert f"the {victim} ended with signal 9" in broker.text() or "ended with" in broker.text()
