"""Which namespaces still are, for a user that names its mounts as it likes."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import threading
import time
from types import SimpleNamespace
from unittest import mock

import harness
import pytest
from harness import ALICE, BOB, CAROL
from subordinate import crowd

from fdbroker.kernel import namespaces
from fdbroker.limits import every as limits
from fdbroker.namespaces import answer, living
from fdbroker.terms import Namespace
from fdbroker.wire.worker import Ask, Wanted

_CLONE_FILES = 0x400  # linux/sched.h


def test_a_mount_whose_path_has_ends_of_lines_in_it_is_one_mount(root):
    name = "a\rb\rc\x0bd\x85e"
    with harness.folder() as where:
        (where / name).mkdir()
        (where / "namespace").touch()
        harness.mount("x", str(where / name), "tmpfs")
        harness.mount("/proc/self/ns/net", str(where / "namespace"), "none", harness.MS_BIND)
        own = os.open("/proc/self/ns/mnt", os.O_RDONLY)
        try:
            numbers, whole = living._mounted("/proc/self", own)
            assert numbers >= {os.stat("/proc/self/ns/net").st_ino}
            assert whole
        finally:
            os.close(own)
            harness.unmount(str(where / "namespace"))
            harness.unmount(str(where / name))


@pytest.fixture
def network(root):
    """An own network namespace of the machine's user namespace, held by a descriptor: its number."""
    before = os.open("/proc/self/ns/net", os.O_RDONLY)
    assert harness.LIBC.unshare(harness.CLONE_NEWNET) == 0
    held = os.open("/proc/self/ns/net", os.O_RDONLY)
    assert harness.LIBC.setns(before, harness.CLONE_NEWNET) == 0
    yield held
    for number in (before, held):
        os.close(number)


def ask(inode, *uids):
    return Ask(1, 5, 5, (Wanted(Namespace("net")),), (inode,), 1, uids=tuple((uid, uid) for uid in uids))


def test_what_is_not_found_in_time_counts_as_living(monkeypatch):
    """LIVING_SECONDS: as many descriptors as one likes to have made it take five seconds of a CPU for each question."""
    assert living.living(ask(1, 0), time.monotonic() + 60) == set()
    assert living.living(ask(1, 0), time.monotonic()) == {1}
    monkeypatch.setattr(living, "_entered", lambda *_, **__: time.sleep(0.01) or ())
    began_s = time.monotonic()
    assert living.living(ask(1, 0), began_s + 0.2) == {1}
    assert time.monotonic() - began_s < 5


def test_a_thread_that_has_entered_one_holds_it(network):
    """Its process is elsewhere: 64 lived at the same time with a limit of 16."""
    inode, entered, done = os.fstat(network).st_ino, threading.Event(), threading.Event()
    number = os.dup(network)

    def enter():
        harness.LIBC.setns(number, harness.CLONE_NEWNET)
        entered.set()
        done.wait()

    thread = threading.Thread(target=enter)
    thread.start()
    try:
        assert entered.wait(30)
        with mock.patch.object(living, "_opened", return_value=()):
            assert living.living(ask(inode, 0), time.monotonic() + 60) == {inode}
    finally:
        done.set()
        thread.join()
        os.close(number)


