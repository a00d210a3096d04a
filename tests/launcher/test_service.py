"""The launcher and children that take their time to end: a stop is a stop, and a process that hangs is a fault."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import replaced_file

from fdbroker.kernel.link import Link
from fdbroker.launcher import needs, service, start
from fdbroker.launcher.ends import main_thread_ended
from fdbroker.limits import every as limits
from fdbroker.policy import names
from fdbroker.policy.compile import load_policy
from fdbroker.policy.compiled import to_bytes
from fdbroker.wire import admin, link

# the main thread ends when the launcher speaks or goes; another one ends that many seconds later, as one would that
# waits in the kernel, and holds the link's end until then
CHILD = """
import ctypes, os, socket, sys, threading, time
link = socket.socket(fileno=int(sys.argv[1]))
if sys.argv[3] == "told":
    link.recv(100)
threading.Thread(target=lambda: (time.sleep(float(sys.argv[2])), os._exit(0))).start()
ctypes.CDLL(None).pthread_exit(None)
"""
NAMES = ("opener", "inbox")


@pytest.fixture
def launcher(monkeypatch):
    """One that never confined itself; `launcher.start(when, seconds)` gives it children."""
    monkeypatch.setattr(service, "_LOOK_S", 0.2)
    made = service.Launcher(service.Options("policy", "/none", 0o600, None, "/none"))
    made._databases = names.databases()

    def begin(when, seconds, names=NAMES):
        for name in names:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                words = [sys.executable, "-c", CHILD, str(theirs.fileno()), str(seconds), when]
                process = subprocess.Popen(words, pass_fds=[theirs.fileno()])
            child = start.Child(name, process, Link(ours), ())
            made._children.append(child)
            child.link.poll(made._epoll)

    made.begin = begin
    yield made
    for child in made._children:
        child.link.close()
        child.process.kill()
        child.process.wait()
    made._notify.close()
    made._epoll.close()
    made._signals.close()


def _until_half_ended(launcher):
    end = time.monotonic() + 60
    while not all(main_thread_ended(child.process.pid) for child in launcher._children):
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("when", ["told", "at once"])
def test_a_child_that_ends_slowly_while_the_service_stops_is_no_fault(launcher, when):
    launcher.begin(when, 1.0)
    launcher._stop()
    for child in launcher._children[1:]:
        child.link.send(b"stop")
    _until_half_ended(launcher)
    began_s = time.monotonic()
    launcher._loop()
    assert time.monotonic() - began_s < limits.STOP_SECONDS
    assert [child.process.poll() for child in launcher._children] == [0, 0]


def test_a_stop_ends_in_time_also_if_a_child_does_not_end(launcher):
    launcher.begin("told", 1000)
    launcher._stop()
    began_s = time.monotonic()
    launcher._loop()
    assert limits.STOP_SECONDS - 1 < time.monotonic() - began_s < limits.STOP_SECONDS + 2  # of a machine with load


def test_what_is_to_be_told_to_a_process_that_has_ended_makes_no_fault_of_a_stop(launcher):
    """An administrator's reload, or the word of the witness, beside a stop: the opener may have drained before."""
    launcher.begin("at once", 0, ("opener", "inbox", "keeper", "witness", "namespaces"))
    for child in launcher._children:
        child.process.wait(60)
    launcher._stop()
    launcher._tell_reloaded([1, 2], [])
    for message in (admin.Judge(1), admin.Judged(1, True), link.WorkerStuck()):
        launcher._heard("opener", message, b"x", [])
    launcher._loop()


def test_that_a_worker_is_stuck_where_there_is_none_makes_no_fault(launcher, monkeypatch):
    said = []
    monkeypatch.setattr(service, "say", lambda text, priority: said.append(text))
    launcher._heard("opener", link.WorkerStuck(), b"x", [])
    assert said == []


def test_a_child_that_stays_without_its_main_thread_ends_the_service(launcher):
    launcher.begin("at once", 1000)
    _until_half_ended(launcher)
    with pytest.raises(service.ServiceFailed, match="has ended, but for a thread that waits in the kernel"):
        launcher._loop()


