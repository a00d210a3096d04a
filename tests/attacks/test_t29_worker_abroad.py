"""T29: the child that works in the caller's user namespace is stopped, killed, traced or read by the caller."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from harness import (
    ALICE,
    BOB,
    LIBC,
    RATES,
    Broker,
    Raw,
    as_user,
    become_root_of_user_namespace,
    folder,
    outcome,
    running,
    status_of,
)

POLICY = f"""
version: 1
limits: {{{RATES}}}
everyone: {{namespaces: [{{type: [uts, mnt], create: true}}], devices: [{{path: /dev/null}}]}}
"""
PTRACE_ATTACH, PTRACE_SEIZE = 16, 0x4206


def _tries(pid):
    """What a root of the same user namespace may do to a process; the names of what worked."""
    worked = []

    def attempt(name, action):
        with contextlib.suppress(OSError):
            action()
            worked.append(name)

    def ptrace(request):
        if LIBC.ptrace(request, pid, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "ptrace")

    attempt("mem", lambda: os.close(os.open(f"/proc/{pid}/mem", os.O_RDONLY)))
    attempt("environ", lambda: os.close(os.open(f"/proc/{pid}/environ", os.O_RDONLY)))
    attempt("fd", lambda: os.listdir(f"/proc/{pid}/fd"))
    attempt("root", lambda: os.readlink(f"/proc/{pid}/root"))
    attempt("cwd", lambda: os.readlink(f"/proc/{pid}/cwd"))
    attempt("ns", lambda: os.readlink(f"/proc/{pid}/ns/net"))
    attempt("seize", lambda: ptrace(PTRACE_SEIZE))
    attempt("attach", lambda: ptrace(PTRACE_ATTACH))
    with contextlib.suppress(OSError):
        pidfd = os.pidfd_open(pid)
        if LIBC.syscall(438, pidfd, 0, 0) >= 0:  # pidfd_getfd
            worked.append("pidfd_getfd")
        os.close(pidfd)
    return worked


def _hunt(out, stop_it):
    """Look for a process that may be signalled although it is nobody's of this user: the broker's child."""
    own = os.getpgrp()
    hits, worked = 0, set()
    end = time.monotonic() + 20
    while time.monotonic() < end and (hits < 20 or stop_it):
        with open("/proc/loadavg") as file:
            newest = int(file.read().split()[-1])
        for pid in range(newest, newest - 3, -1):
            try:
                if os.getpgid(pid) == own:
                    continue
                os.kill(pid, signal.SIGSTOP if stop_it else 0)
            except OSError:
                continue
            hits += 1
            worked.update(_tries(pid))
            with contextlib.suppress(OSError, KeyError):
                if stop_it and status_of(pid)["State"].startswith("T"):  # and not at its end already
                    end = 0
                    break
    os.write(out, json.dumps([hits, sorted(worked)]).encode())


def _with_hunter(address, stop_it):
    """Ask for new namespaces while another process of the same user namespace hunts for who makes them."""
    become_root_of_user_namespace()
    os.setpgid(0, 0)
    reading, writing = os.pipe()
    hunter = os.fork()
    if hunter == 0:
        _hunt(writing, stop_it)
        os._exit(0)
    answers = set()
    with Raw(address) as client:
        while os.waitid(os.P_PID, hunter, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            answers.add(outcome(client.ask({"namespace": {"type": "uts", "create": True}})))
            for number in client.descriptors:
                os.close(number)
            client.descriptors.clear()
    os.waitpid(hunter, 0)
    return [json.loads(os.read(reading, 65536)), sorted(answers)]


@pytest.mark.parametrize("stop_it", [False, True], ids=["look", "stop"])
def test_who_owns_the_user_namespace_learns_nothing_of_the_child_and_stops_only_its_own_request(dev, stop_it):
    with running(POLICY) as broker:
        child = os.fork()
        if child == 0:
            code = 1
            with contextlib.suppress(BaseException):
                (hits, worked), answers = as_user(ALICE, [], _with_hunter, broker.socket, stop_it)
                code = 0 if hits and not worked and ("OpenFailed" if stop_it else "granted") in answers else 2
            os._exit(code)
        served = 0
        while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            began = time.monotonic()
            assert as_user(BOB, [], _ask_all, broker.socket) == ["granted", "granted"]
            assert time.monotonic() - began < 4  # less than the worker gives a child that was stopped
            served += 1
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert served
        refused = [record["FDBROKER_REASON"] for record in broker.records("refused")]
        assert refused == (["it could not be opened: ETIMEDOUT"] if stop_it else [])
        # stopped for good where its parent's death is no signal any more, it must not stay
        uid = status_of(broker.pids["worker"])["Uid"].split()[0]
        end = time.monotonic() + 60
        while len(left := subprocess.run(["pgrep", "-u", uid], capture_output=True, text=True).stdout.split()) != 2:
            assert time.monotonic() < end, left


def _ask_all(address):
    with Raw(address) as client:
        return [
            outcome(client.open("/dev/null")),
            outcome(client.ask({"namespace": {"type": "uts", "create": True}})),
        ]


@pytest.fixture
def exposing():
    """fs.suid_dumpable=1, as on machines where a setuid program was debugged."""
    setting = Path("/proc/sys/fs/suid_dumpable")
    before = setting.read_text()
    setting.write_text("1")
    try:
        yield
    finally:
        setting.write_text(before)


def test_where_its_children_could_be_traced_the_worker_does_not_start_and_says_so(dev, exposing):
    with folder() as where:
        broker = Broker(where, POLICY)
        try:
            assert broker.process.wait(60) == 78
        finally:
            broker.process.kill()
            broker.process.wait()
        assert "the namespaces worker does not start: fs.suid_dumpable is 1" in broker.text()
        assert "serving with" not in broker.text()
    with running("version: 1\neveryone: {devices: [{path: /dev/null}]}\n"):  # who needs no worker is not concerned
        pass