def test_one_of_somebody_elses_with_the_same_number_does_not_count(network):
    """The kernel gives numbers again: root's new namespace was counted for a user, who was refused."""
    inode = os.fstat(network).st_ino
    child = os.fork()
    if child == 0:  # root's, and in it
        harness.LIBC.setns(network, harness.CLONE_NEWNET)
        signal.pause()
    try:
        assert living.living(ask(inode, 50_001), time.monotonic() + 60) == set()
        assert living.living(ask(inode, 0), time.monotonic() + 60) == {inode}
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_user_namespace_of_the_owners_with_the_same_number_does_not_count(root):
    """The kernel gives numbers again, of whatever type: each container that was started anew cost its user a place."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.setresuid(ALICE, ALICE, ALICE)
        assert harness.LIBC.unshare(harness.CLONE_NEWUSER | namespaces.CLONE["uts"]) == 0
        for kind in ("user", "uts"):
            os.open(f"/proc/self/ns/{kind}", os.O_RDONLY)
        os.write(writing, b"x")
        signal.pause()
    try:
        assert os.read(reading, 1) == b"x"
        numbers = {kind: os.stat(f"/proc/{child}/ns/{kind}").st_ino for kind in ("user", "uts")}
        assert living.living(ask(numbers["uts"], ALICE), time.monotonic() + 60) == {numbers["uts"]}
        assert living.living(ask(numbers["user"], ALICE), time.monotonic() + 60) == set()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)


@contextlib.contextmanager
def sleeping(*uids, count=1, holds=()):
    """So many processes with these real, effective and saved uids: their pids."""
    pids = []
    try:
        for _ in range(count):
            reading, writing = os.pipe()
            pids.append(os.fork())
            if pids[-1] == 0:
                for number in set(range(3, 1000)) - {writing, *holds}:
                    with contextlib.suppress(OSError):
                        os.close(number)
                os.setresuid(*uids)
                os.close(writing)
                signal.pause()
            os.close(writing)
            os.read(reading, 1)  # the end: it is that user
            os.close(reading)
        yield pids
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@pytest.fixture(params=["6.13", "older"])
def kernel(request, monkeypatch):
    """Whether uids are told without the groups."""
    if request.param == "older":
        monkeypatch.setattr(namespaces, "uids_of", lambda _: None)
    return request.param


@pytest.mark.parametrize("uids", [(BOB, 0, 0), (BOB, ALICE, ALICE), (0, ALICE, BOB), (ALICE, BOB, ALICE)])
def test_one_that_any_id_of_a_process_is_the_owners_of_counts(network, kernel, uids):
    """So it is while a user runs a setuid program, and holds what it gave to that."""
    inode = os.fstat(network).st_ino
    with sleeping(*uids, holds=[network]):
        assert living.living(ask(inode, BOB), time.monotonic() + 60) == {inode}
        assert living.living(ask(inode, CAROL), time.monotonic() + 60) == set()


@pytest.fixture
def slow(monkeypatch):
    """Processes that take so long to look at, on a clock that only they move; which of them were looked at."""
    now_s, took_s, looked = [0.0], {}, []
    uids_of, entered = living._uids, living._entered

    def uids(pid):
        if int(pid) in took_s:
            looked.append(int(pid))
            now_s[0] += took_s[int(pid)]
        return uids_of(pid)

    def slowly_entered(folder, *rest, its):
        if its and int(folder.split("/")[2]) in took_s:
            now_s[0] += took_s[int(folder.split("/")[2])]
        return entered(folder, *rest, its=its)

    monkeypatch.setattr(living, "time", SimpleNamespace(monotonic=lambda: now_s[0], sleep=lambda _: None))
    monkeypatch.setattr(living, "_uids", uids)
    monkeypatch.setattr(living, "_entered", slowly_entered)
    return took_s, looked


def test_other_users_that_take_long_to_look_at_do_not_count_for_the_owner(network, kernel, slow):
    """LIVING_OTHERS_MS: 400 idle processes in 65,536 groups each had every other user refused."""
    took_s, looked = slow
    inode = os.fstat(network).st_ino
    with sleeping(ALICE, ALICE, ALICE, count=5) as pids:
        took_s.update(dict.fromkeys(pids, limits.LIVING_OTHERS_MS / 1000 / 2))
        assert living.living(ask(inode, BOB), limits.LIVING_SECONDS) == set()
        assert len(looked) == 2
        took_s.update(dict.fromkeys(pids, limits.LIVING_SECONDS * 2))
        assert living.living(ask(inode, BOB), 2 * limits.LIVING_SECONDS) == set()
        assert len(looked) == 3
        with sleeping(BOB, BOB, BOB, holds=[network]), sleeping(ALICE, ALICE, ALICE):
            assert living.living(ask(inode, BOB), 10 * limits.LIVING_SECONDS) == {inode}
        assert len(looked) == 3  # the owner's come first


@pytest.mark.parametrize("uids", [(BOB, BOB, BOB), (BOB, 0, 0), (ALICE, 0, 0), (BOB, ALICE, ALICE)])
def test_the_owners_that_take_long_count_and_so_do_roots(kernel, slow, uids):
    """Or a user would have as many as it likes: it would hold so much that nobody sees all of it in time."""
    took_s, _ = slow
    with sleeping(*uids, count=2) as pids:
        took_s.update(dict.fromkeys(pids, limits.LIVING_SECONDS * 2))
        assert living.living(ask(1, BOB), limits.LIVING_SECONDS) == {1}


def test_groups_of_other_users_cost_the_owner_little(network, monkeypatch):
    """Where the kernel tells uids with the groups alone, by the time that all of them take in this run."""
    inode = os.fstat(network).st_ino
    with crowd(ALICE, 400) as pids:
        began_s = time.monotonic()
        assert living.living(ask(inode, BOB), began_s + 60) == set()
        took_s = time.monotonic() - began_s
        monkeypatch.setattr(namespaces, "uids_of", lambda _: None)
        looked, uids_of = [], living._uids
        monkeypatch.setattr(living, "_uids", lambda pid: looked.append(int(pid)) or uids_of(pid))
        assert living.living(ask(inode, BOB), time.monotonic() + 60) == set()
        assert not set(pids) <= set(looked)
        began_s = time.monotonic()
        for pid in pids[::20]:
            uids_of(pid)
        assert took_s < (time.monotonic() - began_s) * 20 / 2


@contextlib.contextmanager
def doing(action, uid=BOB):
    """A process of a user that does this, and says so by a byte into the descriptor that it gets: its pid."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setpgid(0, 0)
            os.close(reading)
            os.setresuid(uid, uid, uid)
            action(writing)
            signal.pause()
        finally:
            os._exit(1)
    os.close(writing)
    try:
        assert os.read(reading, 1)
        yield child
    finally:
        os.close(reading)
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize("leader", ["ends", "has none"])
def test_descriptors_of_a_thread_alone_count(network, leader):
    """Where the first thread has ended, or the threads have no table together, /proc/PID/fd does not show them."""

    def has_it(said):
        if leader == "has none":
            assert harness.LIBC.unshare(_CLONE_FILES) == 0
        else:
            ended.wait()
        os.write(said, b"x")
        signal.pause()

    def starts(said):
        thread = threading.Thread(target=has_it, args=(said,))
        if leader == "ends":
            thread.start()
            ended.set()
            harness.LIBC.syscall({"x86_64": 60}.get(os.uname().machine, 93), 0)  # exit(2): of this thread alone
        os.dup2(network, said + 1)
        thread.start()
        thread.join(1)
        os.close(network)
        os.close(said + 1)
        signal.pause()

    ended = threading.Event()
    inode = os.fstat(network).st_ino
    with doing(starts) as pid:
        end_s = time.monotonic() + 30
        while inode in map(living._number, _links(f"/proc/{pid}/fd")):
            assert time.monotonic() < end_s
        assert living.living(ask(inode, BOB), time.monotonic() + 60) == {inode}
        assert living.living(ask(inode, ALICE), time.monotonic() + 60) == set()


