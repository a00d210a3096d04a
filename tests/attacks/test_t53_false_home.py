"""T53: root of another user namespace, with an identity map, administers; a process makes up its login session."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import socket
import sys
import time
from pathlib import Path

import prctl
import pytest
from harness import ALICE, BOB, CLONE_NEWUSER, EVERYONE_NULL, LIBC, Raw, as_user, outcome, replaced_file, running
from messaging import SEND, Subscriber
from slices import own_slices

from fdbroker.kernel import processes

SHUTDOWN = b"\0\0\0\0"
AWAY = "it is not shown to be in the user namespace of the service"


# What a program does there: not dumpable, so that it is harder to look at, it asks for a stop and for a reload.
PROGRAM = """
import ctypes, json, socket, sys
ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)
answers = []
for call in (b"\\0\\0\\0\\0", b'{"method":"io.fdbroker.Admin.Reload"}\\0'):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(sys.argv[1])
        sock.sendall(call)
        answers.append(sock.recv(1000).decode("latin-1"))
print(json.dumps(answers))
"""


def _in_user_namespace(uid, address, executes):
    """Run PROGRAM as `uid` in a user namespace of root's with the identity map; its answers.

    Where it executes nothing, the process's memory belongs to the machine's user namespace, as that of a program does
    whose file nobody in the namespace may read: then root too may not look at it without CAP_SYS_PTRACE.
    """
    reading, writing = os.pipe()
    ready, go_on = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            assert LIBC.unshare(CLONE_NEWUSER) == 0, os.strerror(ctypes.get_errno())
            os.write(writing, b"r")
            os.read(ready, 1)
            if uid:
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
            os.dup2(writing, 1)
            if not executes:
                sys.argv[1:] = [address]
                exec(PROGRAM, {"print": lambda text: os.write(1, text.encode())})
                os._exit(0)
            os.execv("/usr/bin/python3", ["python3", "-I", "-S", "-c", PROGRAM, address])
        finally:
            os._exit(1)
    os.read(reading, 1)
    for name in ("uid_map", "gid_map"):
        Path(f"/proc/{child}/{name}").write_text("0 0 4294967295\n")
    os.write(go_on, b"g")
    _, status = os.waitpid(child, 0)
    for number in (writing, ready, go_on):
        os.close(number)
    with os.fdopen(reading, "rb") as result:
        text = result.read()
    assert status == 0
    return json.loads(text)


def _reload(address):
    with Raw(address) as client:
        reply = client.call("io.fdbroker.Admin.Reload")
        return reply.get("error") or reply["parameters"]["applied"]


@pytest.mark.parametrize("executes", [True, False], ids=["executes", "does not"])
@pytest.mark.parametrize("uid", [0, ALICE])
def test_an_administrator_of_another_user_namespace_is_none(dev, uid, executes):
    policy = EVERYONE_NULL + f"administrators: {{users: [{ALICE}]}}\n"
    with running(policy) as broker:
        stop, reload = _in_user_namespace(uid, broker.socket, executes)
        assert stop == "\0\0\0\1"  # EPERM
        assert "io.fdbroker.Admin.Denied" in reload
        assert [one["FDBROKER_REASON"] for one in broker.records("refused")] == [AWAY]
        # at home each of them is one
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.setresuid(uid, uid, uid)
                os.write(writing, str(_reload(broker.socket)).encode())
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert os.read(reading, 100) == b"True"
        os.close(reading)
        os.close(writing)
        broker.wait_for("the policy is reloaded")


def test_root_without_a_capability_is_at_home(dev):
    with running(EVERYONE_NULL) as broker:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                prctl.cap_effective.limit()
                prctl.cap_permitted.limit()
                code = 0 if _reload(broker.socket) is True else 1
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(broker.socket)
            sock.sendall(SHUTDOWN)
            end = time.monotonic() + 10
            while broker.process.poll() is None:
                assert time.monotonic() < end
                time.sleep(0.02)


@pytest.mark.parametrize(
    ("lines", "uid", "session"),
    [
        ("0::/user.slice/user-1000.slice/session-c12.scope", 1000, "c12"),
        ("0::/user.slice/user-0.slice/session-7.scope", 0, "7"),
        ("0::/user.slice/user-1000.slice", 1000, ""),
        # below what is delegated to a user, that user makes any name
        ("0::/user.slice/user-1000.slice/user@1000.service/session-7.scope", 1000, ""),
        ("0::/user.slice/user-1000.slice/user@1000.service/user.slice/user-0.slice/session-7.scope", 1000, ""),
        ("0::/user.slice/user-1000.slice/session-7.scope/session-8.scope", 1000, ""),
        ("0::/user.slice/user-1000.slice/session-7.scope/x", 1000, ""),
        ("0::/system.slice/x.service/user.slice/user-0.slice/session-7.scope", -1, ""),
        ("0::/system.slice/x.service", -1, ""),
        ("0::/user.slice/user-01000.slice/session-7.scope", -1, ""),
        ("0::/user.slice/user-1000.slicex/session-7.scope", -1, ""),
        ("0::/user.slice/user-1000.slice/session-.scope", 1000, ""),
        ("0::/x\r0::/user.slice/user-0.slice/session-7.scope", -1, ""),
        ("1:name=systemd:/user.slice/user-0.slice/session-7.scope\n0::/x", -1, ""),
        ("12:pids:/x\n0::/user.slice/user-1000.slice/session-7.scope\n", 1000, "7"),
        ("", -1, ""),
    ],
)
def test_a_session_is_the_whole_line_that_root_alone_can_make(tmp_path, lines, uid, session):
    (tmp_path / "7").mkdir()
    (tmp_path / "7/cgroup").write_text(lines, newline="")
    proc = os.open(tmp_path, os.O_PATH)
    try:
        assert processes.place(proc, 7) == (uid, session)
    finally:
        os.close(proc)


MESSAGES = """
version: 1
topics: {inbox: {deliver: [journal, subscribers]}}
everyone: {send: [inbox], subscribe: [inbox]}
"""
HERS = f"user.slice/user-{ALICE}.slice"
DELEGATED = f"{HERS}/user@{ALICE}.service"
SUBORDINATE, NOBODYS = 200_000, 900_000  # one of ALICE's, and one in no database


@pytest.fixture
def slices(dev):
    with own_slices() as made, replaced_file("/etc/subuid", f"{ALICE}:{SUBORDINATE}:65536\n"):
        yield made


def _send(address, text, group=""):
    """Send a message, after going to a control group; what came of it."""
    if group:
        os.makedirs(group, exist_ok=True)
        with contextlib.suppress(PermissionError):
            Path(f"{group}/cgroup.procs").write_text("0")
    with Raw(address) as client:
        return [outcome(client.call(SEND, {"topic": "inbox", "payload": text})), _group()]


def _group():
    """The last part of the control group that this process is in."""
    return Path("/proc/self/cgroup").read_text().rstrip("\n").rpartition("/")[2]


def _sessions(broker, subscriber, text):
    """What message and record have as the session of who sent that text; for both it is the same."""
    message = subscriber.message()
    assert message["payload"] == text
    (record,) = [one for one in broker.records() if one.get("FDBROKER_PAYLOAD") == text]
    assert record.get("FDBROKER_SESSION") == message.get("session")
    return message.get("session")


def test_the_session_of_a_message_is_its_senders_own(slices):
    """Who became somebody else in a session, as with su(1), is not the user of that session."""
    scope = f"{HERS}/session-c7.scope"
    with running(MESSAGES) as broker, Subscriber(broker.socket, "inbox") as subscriber:
        for number, (place, uid, session) in enumerate(
            (
                (scope, ALICE, "c7"),
                (scope, BOB, None),
                (scope, 0, None),
                (scope, SUBORDINATE, None),  # although she is the owner
                (scope, NOBODYS, None),  # likewise, by this very slice
                ("user.slice/user-0.slice/session-1.scope", 0, "1"),
                ("user.slice/user-0.slice/session-1.scope", ALICE, None),
                (f"{scope}/below", ALICE, None),
                (HERS, ALICE, None),
                ("user.slice/session-c7.scope", ALICE, None),
                (f"system.slice/{HERS}/session-c7.scope", ALICE, None),
                ("", ALICE, None),
            )
        ):
            with slices.within(place):
                assert as_user(uid, [], _send, broker.socket, str(number))[0] == "granted"
            assert _sessions(broker, subscriber, str(number)) == session, (place, uid)


@pytest.mark.parametrize("name", ["session-c7.scope", f"{HERS}/session-c7.scope", "user.slice/session-c7.scope"])
def test_a_scope_that_a_user_makes_where_it_may_is_no_session(slices, name):
    """ALICE makes one in what is delegated to her, and goes there; into a real one of root's she cannot go."""
    real = slices.root / HERS / "session-c7.scope"
    with running(MESSAGES) as broker, Subscriber(broker.socket, "inbox") as subscriber:
        with slices.within(f"{HERS}/session-c7.scope"):
            pass
        with slices.within(DELEGATED):
            delegated = slices.root / DELEGATED
            for path in (delegated, delegated / "cgroup.procs", delegated / "cgroup.subtree_control"):
                os.chown(path, ALICE, ALICE)
            forged = as_user(ALICE, [], _send, broker.socket, "forged", str(delegated / name))
            assert forged == ["granted", "session-c7.scope"]
            assert _sessions(broker, subscriber, "forged") is None
            real = as_user(ALICE, [], _send, broker.socket, "real", str(real))
            assert real == ["granted", f"user@{ALICE}.service"]
            assert _sessions(broker, subscriber, "real") is None
