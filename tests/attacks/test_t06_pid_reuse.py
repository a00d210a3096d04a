"""T6: who asks is decided by a pid, which another process has by then."""

from __future__ import annotations

import inspect
import os
import socket

from harness import ALICE, EVERYONE_NULL, GROUP, MEM, Raw, node, outcome, running

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
        client.sock.settimeout(5)
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
