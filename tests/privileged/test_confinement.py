"""What each process keeps, read back from the kernel, and what a process in that confinement can still do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import harness
import pytest
from harness import EVERYONE_NULL, GROUP, MEM, ask, node, running, status_of

from fdbroker.launcher import start

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
            if name != "launcher":
                assert status["Seccomp"] == "2"
                uids = set(status["Uid"].split())
                assert len(uids) == 1
                assert int(uids.pop()) in range(61184, 65520)
        assert status_of(broker.pids["launcher"])["CapPrm"] == NONE
        assert status_of(broker.pids["inbox"])["CapPrm"] == NONE
        assert status_of(broker.pids["opener"])["Uid"] != status_of(broker.pids["inbox"])["Uid"]
        for name in ("opener", "inbox"):
            # dumpable off: what its user owns nowhere belongs to root here
            assert os.stat(f"/proc/{broker.pids[name]}/environ").st_uid == 0


# What an attacker inside would try, each with what must come of it. Run in a child with the real confinement.
INSIDE = r"""
import ctypes, errno, json, os, socket, sys
from fdbroker.kernel import confine, landlock, orders, capabilities, openat
from fdbroker.kernel import libc as ours
from fdbroker.launcher import filters
name, caps, files = sys.argv[1], frozenset(json.loads(sys.argv[2])), [tuple(one) for one in json.loads(sys.argv[3])]
filter_fd = filters.compile_filter(name)
libc = ctypes.CDLL(None, use_errno=True)
with_program = sys.argv[4] == "filter"
program = os.read(filter_fd, 1 << 16)
confine.confine(confine.Confinement(61200, 61200, (), caps, tuple(files), program if with_program else b"", os.getppid()))
bracket = capabilities.Bracket(caps)
all_capabilities = (capabilities._Data * 2)(capabilities._Data(0xFF, 0xFF, 0), capabilities._Data(0, 0, 0))
def outcome(action):
    try:
        result = action()
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error.errno))
    return "did it" if not isinstance(result, int) or result >= 0 else errno.errorcode.get(ctypes.get_errno(), "?")
def raised(action):
    def run():
        with bracket:
            return action()
    return run
def opening(path, flags):
    return lambda: os.close(os.open(path, flags))
