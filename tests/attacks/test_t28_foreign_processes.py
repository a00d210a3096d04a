"""T28: the namespace of a process that is not the caller's, or is not any more when the descriptor leaves."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time

import pytest
from harness import (
    ALICE,
    CLONE_NEWNET,
    CLONE_NEWUSER,
    GROUP,
    LIBC,
    NO_RATES,
    Raw,
    as_user,
    outcome,
    own_network,
    running,
)

from fdbroker.errors import Denied
from fdbroker.kernel.capabilities import Bracket
from fdbroker.limits import every as limits
from fdbroker.namespaces.answer import _Work
from fdbroker.opener.authorize import Account, Connection, Flight
from fdbroker.opener.close import Closing
from fdbroker.opener.open import Nodes
from fdbroker.opener.request import WORKER, Opening, answer
from fdbroker.opener.views import Seen
from fdbroker.terms import Grant, Namespace, NamespaceRule, Subject
from fdbroker.wire.worker import Ask, Wanted

_PR_SET_DUMPABLE = 4  # linux/prctl.h
POLICY = f"version: 1\ngroups: {{{GROUP}: {{namespaces: [{{type: net, of: caller}}]}}}}\n"


def _ask_while_it_changes(address, seconds):
    """What was granted of a process that runs, again and again, a setuid program with a network of its own."""
    own = os.stat("/proc/self/ns/net").st_ino
    counts = {"own": 0, "foreign": 0, "Denied": 0}
    end = time.monotonic() + seconds
    with Raw(address) as client:
        while time.monotonic() < end:
            # a moment as itself, then setuid and elsewhere, under the same pid
            wait = "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done"  # some milliseconds
            script = f"{wait}; exec {os.path.dirname(address)}/unshare -n sleep 0.02"
            process = subprocess.Popen(["sh", "-c", script], stdin=subprocess.DEVNULL)
            while process.poll() is None:
                word = outcome(client.ask({"namespace": {"type": "net", "pid": process.pid}}))
                if word == "granted":
                    number = client.take()
                    word = "own" if os.fstat(number).st_ino == own else "foreign"
                    os.close(number)
                counts[word] += 1
    return counts


def test_a_process_that_becomes_a_setuid_program_is_never_followed_there(root):
    with own_network(), running(POLICY + NO_RATES) as broker:
        program = broker.folder / "unshare"
        shutil.copy("/usr/bin/unshare", program)
        program.chmod(0o4755)
        counts = as_user(ALICE, [GROUP], _ask_while_it_changes, broker.socket, 3)
        assert counts["foreign"] == 0
        assert counts["own"] > 0
        assert counts["Denied"] > 0


def _open(address, pid):
    with Raw(address) as client:
        return outcome(client.ask({"namespace": {"type": "net", "pid": pid}}))


@contextlib.contextmanager
def _dropped(*, own, again):
    """A process with a network namespace of root's that has become ALICE's by setresuid(2), as a setuid program does.

    `own`: in a user namespace that it made then; `again`: it has made itself dumpable.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            assert LIBC.unshare(CLONE_NEWNET) == 0
            os.setgroups([])
            os.setresgid(ALICE, ALICE, ALICE)
            os.setresuid(ALICE, ALICE, ALICE)
            assert not own or LIBC.unshare(CLONE_NEWUSER) == 0
            if again:
                LIBC.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)
            os.write(writing, b"x")
            signal.pause()
        finally:
            os._exit(1)
    os.close(writing)
    try:
        assert os.read(reading, 1)
        if own:
            for name in ("uid_map", "gid_map"):
                with open(f"/proc/{child}/{name}", "w") as file:
                    file.write(f"0 {ALICE} 1\n")
        yield child
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize("own", [False, True])
def test_a_setuid_program_that_has_dropped_its_rights_is_not_the_callers(root, own):
    """All its ids are the caller's, it has no capability, and the caller itself may not look into it."""
    with own_network(), running(POLICY + NO_RATES) as broker:
        with _dropped(own=own, again=False) as pid:
            assert as_user(ALICE, [GROUP], _open, broker.socket, pid) == "Denied"
        with _dropped(own=own, again=True) as pid:
            assert as_user(ALICE, [GROUP], _open, broker.socket, pid) == "granted"


def test_a_process_of_a_container_is_the_callers_dumpable_or_not(root):
    """Its program was started in the caller's user namespace, whose root the caller is."""
    script = f"import ctypes, time; ctypes.CDLL(None).prctl({_PR_SET_DUMPABLE}, 0, 0, 0, 0); print(flush=True); time.sleep(60)"
    command = ["unshare", "-Urn", "/usr/bin/python3", "-c", script]
    with own_network(), running(POLICY + NO_RATES) as broker:
        process = subprocess.Popen(command, user=ALICE, group=ALICE, extra_groups=[], stdout=subprocess.PIPE)
        with process:
            try:
                assert process.stdout.readline()
                assert as_user(ALICE, [GROUP], _open, broker.socket, process.pid) == "granted"
            finally:
                process.kill()


MAXIMA = {name: limit.default for name, limit in limits.USER_LIMITS.items()}


@pytest.mark.parametrize("alive", [True, False])
def test_a_process_that_ended_meanwhile_is_no_reason_for_a_grant(alive):
    """The worker has answered; then, before anything leaves, the process ends."""
    process = subprocess.Popen(["sleep", "60"])
    pidfd, namespace = os.pidfd_open(process.pid), os.open("/proc/self/ns/net", os.O_RDONLY)
    sent = []
    resource = Namespace("net", pid=process.pid)
    rule = NamespaceRule(("net",), "", True, False, None, "everyone", "f:1")
    opening = Opening(_connection(sent, rule), [resource], Closing())
    nodes = Nodes(Bracket(frozenset()))
    steps = answer(opening, nodes, _Nothing())
    try:
        assert next(steps) == WORKER
        opening.descriptors[0], opening.owners[0] = namespace, pidfd
        opening.grants[0] = Grant(resource, rule)
        if not alive:
            process.kill()
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(StopIteration) as end:
            next(steps)
        refusal = end.value.value
        assert (type(refusal) if refusal else None) == (None if alive else Denied)
        assert sent == ([1] if alive else [])
        opening.close()
        end_s = time.monotonic() + 30
        for descriptor in (pidfd, namespace):
            while os.path.exists(f"/proc/self/fd/{descriptor}"):  # a thread may close it
                assert time.monotonic() < end_s
    finally:
        nodes.close()
        process.kill()
        process.wait()


def test_process_1_is_nobodys_to_ask_for_whatever_the_kernel_would_show_of_it():
    work = _Work(Ask(1, 0, 0, (Wanted(Namespace("net", pid=1)),)), None, frozenset(), 0.0, frozenset())
    with pytest.raises(Denied, match="process 1"):
        work.pid_here(1, None)
    assert work.pid_here(2, None) == 2


class _Nothing:
    """An audit that has nothing to do here."""

    def __getattr__(self, name):
        return lambda *arguments, **named: None


class _Socket:
    def __init__(self, sent):
        self.sent = sent

    def sendmsg(self, data, ancillary, flags):
        self.sent.append(len(ancillary))
        return len(data[0])


class _Connection(Connection):
    def note_sent(self, size, grants):
        pass

    def unread_grants(self):
        return 0


def _connection(sent, rule):
    subject = Subject(ALICE, frozenset(), ALICE, 1, "", "", foreign=True)
    connection = _Connection(
        1,
        _Socket(sent),
        subject,
        Seen((), (rule,), (), MAXIMA, administrator=False),
        Account(MAXIMA, 0.0),
        Flight(100),
    )
    return connection