def test_a_child_that_is_only_on_its_way_out_at_one_look_is_not_said_to_hang(launcher):
    launcher.begin("at once", 1000)
    _until_half_ended(launcher)
    launcher._look()
    launcher._children[0].process.kill()
    launcher._children[0].process.wait()
    with pytest.raises(service.ServiceFailed, match="the inbox has ended, but for a thread"):
        launcher._look()


def _user(name, uid, more=":/nonexistent:/bin/sh"):
    return f"{name}:x:{uid}:{uid}:{more}\n"


@pytest.fixture
def given(launcher, root, monkeypatch):
    """The policies that the launcher hands on."""
    found = []
    monkeypatch.setattr(launcher._handing, "can", lambda _: True)
    monkeypatch.setattr(launcher._handing, "give", lambda _, policy: found.append(policy) or "")
    return found


@pytest.fixture
def said(monkeypatch):
    """What it says, all of it as a warning."""
    found = []
    monkeypatch.setattr(service, "say", lambda text, priority: found.append(text))
    return found


def test_changed_users_are_handed_on_only_when_the_policy_comes_out_another(launcher, given, said, tmp_path):
    """Every user can change its line of passwd(5), again and again: all processes read the whole policy each time."""
    path = tmp_path / "policy.yaml"
    path.write_text("version: 1\nusers: {alba: {devices: [{path: /dev/null}]}}\ntopics: {t: {deliver: [queue]}}\n")
    before = Path("/etc/passwd").read_text()

    def changed(text):
        with replaced_file("/etc/passwd", before + text):
            launcher._read_databases()
        return [policy.owners.users & {60001, 60002} for policy in given]

    with replaced_file("/etc/passwd", before + _user("alba", 60001)):
        launcher._databases, launcher._loaded = names.databases(), load_policy(str(path), trusted=False)
    assert changed(_user("alba", 60001, "Alba:/home:/bin/bash")) == []
    assert changed(_user("alba", 60001) + _user("bea", 60002)) == [{60001, 60002}]
    assert changed(_user("alba", 60002)) == [{60001, 60002}, {60002}]
    given.clear()
    assert changed(_user("else", 60002)) == [{60002}]  # the policy names a user that is no more
    assert changed(_user("else", 60002, "Else:/home:/bin/bash")) == [{60002}]
    assert len(said) == 1
    assert "unknown user 'alba'" in said[0]
    assert changed(_user("else", 60001)) == [{60002}, {60001}]
    assert [policy.by_uid for policy in given] == [{}, {}]


GROUP = "fdbroker-test-group:x:60009:{}\n"
BY_DATABASE = """
version: 1
groups: {fdbroker-test-group: {devices: [{path: /dev/null, membership: nss}]}}
deny: [{groups: [fdbroker-test-group], devices: [/dev/zero]}]
"""


@pytest.mark.parametrize("most", ["POLICY_LINK_BYTES", "POLICY_GROUPS"])
def test_a_policy_that_has_become_too_large_for_the_children_is_not_handed_on(
    launcher, given, said, tmp_path, monkeypatch, most
):
    """They would end at once, and the service with them: by one `usermod -aG`."""
    path = tmp_path / "policy.yaml"
    path.write_text(BY_DATABASE)
    passwd, group = Path("/etc/passwd").read_text(), Path("/etc/group").read_text()

    def changed(members):
        with replaced_file("/etc/group", group + GROUP.format(members)):
            launcher._read_databases()

    with replaced_file("/etc/passwd", passwd + _user("alba", 60001)):
        with replaced_file("/etc/group", group + GROUP.format("")):
            launcher._databases, launcher._loaded = names.databases(), load_policy(str(path), trusted=False)
        before = launcher._loaded.policy
        with monkeypatch.context() as patched:
            patched.setattr(needs.limits, most, 0 if most == "POLICY_GROUPS" else len(to_bytes(before)))
            changed("alba")
            changed("alba,alba")
        assert given == []
        assert launcher._loaded.policy == before
        assert len(said) == 1
        assert "a reload would now fail" in said[0]
        changed("alba")
        assert [set(policy.by_uid) for policy in given] == [{60001}]


