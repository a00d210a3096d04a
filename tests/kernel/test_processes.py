"""What /proc says of another process, whatever it calls itself; whether one whose main thread has ended still runs."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from harness import ALICE, BOB, CAROL, LIBC

from fdbroker.kernel.namespaces import uids_of
from fdbroker.kernel.pinned import Process, fields
from fdbroker.kernel.processes import boot_s, comm, like
from fdbroker.launcher.ends import main_thread_ended

CODE = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(60,)).start()
print(flush=True)
input()
ctypes.CDLL(None).pthread_exit(None)
"""


def test_a_process_without_its_main_thread_has_ended():
    command = [sys.executable, "-I", "-c", CODE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            process.stdout.readline()
            assert not main_thread_ended(process.pid)
            process.stdin.write("\n")
            process.stdin.flush()
            end = time.monotonic() + 60
            while not main_thread_ended(process.pid):
                assert time.monotonic() < end
                time.sleep(0.01)
            assert process.poll() is None  # and nobody can wait for it
        finally:
            process.kill()
    assert not main_thread_ended(process.pid)
    assert not main_thread_ended(os.getpid())


NAMED = """
import sys, time
open("/proc/self/comm", "wb").write(bytes.fromhex(sys.argv[1]))
print(flush=True)
input()
"""


@contextlib.contextmanager
def named(name):
    """A process that calls itself so."""
    command = [sys.executable, "-I", "-c", NAMED, name.hex()]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield process.pid
        process.stdin.close()


@pytest.mark.parametrize("end", [b"\r", b"\n", b"\r\n", b"\x0b", b"\x0c", b"\x1c", b"\x85"])
def test_what_a_process_calls_itself_is_no_line_of_its_status(end):
    with named(end + b"Uid:\t0\t0\t0\t0"[: 15 - len(end)]) as pid, Process(pid) as process:
        assert process.status().uids == (os.getuid(),) * 4
    with named(end + b"Groups:\t1") as pid, open(f"/proc/{pid}/status", "rb") as file:
        status = file.read()
        found = fields(status)
        assert found[b"Name"].endswith(b"Groups:\t1")
        found.pop(b"", None)  # behind the end of the last line
        assert len(found) == status.count(b":\t") - 1  # the one in its name
        proc = os.open("/proc", os.O_PATH)
        try:
            assert comm(proc, pid) == (end + b"Groups:\t1").decode(errors="backslashreplace")
        finally:
            os.close(proc)


def _is_like(pid, uid):
    """Whether the process is one of that effective uid that runs now."""
    proc = os.open("/proc", os.O_PATH)
    try:
        found = like(proc, pid, uid, boot_s())
    finally:
        os.close(proc)
    if found is not None:
        os.close(found)
    return found is not None


@pytest.mark.parametrize("dumpable", [0, 1])
def test_the_uids_of_a_process_are_told_without_its_status(root, dumpable):
    """A kernel before 6.13 does not know the question; the effective one each tells."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.setresuid(ALICE, BOB, CAROL)
        LIBC.prctl(4, dumpable, 0, 0, 0)  # PR_SET_DUMPABLE
        os.write(writing, b"x")
        signal.pause()
    os.read(reading, 1)
    try:
        with Process(child) as process:
            assert _is_like(child, BOB)
            assert not any(_is_like(child, uid) for uid in (0, ALICE, CAROL))
            assert process.status().uids == (ALICE, BOB, CAROL, BOB)
            known = uids_of(process.pidfd)
            release = [int(number) for number in re.findall(r"[0-9]+", os.uname().release)[:2]]
            assert known == ((ALICE, BOB, CAROL, BOB) if release >= [6, 13] else None)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert uids_of(reading) is None  # ENOTTY, as an older kernel says of a pidfd
    for number in (reading, writing):
        os.close(number)