def _links(folder):
    found = []
    for name in os.listdir(folder):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"{folder}/{name}"))
    return found


def test_a_table_that_threads_share_is_read_once(network, monkeypatch):
    """Or of an honest program with many threads not all would be seen in time."""

    def starts(said):
        for _ in range(50):
            threading.Thread(target=signal.pause).start()
        os.write(said, b"x")

    read, opened = [], living._opened
    monkeypatch.setattr(living, "_opened", lambda folder: read.append(folder) or opened(folder))
    with doing(starts) as pid:
        assert len(os.listdir(f"/proc/{pid}/task")) == 51
        assert living.living(ask(1, BOB), time.monotonic() + 60) == set()
        assert len([one for one in read if one.startswith(f"/proc/{pid}/")]) == 1


def test_a_process_that_cannot_be_looked_at_holds_all_that_is_the_owners(network, monkeypatch):
    inode, entered = os.fstat(network).st_ino, living._entered

    def forbidden(folder, *rest, **more):
        if folder.startswith(f"/proc/{pid}/"):
            raise PermissionError
        return entered(folder, *rest, **more)

    monkeypatch.setattr(living, "_entered", forbidden)
    with doing(lambda said: os.write(said, b"x")) as pid:
        assert living.living(ask(inode, BOB), time.monotonic() + 60) == {inode}
        assert living.living(ask(inode, ALICE), time.monotonic() + 60) == set()


def _own_mounts(place):
    """A user namespace, a mount namespace, and a file system of its own on `place`, with an empty folder."""
    harness.become_root_of_user_namespace()
    assert harness.LIBC.unshare(harness.CLONE_NEWNS) == 0
    harness.mount("none", "/", "", harness.MS_REC | harness.MS_PRIVATE)
    harness.mount("x", place, "tmpfs")
    os.mkdir(f"{place}/empty")


