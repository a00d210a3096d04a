"""Who asks, on a kernel that does not say which process connected: Linux before 6.5 has no SO_PEERPIDFD."""

from __future__ import annotations

import os
import socket
import time
from array import array
from pathlib import Path

import pytest
from harness import cannot
from hypothesis import given
from hypothesis import strategies as st

from fdbroker.kernel import processes, sockets
from fdbroker.opener.identify import Identifier, WhoseUnknown
from fdbroker.policy.owners import Owners
from fdbroker.terms import OTHERS, Groups

UNKNOWN_OPTION = 9999
GID = st.integers(0, 2**32 - 1) | st.sampled_from([0, 1, 256, 0x10000, 0x100, 0x1000000, 0x01010101])


@given(st.lists(GID, max_size=20), st.lists(GID, max_size=20))
def test_packed_groups_are_those_that_were_packed(inside, asked):
    """Also where the bytes of two stand for a third one."""
    groups = Groups(array("I", inside))
    assert [gid in groups for gid in (*inside, *asked)] == [gid in set(inside) for gid in (*inside, *asked)]
    assert (list(groups), len(groups)) == (sorted(set(inside)), len(set(inside)))


def test_a_question_for_a_group_is_answered_soon_whatever_groups_there_are():
    """65,536 times 0x040000, which have the bytes of group 4 between any two, took 26 ms."""
    groups = Groups(array("I", [0x040000] * 32_768 + [0x040001] * 32_767))
    began_s = time.thread_time()
    assert not any(gid in groups for gid in [4] * 100)
    assert time.thread_time() - began_s < 0.05


@pytest.fixture
def older(monkeypatch):
    monkeypatch.setattr(sockets, "SO_PEERPIDFD", UNKNOWN_OPTION)


@pytest.fixture
def accepted():
    """The broker's end of a connection that this process has made."""
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind("")
        listener.listen(1)
        client.connect(listener.getsockname())
        sock, _ = listener.accept()
        with sock:
            yield sock


def test_a_container_of_roots_session_is_not_root(accepted, monkeypatch):
    """It could use up root's account, so that nobody could administer."""
    identifier = Identifier()
    for uid, owner in ((0, OTHERS), (-1, OTHERS), (1000, 1000)):
        monkeypatch.setattr(processes, "place", lambda *_, uid=uid: processes.Place(uid, ""))
        assert identifier.arrived(accepted, Owners()).owner == owner
    identifier.close()


def test_the_slice_of_a_process_that_has_the_pid_by_now_is_nobodys(accepted, monkeypatch):
    """The one that connected has ended meanwhile: what was read in /proc may be another process's."""
    identifier = Identifier()
    monkeypatch.setattr(processes, "place", lambda *_: processes.Place(1000, ""))
    monkeypatch.setattr(processes, "is_alive", lambda _: False)
    with pytest.raises(WhoseUnknown):
        identifier.arrived(accepted, Owners())
    identifier.close()


def taken_pid(pidfd):
    """Of which process it is; takes it."""
    with os.fdopen(pidfd), open(f"/proc/self/fdinfo/{pidfd}") as file:
        return int(file.read().partition("Pid:\t")[2].split()[0])


@pytest.fixture
def identifier():
    identifier = Identifier()
    yield identifier
    identifier.close()


@pytest.fixture
def subject(identifier, accepted):
    return identifier.identify(accepted, identifier.arrived(accepted, Owners()))


def test_it_is_who_has_its_number_and_uid_and_ran_before_it_was_let_in(older, accepted, identifier, subject):
    assert not sockets.says_peer_pidfd(accepted)
    described = identifier.describe(accepted, subject)
    assert (described.foreign, described.comm) == (False, Path("/proc/self/comm").read_text().rstrip())
    assert taken_pid(identifier.process(accepted, subject, processes.boot_s())) == os.getpid()


def test_it_is_nobody_who_started_later_or_has_another_uid_or_is_gone(older, accepted, identifier, subject):
    now_s = processes.boot_s()
    started_s = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    assert 0 < started_s < now_s
    assert taken_pid(identifier.process(accepted, subject, started_s)) == os.getpid()
    assert identifier.process(accepted, subject, started_s - 0.01) is None
    assert identifier.process(accepted, subject._replace(uid=subject.uid + 1), now_s) is None
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    assert identifier.process(accepted, subject._replace(pid=child), now_s) is None
    assert identifier.describe(accepted, subject._replace(pid=child)).foreign


def test_the_groups_of_who_connects_are_not_read_for_its_uid(older, accepted, identifier, subject, monkeypatch):
    """With 65,536 of them /proc/PID/status takes 14 ms, in which the opener serves nobody."""
    opened, open_ = [], os.open
    monkeypatch.setattr(os, "open", lambda path, *rest, **more: opened.append(str(path)) or open_(path, *rest, **more))
    assert taken_pid(identifier.process(accepted, subject, processes.boot_s())) == os.getpid()
    assert [Path(name).name for name in opened if Path(name).name in ("stat", "status")] == ["stat"]


def test_a_kernel_that_says_it_is_believed_alone(accepted, identifier, subject):
    """The number is not looked at: it can be another process's."""
    if not sockets.says_peer_pidfd(accepted):
        cannot("needs Linux 6.5, which says the pidfd of a peer")
    assert taken_pid(identifier.process(accepted, subject._replace(pid=1), 0.0)) == os.getpid()