NAMED = """
version: 1
administrators: {users: [alba], groups: [fdbroker-test-old]}
users: {alba: {limits: {burst: 7}, devices: [{path: /dev/null}]}, bea: {devices: [{path: /dev/full}]}}
groups:
  fdbroker-test-old: {limits: {burst: 8}, devices: [{path: /dev/null}]}
  fdbroker-test-group: {devices: [{path: /dev/random, membership: nss}]}
deny:
  - {groups: [fdbroker-test-group], devices: [/dev/zero]}
  - {users: [alba, bea], groups: [fdbroker-test-old, fdbroker-test-group], devices: [/dev/full]}
tests:
  - {as: {user: alba}, open: /dev/null, expect: allow}
"""
OLD = "fdbroker-test-old:x:60006:dora\n"


@contextlib.contextmanager
def _databases(users, groups):
    with (
        replaced_file("/etc/passwd", Path("/etc/passwd").read_text() + "".join(users)),
        replaced_file("/etc/group", Path("/etc/group").read_text() + groups),
        replaced_file("/etc/subuid", "alba:700000:10\nbea:800000:10\n"),
    ):
        yield


def test_who_is_no_more_keeps_nothing_but_what_is_denied_and_all_others_go_on(launcher, given, said, tmp_path):
    """The number may be given to another account; and the deny rules are for who comes to their groups meanwhile."""
    path = tmp_path / "policy.yaml"
    path.write_text(NAMED)
    alba, *others = (_user(name, 60001 + number) for number, name in enumerate(("alba", "bea", "cleo", "dora")))
    with _databases([alba, *others], OLD + GROUP.format("bea")):
        launcher._databases, launcher._loaded = names.databases(), load_policy(str(path), trusted=False)
    first = launcher._loaded.policy
    assert set(first.by_uid) == {60001, 60002}
    with _databases(others, GROUP.format("cleo")):
        launcher._read_databases()
        launcher._read_databases()
    (policy,) = given
    assert (policy.administrator_uids, policy.administrator_gids) == (set(), set())
    assert (policy.uid_limits, policy.gid_limits) == ({60002: {}}, {60009: {}})
    patterns = {uid: [rule.pattern for rule in rules] for uid, rules in policy.by_uid.items()}
    assert patterns == {60002: ["/dev/full"], 60003: ["/dev/random"]}
    assert policy.by_gid == {60009: ()}
    assert [rule.uids for rule in policy.deny] == [{60003}, {60001, 60002, 60003, 60004}]
    assert [rule.gids for rule in policy.deny] == [{60009}, {60006, 60009}]
    assert [rule.ranges for rule in policy.deny] == [(), ((800000, 800009), (700000, 700009))]
    assert (policy.digest, policy.generation, policy.loaded_us) == (first.digest, first.generation, first.loaded_us)
    (text,) = said
    assert "unknown user 'alba'" in text
    assert "unknown group 'fdbroker-test-old'" in text
    with _databases([alba, *others], OLD + GROUP.format("bea")):
        launcher._read_databases()
    assert given[1:] == [first]
    with _databases(others, GROUP.format("cleo")):
        launcher._read_databases()
    assert len(said) == 2


@pytest.mark.parametrize("room", [0, 1000])
def test_who_is_no_more_keeps_nothing_also_where_the_policy_becomes_too_large(
    launcher, given, said, tmp_path, monkeypatch, room
):
    """With room for the longer deny rules, these are in force, but nobody is allowed more."""
    path = tmp_path / "policy.yaml"
    path.write_text(NAMED)
    alba, bea = _user("alba", 60001), _user("bea", 60002)
    with _databases([alba, bea], OLD + GROUP.format("alba")):
        launcher._databases, launcher._loaded = names.databases(), load_policy(str(path), trusted=False)
    monkeypatch.setattr(needs.limits, "POLICY_LINK_BYTES", len(to_bytes(launcher._loaded.policy)) + room)
    members = {f"member{number}": 60010 + number for number in range(20)}
    with _databases([bea, *(_user(*member) for member in members.items())], OLD + GROUP.format(",".join(members))):
        launcher._read_databases()
    (policy,) = given
    assert set(policy.by_uid) == {60002}
    assert policy.deny[0].uids == (set(members.values()) if room else {60001})
    (text,) = said
    assert "unknown user 'alba'" in text
    assert "too large" in text