def _hide(place, how):
    """This process sees the folder alone from now on."""
    if how == "mounted":
        harness.mount(f"{place}/empty", f"{place}/empty", "", harness.MS_BIND)
    if how == "root mounted over":  # for who is above, or enters
        harness.mount(f"{place}/empty", "/", "", harness.MS_BIND)
    os.chroot(f"{place}/empty")
    os.chdir("/")


@pytest.fixture
def place():
    with harness.folder() as where:
        os.chmod(where, 0o755)
        (where / "mounts").mkdir(mode=0o755)
        yield str(where / "mounts")


@pytest.mark.parametrize("how", ["folder", "mounted", "root mounted over"])
def test_what_is_mounted_outside_of_its_roots_counts(network, place, how):
    """The kernel tells a process of no mount that is outside of its root: an empty folder hid all of them."""
    if how != "folder":
        harness.need_count_of_mounts()
    inode = os.fstat(network).st_ino

    def mounts(said):
        _own_mounts(place)
        open(f"{place}/namespace", "w").close()
        harness.mount(f"/proc/self/fd/{network}", f"{place}/namespace", "", harness.MS_BIND)
        os.close(network)
        _hide(place, how)
        os.write(said, b"x")

    with doing(mounts) as pid, open(f"/proc/{pid}/mountinfo") as file:
        assert "net:[" not in file.read()
        assert living.living(ask(inode, BOB), time.monotonic() + 60) == {inode}
        assert living.living(ask(inode, ALICE), time.monotonic() + 60) == set()


def test_what_one_process_does_not_see_of_the_mounts_another_may(network, place):
    """So it is where a program keeps a part of itself in an empty folder: that makes nothing living."""
    inode = os.fstat(network).st_ino

    def mounts(said):
        _own_mounts(place)
        os.close(network)
        if os.fork() == 0:
            _hide(place, "folder")
            os.write(said, b"x")

    with doing(mounts):
        assert living.living(ask(inode, BOB), time.monotonic() + 60) == set()


def test_a_root_of_ones_own_hides_nothing(network, place):
    """As containers have it: pivot_root(2), and what was before is mounted no more."""
    inode = os.fstat(network).st_ino

    def pivots(said):
        _own_mounts(place)
        os.chdir(place)
        os.mkdir("before")
        assert harness.LIBC.syscall({"x86_64": 155}.get(os.uname().machine, 41), b".", b"before") == 0
        os.chdir("/")
        assert harness.LIBC.umount2(b"/before", harness.MNT_DETACH) == 0
        os.close(network)
        os.write(said, b"x")

    with doing(pivots):
        assert living.living(ask(inode, BOB), time.monotonic() + 60) == set()


def _need_list_of_mount_namespaces():
    own = os.open("/proc/self/ns/mnt", os.O_RDONLY)
    try:
        os.close(namespaces.next_mount_namespace(own))
    except OSError as error:
        if error.errno != errno.ENOENT:
            harness.cannot(f"no list of mount namespaces, as Linux has from 6.12 on outside of containers: {error}")
    finally:
        os.close(own)


def test_a_mount_namespace_counts_that_only_a_message_holds(root):
    """No process has it open, so that no looking at processes finds it: its mounts are the service's memory."""
    _need_list_of_mount_namespaces()
    ours, theirs = socket.socketpair()

    def sends(said):
        harness.become_root_of_user_namespace()
        assert harness.LIBC.unshare(harness.CLONE_NEWNS) == 0
        held = os.open("/proc/self/ns/mnt", os.O_RDONLY)
        socket.send_fds(theirs, [os.fstat(held).st_ino.to_bytes(8, "big")], [held])
        assert harness.LIBC.unshare(harness.CLONE_NEWNS) == 0
        os.close(held)
        os.write(said, b"x")

    with ours, theirs, doing(sends):
        inode = int.from_bytes(ours.recv(8, socket.MSG_PEEK), "big")
        end_s = time.monotonic() + 60  # others that are ending hide it, as SECURITY.md says, and other tests end many
        while living.living(ask(inode, BOB), time.monotonic() + 60) != {inode}:
            assert time.monotonic() < end_s
            time.sleep(0.1)
        assert living.living(ask(inode, ALICE), time.monotonic() + 60) == set()
        ours.recv(8)
        end_s = time.monotonic() + 60
        while living.living(ask(inode, BOB), time.monotonic() + 60):
            assert time.monotonic() < end_s


