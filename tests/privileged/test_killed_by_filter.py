"""In a running service, each process does a system call that its filter kills for: what the admin is told.

The filter is the real one but for one call, as after an update of Python or of the C library that begins to make it.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from typing import NamedTuple

import pytest
from harness import (
    ALICE,
    PATIENCE_S,
    Broker,
    Raw,
    activated,
    as_user,
    cannot,
    command,
    folder,
    need_root,
    outcome,
    private_dev,
)

from fdbroker.kernel.seccomp import pyseccomp

POLICY = """
version: 1
everyone:
  devices: [{path: /dev/null, access: rw}]
  namespaces: [{type: net, of: caller}]
"""
# `serve`, where the filter of one kind of process kills for a call that the process makes; the launcher's own is as it was
DEADLY = """
import sys
from fdbroker.launcher import filters, start
real, allowed, deadly = filters.compile_filter, filters.PROCESSES, filters._DEADLY
def compile_filter(process):
    if process == {process!r}:
        filters.PROCESSES = {{**allowed, process: " ".join(set(allowed[process].split()) - {{{call!r}}})}}
        filters._DEADLY = f"{{deadly}} {call}"
    try:
        return real(process)
    finally:
        filters.PROCESSES, filters._DEADLY = allowed, deadly
start.compile_filter = compile_filter
from fdbroker.cli import main
sys.exit(main())
"""


def _opens(broker):
    with Raw(broker.socket) as client:
        assert client.open("/dev/null") is None


def _lists(broker):
    with Raw(broker.socket) as client:
        assert client.call("io.fdbroker.Broker.List") is None


def _is_wrong(broker):
    with Raw(broker.socket) as client:
        client.sock.sendall(b"\xff" * 100)
        with contextlib.suppress(ConnectionResetError):
            while client.sock.recv(4096):
                pass


def _asks_for_its_namespace(broker):
    def ask():
        with Raw(broker.socket) as client:
            return outcome(client.ask({"namespace": {"type": "net", "pid": os.getpid()}}))

    assert as_user(ALICE, [], ask) == "OpenFailed"


class Case(NamedTuple):
    """Which process its filter kills, as the launcher calls it, for which call, and what has the process make it."""

    words: str
    filter: str
    call: str
    pid: str  # its name in Broker.pids, "" where it has none
    provoke: Callable[[Broker], object]
    code: int | None  # what the service ends with, None when it goes on


CASES = (
    Case("the opener", "opener", "openat2", "opener", _opens, 70),
    Case("the keeper", "keeper", "openat2", "keeper", _lists, 70),
    Case("the inbox", "inbox", "shutdown", "inbox", _is_wrong, 70),
    Case("the witness", "witness", "newfstatat", "witness", lambda broker: command(broker.socket, "reload"), 70),
    Case(
        "the namespaces worker's holder",
        "namespaces",
        "wait4",
        "namespaces",
        lambda broker: os.kill(broker.pids["worker"], signal.SIGKILL),
        70,
    ),
    Case("the namespaces worker", "namespaces", "setpgid", "worker", _asks_for_its_namespace, None),
    Case("a child of the namespaces worker", "namespaces", "capset", "", _asks_for_its_namespace, None),
    Case("the process that refuses everybody", "refuser", "accept4", "", _opens, 70),
)


@pytest.fixture(autouse=True)
def dev():
    need_root()
    with private_dev():
        yield


@contextlib.contextmanager
def _killed(case):
    """A service, one of whose processes its filter has just killed."""
    program = DEADLY.format(process=case.filter, call=case.call)
    refused = case.filter == "refuser"
    with folder() as where:
        words = activated(f"{where}/socket", program) if refused else ("-c", program)
        broker = Broker(where, "version: 1\nbroken: here\n" if refused else POLICY, program=words)
        try:
            if refused:
                broker.wait_for("nobody is served")
            else:
                broker.wait_ready()
            case.provoke(broker)
            if case.code is None:
                broker.wait_for("killed")
                yield broker
                assert broker.stop() == 0, broker.text()
            else:
                assert broker.process.wait(PATIENCE_S) == case.code, broker.text()
                yield broker
        finally:
            broker.process.kill()
            broker.process.wait()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.words)
def test_it_is_said_which_process_its_filter_has_killed(case):
    """Not that it ended with signal 31; and where the number of the call is."""
    with _killed(case) as broker:
        said = re.findall(rf"(?m)\b{case.words} was killed by its seccomp filter \(SIGSYS\), for .*$", broker.text())
        assert len(said) == 1, broker.text()
        assert not re.search(r"(signal|with) -?31\b", broker.text())
        pid = re.search(r"journalctl --grep 'pid=(\d+) \.\*syscall='", said[0])[1]
        assert not case.pid or int(pid) == broker.pids[case.pid]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.words)
def test_what_is_said_leads_to_the_number_of_the_call(case):
    """The kernel's log has a line that fits the words for journalctl, which name the right one of all lines."""
    number = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, case.call)
    for _ in range(5):  # the kernel leaves lines out when there are many: printk_ratelimit() of Linux
        with _killed(case) as broker:
            (pattern,) = re.findall(r"journalctl --grep '([^']*)'", broker.text())
        if found := _logged(pattern):
            break
    assert [re.search(r"\bsyscall=(\d+)\b", line)[1] for line in found[-1:]] == [str(number)]
    assert "sig=31" in found[-1]


def _logged(pattern):
    """The lines of the kernel's log that fit; a thread of the kernel's writes them, in its own time."""
    end_s = time.monotonic() + 6
    while time.monotonic() < end_s:
        lines = subprocess.run(["dmesg", "--syslog"], capture_output=True, text=True).stdout.splitlines()
        if found := [line for line in lines if re.search(pattern, line)]:
            return found
        time.sleep(0.1)
    if not any("type=1326" in line for line in lines):
        cannot("the kernel's log has no line of a filter, or cannot be read")
    return []
