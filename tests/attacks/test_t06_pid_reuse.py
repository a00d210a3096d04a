"""T6: who asks is decided by a pid, which another process has by then."""

from __future__ import annotations

import ctypes
import inspect
import os
import shutil
import signal
import socket
import struct
import time

from harness import ALICE, EVERYONE_NULL, GROUP, LIBC, MEM, Raw, node, outcome, running, status_of

from fdbroker.policy import decide
from fdbroker.terms import Device, Subject


def test_no_decision_depends_on_the_pid(dev):
    source = inspect.getsource(decide)
    assert "pid" not in source.replace("uid", "").replace("gid", "")


def test_identity_is_that_of_connect_whatever_the_process_becomes(dev):
    node("/dev/snd/pcm", MEM["zero"])
    policy = f'version: 1\ngroups: {{{GROUP}: {{devices: [{{path: "/dev/snd/*"}}]}}}}\n'
    with running(policy) as broker:
        # connected as ALICE without the group; the group, and exec, come later
        sock = socket.socket(socket.AF_UNIX)
        child = os.fork()
        if child == 0:
            os.setgroups([])
            os.setresgid(ALICE, ALICE, 0)
            os.setresuid(ALICE, ALICE, 0)
            sock.connect(broker.socket)
            os.seteuid(0)
            os.setegid(0)
            os.setgroups([GROUP])
            os.setresgid(GROUP, GROUP, GROUP)
            os.setresuid(ALICE, ALICE, ALICE)
            sock.sendall(
                b'{"method":"io.fdbroker.Broker.Open","parameters":{"resources":[{"device":"/dev/snd/pcm"}]}}\0'
            )
            os._exit(0 if b"Denied" in sock.recv(65536) else 1)
        sock.close()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_setuid_program_that_the_client_becomes_asks_as_the_client(dev):
    """Polkit's CVE-2013-4288: connected as ALICE, then root's set-uid program runs under the same pid, and it writes."""
    node("/dev/roots", MEM["zero"])
    call = b'{"method":"io.fdbroker.Broker.Open","parameters":{"resources":[{"device":"/dev/roots"}]}}\0'
    with running("version: 1\nusers: {0: {devices: [{path: /dev/roots}]}}\n") as broker:
        program = broker.folder / "cat"
        shutil.copy("/bin/cat", program)
        program.chmod(0o4755)
        reading, writing = os.pipe()
        os.write(writing, call)
        sock = socket.socket(socket.AF_UNIX)
        child = os.fork()
        if child == 0:
            os.setgroups([])
            os.setresgid(ALICE, ALICE, ALICE)
            os.setresuid(ALICE, ALICE, ALICE)
            sock.connect(broker.socket)
            os.dup2(reading, 0)
            os.dup2(sock.fileno(), 1)
            os.execv(program, ["cat"])
        try:
            end = time.monotonic() + 10
            while not broker.records("refused"):
                assert time.monotonic() < end, broker.text()
            assert status_of(child)["Uid"].split() == [str(ALICE), "0", "0", "0"]  # it was root when it wrote
            assert broker.records("refused")[0]["FDBROKER_UID"] == str(ALICE)
            assert not broker.records("granted")
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            sock.close()
            os.close(reading)
            os.close(writing)


def _process_with(pid):
    """A process of root's with exactly that number. Source: clone3(2), set_tid."""
    wanted = (ctypes.c_int * 1)(pid)
    arguments = struct.pack("11Q", 0, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, ctypes.addressof(wanted), 1, 0)
    made = LIBC.syscall(435, arguments, len(arguments))
    if made == 0:
        os.execv("/bin/sleep", ["sleep", "60"])
    assert made == pid, os.strerror(ctypes.get_errno())


def test_the_record_does_not_name_the_process_that_has_the_pid_by_now(dev):
    """The opener stands still while the client ends and another process gets its pid."""
    with running(EVERYONE_NULL) as broker:
        os.kill(broker.pids["opener"], signal.SIGSTOP)
        ours, theirs = socket.socketpair()
        child = os.fork()
        if child == 0:
            other = socket.socket(socket.AF_UNIX)
            other.connect(broker.socket)
            socket.send_fds(theirs, [b"x"], [other.fileno()])
            os._exit(0)
        sock = socket.socket(fileno=socket.recv_fds(ours, 1, 1)[1][0])
        os.waitpid(child, 0)
        _process_with(child)
        try:
            os.kill(broker.pids["opener"], signal.SIGCONT)
            with sock, ours, theirs:
                sock.settimeout(10)
                sock.sendall(
                    b'{"method":"io.fdbroker.Broker.Open","parameters":{"resources":[{"device":"/dev/null"}]}}\0'
                )
                data, numbers, _, _ = socket.recv_fds(sock, 65536, 2)
                for number in numbers:
                    os.close(number)
                assert b"grants" in data
            end = time.monotonic() + 60
            while status_of(child)["Name"] != "sleep":
                assert time.monotonic() < end
            (record,) = broker.records("granted")
            assert record["FDBROKER_PID"] == str(child)
            assert "FDBROKER_COMM" not in record
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def test_a_process_that_is_gone_is_foreign_and_nameless(dev):
    with running(EVERYONE_NULL) as broker, Raw(broker.socket) as client:
        # the connecting process ends; its socket lives on in this one
        ours, theirs = socket.socketpair()
        child = os.fork()
        if child == 0:
            other = socket.socket(socket.AF_UNIX)
            other.connect(broker.socket)
            socket.send_fds(theirs, [b"x"], [other.fileno()])
            os._exit(0)
        _, numbers, _, _ = socket.recv_fds(ours, 1, 1)
        os.waitpid(child, 0)
        ours.close()
        theirs.close()
        client.sock.close()
        client.sock = socket.socket(fileno=numbers[0])
        client.sock.settimeout(30)
        assert outcome(client.open("/dev/null")) == "granted"  # the uid is the same, and uid decides
        record = broker.records("granted")[0]
        assert record["FDBROKER_PID"] == str(child)


def test_a_subject_in_a_foreign_user_namespace_is_no_administrator():
    from fdbroker.policy.compiled import Policy

    policy = Policy(frozenset(), frozenset(), {}, {}, {}, (), (), {}, {}, {})
    at_home = Subject(0, frozenset({0}), 0, 1, "", "", foreign=False)
    assert decide.is_administrator(policy, at_home)
    assert not decide.is_administrator(policy, at_home._replace(foreign=True))
    assert not decide.decide(decide.view(policy, at_home), Device("/dev/null", "ro")).rules
