"""What each process keeps, read back from the kernel. What can be done with it: test_taken_over.py."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest
from harness import (
    ALICE,
    EVERYONE_NULL,
    GROUP,
    MEM,
    MS_BIND,
    Broker,
    ask,
    descriptors_of,
    folder,
    mount,
    node,
    refusing,
    running,
    status_of,
    taken_over,
    unmount,
)

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


def test_it_runs_from_a_checkout_in_a_home_that_is_closed_to_others(dev):
    """Root without capabilities may not enter a user's home of mode 0700, which is Debian's default."""
    top, environment = Path(__file__).parents[2], Path(sys.prefix)
    with folder() as where:
        home = where / "home"
        checkout = home / "fdbroker"
        checkout.mkdir(parents=True)
        mount(str(top), str(checkout), "none", MS_BIND)
        os.chown(home, ALICE, ALICE)
        os.chmod(home, 0o700)
        python = str(checkout / environment.relative_to(top) / "bin/python")
        start = f"import os, sys; os.execv({python!r}, [{python!r}, '-I', '-m', 'fdbroker', *sys.argv[1:]])"
        try:
            with running(EVERYONE_NULL, program=("-c", start)) as broker:
                assert ask(broker.socket, "/dev/null") == "granted"
                broker.reload(EVERYONE_NULL)
                assert ask(broker.socket, "/dev/null") == "granted"
        finally:
            unmount(str(checkout))


def test_nothing_is_effective_but_while_a_node_is_opened(dev):
    node("/dev/snd/pcm", MEM["zero"])
    with running(ROOTS_ONLY) as broker:
        for _ in range(20):
            assert ask(broker.socket, "/dev/snd/pcm") == "granted"
            assert ask(broker.socket, "/dev/none") == "Denied"
            for name in broker.pids:
                assert status_of(broker.pids[name])["CapEff"] == NONE


WITH_WORKER = ROOTS_ONLY.replace("]}\n", "], namespaces: [{type: uts, create: true}]}\n")


def test_what_the_kernel_says_of_each(dev):
    with running(WITH_WORKER) as broker:
        assert set(broker.pids) == {"launcher", "opener", "keeper", "inbox", "witness", "namespaces", "worker"}
        for name, pid in broker.pids.items():
            status = status_of(pid)
            for kind in ("CapInh", "CapEff", "CapBnd", "CapAmb"):
                assert status[kind] == NONE, (name, kind)
            assert status["NoNewPrivs"] == "1"
            assert status["Threads"] == "1"
            assert status["Seccomp"] == "2"
            uids = set(status["Uid"].split())
            assert len(uids) == 1
            roots = name in ("launcher", "witness")
            assert int(uids.pop()) in ([0] if roots else range(61184, 65520))
        for name in ("launcher", "keeper", "inbox"):
            assert status_of(broker.pids[name])["CapPrm"] == NONE
        assert int(status_of(broker.pids["witness"])["CapPrm"], 16) == 1 << 19  # CAP_SYS_PTRACE
        assert len({status_of(broker.pids[name])["Uid"] for name in ("opener", "keeper", "inbox", "worker")}) == 4
        for name in ("opener", "keeper", "inbox", "witness", "worker"):
            # dumpable off: what its user owns nowhere belongs to root here
            assert os.stat(f"/proc/{broker.pids[name]}/environ").st_uid == 0


def test_the_keeper_may_list_the_folders_of_the_rules_and_nothing_else(dev):
    """Its orders, which test_taken_over.py tries; whoever is root reads them back from the command line."""
    node("/dev/snd/pcm", MEM["zero"])
    os.chown("/dev/snd/pcm", 0, GROUP)
    os.chmod("/dev/snd/pcm", 0o660)
    node("/dev/input/event0", MEM["zero"])
    devices = '[{path: "/dev/snd/*", access: rw}, {path: "/dev/input/*"}, {path: /dev/null}]'
    rules = f'devices: {devices}, namespaces: [{{type: net, name: "*"}}]'
    with running(f"version: 1\neveryone: {{{rules}}}\n") as broker:
        orders = {}
        for name in ("opener", "keeper"):
            words = Path(f"/proc/{broker.pids[name]}/cmdline").read_bytes().split(b"\0")
            orders[name] = json.loads(next(word for word in words if word.startswith(b"{")))
        opener, keeper = orders["opener"], orders["keeper"]
        assert (opener["groups"], opener["capabilities"]) == ([GROUP], ["CAP_DAC_READ_SEARCH"])
        assert (keeper["groups"], keeper["capabilities"]) == ([], [])
        places = sorted(path for path, _ in opener["files"])
        assert places == ["/dev/input", "/dev/null", "/dev/snd", "/proc", "/run"]
        assert sorted(keeper["files"]) == [
            ["/dev/input", 8],
            ["/dev/snd", 8],
            ["/run", 8],
        ]  # LANDLOCK_ACCESS_FS_READ_DIR
        assert set(keeper["descriptors"]) == {"launcher", "opener", "inbox", "policy", "filter"}


def test_what_the_kernel_says_of_the_refuser(dev):
    with folder() as where, refusing(where) as (broker, pid):
        status = status_of(pid)
        for kind in ("CapPrm", "CapInh", "CapEff", "CapBnd", "CapAmb"):
            assert status[kind] == NONE, kind
        assert (status["NoNewPrivs"], status["Threads"], status["Seccomp"]) == ("1", "1", "2")
        assert status["Groups"].split() == []
        (uid,) = set(status["Uid"].split())
        assert int(uid) in range(61184, 65520)
        assert os.stat(f"/proc/{pid}/environ").st_uid == 0  # not dumpable
        descriptors = sorted(what.partition(":")[0] for what in descriptors_of(pid).values())
        assert descriptors == sorted([*["/dev/null"] * 2, str(broker.log), "socket", "socket"])


def test_no_child_keeps_the_groups_of_the_root_that_started_it(dev):
    """A login of root's has groups, its own at least, and may have those of an admin."""
    program = "import os, sys; os.setgroups([0, 27]); from fdbroker.cli import main; sys.exit(main())"
    with running(EVERYONE_NULL, program=("-c", program)) as broker:
        for name, pid in broker.pids.items():
            assert status_of(pid)["Groups"].split() == (["0", "27"] if name == "launcher" else []), name
        assert ask(broker.socket, "/dev/null") == "granted"