tries = {
    "read /etc/shadow": raised(opening("/etc/shadow", os.O_RDONLY)),
    "read /etc/passwd": opening("/etc/passwd", os.O_RDONLY),
    "write a file": raised(opening("/tmp/fdbroker-evil", os.O_WRONLY | os.O_CREAT)),
    "write a file in /dev": raised(opening("/dev/snd/evil", os.O_WRONLY | os.O_CREAT)),
    "open an allowed node": raised(opening("/dev/snd/pcm", os.O_RDWR)),
    "open another node": raised(opening("/dev/other", os.O_RDWR)),
    "write to /proc": raised(opening("/proc/sys/kernel/core_pattern", os.O_WRONLY)),
    "signal the parent": lambda: os.kill(os.getppid(), 0),
    "become root": lambda: os.setuid(0),
    "execute": lambda: os.execv("/bin/true", ["true"]),
    "fork": os.fork,
    "make a socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM),
    "make a namespace": lambda: libc.unshare(0x10000000),
    "trace the parent": lambda: libc.ptrace(16, os.getppid(), 0, 0),
    "mount": lambda: libc.mount(b"none", b"/tmp", b"tmpfs", 0, None),
    "io_uring": lambda: libc.syscall(425, 8, 0),
    "bpf": lambda: libc.syscall(321, 0, 0, 0),
    "keyctl": lambda: libc.syscall(250, 0, 0),
    "regain a capability": lambda: ours.CAPSET(capabilities._HEADER_REF, ctypes.addressof(all_capabilities)),
    "make itself dumpable": lambda: libc.prctl(4, 1, 0, 0, 0),
    "write where messages are": lambda: os.close(os.open("/mnt/state/file", os.O_WRONLY | os.O_CREAT, 0o600)),
    "rename there": lambda: (os.close(os.open("/mnt/state/a", os.O_WRONLY | os.O_CREAT)), os.rename("/mnt/state/a", "/mnt/state/b"))[0],
    "link there": lambda: os.symlink("/etc/shadow", "/mnt/state/link"),
    "hard link there": lambda: os.link("/etc/hostname", "/mnt/state/link"),
    "make a folder there": lambda: os.mkdir("/mnt/state/folder"),
    "make it set-uid": lambda: os.chmod("/mnt/state/messages.sqlite", 0o4755),
    "write beside it": lambda: os.close(os.open("/mnt/state/../evil", os.O_WRONLY | os.O_CREAT)),
    "start a thread": lambda: (lambda t: (t.start(), t.join(), 0)[2])(__import__("threading").Thread(target=lambda: None)),
    "start a process by clone": lambda: libc.syscall(56, 17, 0, 0, 0, 0),
}
print(outcome(tries[sys.argv[5]]), flush=True)
"""

KILLED = "SIGSYS"
# (process, what it tries) -> what the kernel says, with the seccomp filter
EXPECTED = {
    "read /etc/shadow": {"opener": "EACCES", "inbox": "EPERM"},
    "read /etc/passwd": {"opener": "EACCES", "inbox": "EPERM"},
    "write a file": {"opener": "EACCES", "inbox": "EPERM"},
    "write a file in /dev": {"opener": "EACCES", "inbox": "EPERM"},
    "open an allowed node": {"opener": "did it", "inbox": "EPERM"},
    "open another node": {"opener": "EACCES", "inbox": "EPERM"},
    "write to /proc": {"opener": "EACCES", "inbox": "EPERM"},
    "signal the parent": {"opener": "EPERM", "inbox": "EPERM"},
    "become root": {"opener": KILLED, "inbox": KILLED},
    "execute": {"opener": KILLED, "inbox": KILLED},
    "fork": {"opener": "EPERM", "inbox": "EPERM"},
    "make a socket": {"opener": KILLED, "inbox": KILLED},
    "make a namespace": {"opener": KILLED, "inbox": KILLED},
    "trace the parent": {"opener": KILLED, "inbox": KILLED},
    "mount": {"opener": KILLED, "inbox": KILLED},
    "io_uring": {"opener": KILLED, "inbox": KILLED},
    "bpf": {"opener": KILLED, "inbox": KILLED},
    "keyctl": {"opener": KILLED, "inbox": KILLED},
    "regain a capability": {"opener": "EPERM", "inbox": "EPERM"},
    "make itself dumpable": {"opener": "EPERM", "inbox": "EPERM"},
}
# The same without the filter: the other mechanisms hold by themselves.
WITHOUT_FILTER = {
    "read /etc/shadow": "EACCES",
    "write a file": "EACCES",
    "write a file in /dev": "EACCES",
    "open another node": "EACCES",
    "become root": "EPERM",
    "execute": "EACCES",
    "trace the parent": "EPERM",
    "mount": "EPERM",
    "regain a capability": "EPERM",
    "signal the parent": "EPERM",
}


# The inbox that stores messages: it opens files, in one folder.
STORING = {
    "read /etc/shadow": "EACCES",
    "read /etc/passwd": "EACCES",
    "write a file": "EACCES",
    "write a file in /dev": "EACCES",
    "open an allowed node": "EACCES",
    "write to /proc": "EACCES",
    "signal the parent": "EPERM",
    "become root": KILLED,
    "execute": KILLED,
    "fork": "EPERM",
    "make a socket": KILLED,
    "make a namespace": KILLED,
    "trace the parent": KILLED,
    "mount": KILLED,
    "regain a capability": "EPERM",
    "make itself dumpable": "EPERM",
    "write where messages are": "did it",
    "rename there": "did it",
    "link there": "EPERM",
    "hard link there": "EPERM",
    "make a folder there": "EPERM",
    "make it set-uid": "EPERM",
    "write beside it": "EACCES",
    "start a thread": "did it",
    "start a process by clone": "EPERM",
}


def _inside(process, what, program="filter"):
    if os.uname().machine != "x86_64":
        harness.cannot("the numbers of the system calls here are x86_64's")
    caps = ["CAP_DAC_OVERRIDE"] if process == "opener" else []
    files = {"opener": [["/dev/snd", 2 | 4 | 8], ["/proc", 4]], "inbox-store": [["/mnt/state", start.STATE_RIGHTS]]}
    files = files.get(process, [])
    code = [sys.executable, "-I", "-c", INSIDE, process, json.dumps(caps), json.dumps(files), program, what]
    result = subprocess.run(code, capture_output=True, text=True)
    if result.returncode < 0:
        return {-31: KILLED}.get(result.returncode, str(result.returncode))
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[0]


@pytest.mark.parametrize("process", ["opener", "inbox"])
@pytest.mark.parametrize("what", EXPECTED)
def test_what_a_taken_over_process_can_do(dev, process, what):
    node("/dev/snd/pcm", MEM["zero"])
    node("/dev/other", MEM["zero"])
    assert _inside(process, what) == EXPECTED[what][process]
    assert not os.path.exists("/tmp/fdbroker-evil")


@pytest.mark.parametrize("what", STORING)
def test_what_a_taken_over_inbox_that_stores_can_do(dev, what):
    node("/dev/snd/pcm", MEM["zero"])
    os.mkdir("/mnt/state", 0o700)
    try:
        Path("/mnt/state/messages.sqlite").touch()
        for path in ("/mnt/state", "/mnt/state/messages.sqlite"):
            os.chown(path, 61200, 61200)
        assert _inside("inbox-store", what) == STORING[what]
        assert not os.path.exists("/mnt/evil")
        assert not os.path.exists("/tmp/fdbroker-evil")
    finally:
        shutil.rmtree("/mnt/state")


@pytest.mark.parametrize("what", WITHOUT_FILTER)
def test_no_mechanism_stands_alone(dev, what):
    node("/dev/snd/pcm", MEM["zero"])
    node("/dev/other", MEM["zero"])
    assert _inside("opener", what, "none") == WITHOUT_FILTER[what]


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
