"""What the seccomp filters say by a call's arguments; all other calls: tests/privileged/test_taken_over.py."""

from __future__ import annotations

import errno
import mmap
import os
import resource
import signal
import socket
import struct
from collections.abc import Callable

import pytest

from fdbroker.kernel import confine, libc
from fdbroker.launcher import filters

_PR_SET_NO_NEW_PRIVS = 38


def _under(program: bytes, call: Callable[[], object]) -> int:
    """The errno of a call in a process with that filter, 0 when it succeeds."""
    child = os.fork()
    if child == 0:
        number = 255
        try:
            libc.prctl(_PR_SET_NO_NEW_PRIVS, 1)
            confine._load_filter(program)
            call()
            number = 0
        except OSError as error:
            number = error.errno or 255
        finally:
            os._exit(number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _program(process: str) -> bytes:
    with os.fdopen(filters.compile_filter(process), "rb") as file:
        return file.read()


@pytest.mark.parametrize("process", filters.PROCESSES)
def test_no_memory_can_be_run(process):
    program = _program(process)
    assert _under(program, lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE)) == 0
    assert _under(program, lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC)) == errno.EPERM


@pytest.mark.parametrize("process", filters.PROCESSES)
def test_nothing_is_connected_by_what_is_sent_first(process):
    program, fast_open = _program(process), filters._MSG_FASTOPEN
    one, other = socket.socketpair(type=socket.SOCK_SEQPACKET)
    with one, other, socket.socket() as sock:
        assert _under(program, lambda: one.send(b"x")) == 0
        assert _under(program, lambda: one.sendmsg([b"x"])) == (errno.EPERM if process == "keeper" else 0)
        nobody = ("127.0.0.1", 9)
        assert _under(program, lambda: sock.sendto(b"x", fast_open, nobody)) == errno.EPERM
        assert _under(program, lambda: sock.sendmsg([b"x"], [], fast_open, nobody)) == errno.EPERM


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_CREAT, os.O_RDONLY | os.O_TRUNC])
@pytest.mark.parametrize("process", ["namespaces", "witness"])
def test_who_has_no_landlock_opens_files_for_reading_alone(tmp_path, process, flags):
    program, path = _program(process), str(tmp_path / "file")
    (tmp_path / "file").touch()
    assert _under(program, lambda: os.open(path, os.O_RDONLY)) == 0
    assert _under(program, lambda: os.open(path, flags, 0o600)) == errno.EPERM


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_PATH, os.O_RDONLY | os.O_CREAT])
def test_the_keeper_opens_no_file_by_openat_whatever_landlock_says(tmp_path, flags):
    """By openat2 it could: test_taken_over.py."""
    program, path = _program("keeper"), str(tmp_path / "file")
    (tmp_path / "file").touch()
    assert _under(program, lambda: os.listdir(tmp_path)) == 0
    assert _under(program, lambda: os.open(path, flags, 0o600)) == errno.EPERM
    assert _under(program, lambda: os.open(path, flags | os.O_DIRECTORY, 0o600)) != 0  # it is none
    assert _under(program, lambda: os.open("/dev/null", flags)) == errno.EPERM
    folder = flags | os.O_DIRECTORY
    number = 0 if folder & os.O_ACCMODE == os.O_RDONLY and not folder & os.O_CREAT else errno.EPERM
    assert _under(program, lambda: os.open(tmp_path, folder, 0o600)) == number


def test_the_keeper_sends_no_descriptor():
    one, other = socket.socketpair(type=socket.SOCK_SEQPACKET)
    with one, other:
        for process in filters.PROCESSES:
            number = _under(_program(process), lambda: socket.send_fds(one, [b"x"], [2]))
            assert number == (errno.EPERM if process == "keeper" else 0), process


def test_the_launcher_starts_nothing_and_makes_no_namespace():
    program = filters.compile_launchers()
    assert _under(program, lambda: socket.socket(socket.AF_UNIX).close()) == 0
    assert _under(program, lambda: os.execv("/bin/true", ["true"])) == errno.EPERM
    assert _under(program, lambda: libc.LIBC.unshare(0x10000000) and libc.fail("unshare")) == errno.EPERM


def test_the_launcher_changes_and_signals_no_process_of_its_own_uid():
    """Of root's uid are most services, and process 1; for all of this the kernel asks for no more."""
    program, another = filters.compile_launchers(), os.getpid()  # the call is made in a child
    core = resource.getrlimit(resource.RLIMIT_CORE)
    calls = (
        lambda: resource.prlimit(another, resource.RLIMIT_CORE, core),
        lambda: resource.prlimit(another, resource.RLIMIT_CORE),
        lambda: os.kill(another, 0),
        lambda: os.setpriority(os.PRIO_PROCESS, another, os.getpriority(os.PRIO_PROCESS, another)),
        lambda: os.sched_setscheduler(another, os.SCHED_OTHER, os.sched_param(0)),
        lambda: os.sched_setparam(another, os.sched_param(0)),
        lambda: os.sched_setaffinity(another, os.sched_getaffinity(another)),
        lambda: signal.pidfd_send_signal(os.pidfd_open(another), 0),
    )
    allow = struct.pack("HBBI", 0x06, 0, 0, 0x7FFF_0000)  # linux/filter.h, linux/seccomp.h
    assert [_under(allow, call) for call in calls] == [0] * len(calls)
    assert [_under(program, call) for call in calls] == [errno.EPERM] * len(calls)
    assert _under(program, lambda: resource.setrlimit(resource.RLIMIT_CORE, core)) == 0