@pytest.mark.parametrize("victim", ["launcher", "opener", "keeper", "inbox", "witness"])
def test_when_one_dies_all_end_and_the_service_fails(dev, victim):
    with running(EVERYONE_NULL) as broker:
        broker.expected_code = None
        os.kill(broker.pids[victim], 9)
        code = broker.process.wait(60)
        assert code == (-9 if victim == "launcher" else 70), broker.text()
        for pid in broker.pids.values():
            for _ in range(200):
                if not os.path.exists(f"/proc/{pid}") or status_of(pid)["State"].startswith("Z"):
                    break
                time.sleep(0.02)
            else:
                raise AssertionError(f"{pid} still runs")
        if victim != "launcher":
            assert "ended with" in broker.text()


BUSY = """

def _work():
    import time
    while True:
        time.sleep(0.00001)

_make = Jobs.__init__

def _made(self, *arguments):
    _make(self, *arguments)
    threading.Thread(target=_work, daemon=True).start()

Jobs.__init__ = _made
"""


@pytest.fixture
def busy_threads():
    """Opener and inbox have a thread that never rests."""
    jobs = Path(__file__).parents[2] / "fdbroker/kernel/jobs.py"
    with folder() as where:
        (where / "jobs.py").write_text(jobs.read_text() + BUSY)
        mount(str(where / "jobs.py"), str(jobs), "none", MS_BIND)
        try:
            yield
        finally:
            unmount(str(jobs))


@pytest.mark.parametrize("how", ["told to stop", "the opener killed", "the inbox killed"])
def test_a_thread_that_still_works_does_not_change_how_a_process_ends(dev, busy_threads, how):
    """A thread that the interpreter ends would load a library, which Landlock refuses, and then abort."""
    for _ in range(3):
        with running(EVERYONE_NULL) as broker:
            assert int(status_of(broker.pids["opener"])["Threads"]) > 1
            assert int(status_of(broker.pids["inbox"])["Threads"]) > 1
            if how == "told to stop":
                code = broker.stop()
            else:
                os.kill(broker.pids[how.split()[1]], 9)
                code = broker.process.wait(60)
            broker.expected_code = None
            assert "SIGSEGV" not in broker.text()
            assert code == (0 if how == "told to stop" else 70), broker.text()


INBOX = """
class Inbox:
    def __init__(self, launcher, opener, keeper, policy, topics, unit_s):
        self.launcher = launcher

    def serve(self):
        self.launcher.send(link.READY)
        os.open("/etc/passwd", 0)
"""


def test_a_call_that_a_filter_refuses_ends_a_process_that_says_its_name(dev):
    with taken_over("inbox/service.py", INBOX), folder() as where:
        broker = Broker(where, EVERYONE_NULL)
        try:
            assert broker.process.wait(60) == 70
        finally:
            broker.process.kill()
            broker.process.wait()
        said = "fdbroker: the inbox failed with PermissionError; a system call that its seccomp filter does not allow"
        assert said in broker.text()
        assert "/etc/passwd" in broker.text()
        assert "ended with exit code" in broker.text()