def test_one_of_the_machines_user_namespace_counts_that_only_a_message_holds(root, monkeypatch):
    """As a program without a user namespace of its own gets it. One with that number that others are in is theirs."""
    ours, theirs = socket.socketpair()
    made = os.fork()
    if made == 0:
        harness.LIBC.unshare(harness.CLONE_NEWNS)
        held = os.open("/proc/self/ns/mnt", os.O_RDONLY)
        socket.send_fds(theirs, [b"x"], [held])
        os._exit(0)
    os.waitpid(made, 0)
    with ours, theirs:
        _, (held,), _, _ = socket.recv_fds(ours, 1, 1)
    inode = os.fstat(held).st_ino

    def following(before):
        if os.fstat(before).st_ino == inode:
            raise FileNotFoundError
        return os.dup(held)

    monkeypatch.setattr(namespaces, "next_mount_namespace", following)
    assert living.living(ask(inode, BOB), time.monotonic() + 60) == {inode}
    assert living.living(ask(inode + 1, BOB), time.monotonic() + 60) == set()
    for uid in (0, CAROL):
        back = os.open("/proc/self/ns/mnt", os.O_RDONLY)
        harness.LIBC.setns(held, harness.CLONE_NEWNS)
        with doing(lambda said: os.write(said, b"x"), uid):
            harness.LIBC.setns(back, harness.CLONE_NEWNS)
            assert living.living(ask(inode, BOB), time.monotonic() + 60) == set()
        os.close(back)
    os.close(held)


@pytest.mark.parametrize(("ending", "found"), [(5, True), (1000, False)])
def test_a_list_that_ends_early_is_asked_again(monkeypatch, ending, found):
    """While a mount namespace is ending, the kernel says that there are none behind it."""
    said = iter([FileNotFoundError] * ending)

    def following(_):
        for error in said:
            raise error
        return os.open("/dev/null", os.O_RDONLY)

    inode = os.stat("/dev/null").st_ino
    monkeypatch.setattr(namespaces, "next_mount_namespace", following)
    monkeypatch.setattr(living, "_is_of", lambda *_, **__: True)
    search = living._Search(ask(inode, BOB), time.monotonic() + 60)
    search._look_at_list(time.monotonic() + 60)
    assert (inode not in search.missing) is found


def _made_for(pid, kept):
    """What counts once a new mount namespace could not be given to that process; whoever made it lets `kept` have it."""
    there = answer._Work.make_there

    def ends(*asked):
        socket.send_fds(kept, [b"x"], [there(*asked)])
        os._exit(1)  # as its caller can have it end

    pidfd = os.pidfd_open(pid)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with mock.patch.object(answer._Work, "make_there", ends):
                wanted = (Wanted(Namespace("mnt")),)
                asked = Ask(1, BOB, BOB, wanted, maximum=4, uids=((BOB, BOB),))
                answer.answer(asked, pidfd, frozenset(), time.monotonic() + 60)
        except answer.Unfinished as unfinished:
            os.write(writing, " ".join(map(str, unfinished.known)).encode() or b"nothing")
        finally:
            os._exit(0)
    os.close(writing)
    os.close(pidfd)
    found = os.read(reading, 1000)
    os.close(reading)
    os.waitpid(child, 0)
    return found


def test_a_new_one_that_was_not_given_and_that_its_caller_has_counts(root):
    """Root of a user namespace opens it by its file handle while it is made there, and kills who makes it: 248 of 4."""
    _need_list_of_mount_namespaces()
    ours, theirs = socket.socketpair()

    def lives(said):
        harness.become_root_of_user_namespace()
        os.write(said, b"x")

    with ours, theirs, doing(lives) as pid:
        counts, end_s = False, time.monotonic() + 60
        while not counts:  # others that are ending hide it, as SECURITY.md says, and other tests end many
            assert time.monotonic() < end_s
            found = _made_for(pid, theirs)
            _, (held,), _, _ = socket.recv_fds(ours, 1, 1)
            counts = str(os.fstat(held).st_ino).encode() in found.split()
            os.close(held)
        nobody, nobodys = socket.socketpair()
        nobody.close()
        with nobodys:
            found = _made_for(pid, nobodys)  # it cannot keep it, so nothing counts
        assert found == b"nothing"
