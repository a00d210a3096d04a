"""T30: one user keeps the namespaces worker from serving others, or devices from being served."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import threading
import time
from pathlib import Path

import floods
import pytest
from harness import (
    ALICE,
    BOB,
    LIBC,
    RATES,
    Raw,
    as_user,
    become_root_of_user_namespace,
    descriptors_of,
    outcome,
    replaced_file,
    running,
)
from stopping import container, stopped
from subordinate import crowd

from fdbroker.errors import OpenFailed
from fdbroker.kernel import namespaces
from fdbroker.limits import every as limits
from fdbroker.namespaces import answer

_PR_SET_DUMPABLE = 4  # linux/prctl.h
POLICY = f"""
version: 1
limits: {{{RATES}, unread_grants: 1024}}
everyone: {{namespaces: [{{type: uts, create: true}}, {{type: [net, uts], of: caller}}], devices: [{{path: /dev/null}}]}}
"""
MANY = "limits: {namespaces: 64, "
NEW = {"namespace": {"type": "uts", "create": True}}


def _flood(address, resources, connections, stop):
    """Ask for all of these on so many connections at once, again and again: the outcomes that came."""
    found = set()
    if NEW in resources:
        become_root_of_user_namespace()
    while not os.path.exists(stop):
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(Raw(address)) for _ in range(connections)]
            for client in clients:
                client.send_call("io.fdbroker.Broker.Open", {"resources": resources})
            for client in clients:
                found.add(outcome(client.reply()))
    return sorted(found)


@contextlib.contextmanager
def flooded(broker, resources, connections):
    """While ALICE floods; afterwards the list has what she was answered."""
    stop, found = f"{broker.folder}/stop", []
    thread = threading.Thread(
        target=lambda: found.extend(as_user(ALICE, [], _flood, broker.socket, resources, connections, stop))
    )
    thread.start()
    try:
        yield found
    finally:
        open(stop, "w").close()
        thread.join()


def _ask_all(address):
    with Raw(address) as client:
        return [outcome(client.open("/dev/null")), outcome(client.ask(NEW))]


def _ask_and_wait(address, connections, ready):
    """Ask on so many connections, say when all are asked, and read the answers."""
    become_root_of_user_namespace()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Raw(address)) for _ in range(connections)]
        for client in clients:
            client.send_call("io.fdbroker.Broker.Open", {"resources": [NEW]})
        with Raw(address) as last:
            for _ in range(20):  # devices do not wait; those before these are asked by then
                assert outcome(last.open("/dev/null")) == "granted"
        os.write(ready, b"x")
        return [outcome(client.reply()) for client in clients]


def test_of_one_user_one_question_at_a_time_is_asked_and_others_come_between(dev):
    """The worker stands still until forty of ALICE's and one of BOB's wait, in this order."""
    with running(POLICY.replace("unread_grants", "namespaces: 64, unread_grants")) as broker:
        os.kill(broker.pids["worker"], signal.SIGSTOP)
        reading, writing = os.pipe()
        found, threads = {}, []
        for uid, connections in ((ALICE, 40), (BOB, 1)):

            def wait(uid=uid, connections=connections):
                found[uid] = as_user(uid, [], _ask_and_wait, broker.socket, connections, writing)

            threads.append(threading.Thread(target=wait))
            threads[-1].start()
            assert select.select([reading], [], [], 60)[0]
            os.read(reading, 1)
        os.kill(broker.pids["worker"], signal.SIGCONT)
        for thread in threads:
            thread.join()
        os.close(reading)
        os.close(writing)
        assert found == {ALICE: ["granted"] * 40, BOB: ["granted"]}
        order = [one["FDBROKER_UID"] for one in broker.records("granted") if one["FDBROKER_RESOURCE"] == "uts:new"]
        assert order.index(str(BOB)) < 5


def test_what_requests_hold_that_wait_for_more_is_bounded_and_others_are_served(dev):
    """Two descriptors for each namespace of a process, and sixty-four of them in a request."""

    def asks(address):
        LIBC.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)
        with Raw(address) as client:
            return outcome(client.ask({"namespace": {"type": "net", "pid": os.getpid()}}))

    def sleeps():
        LIBC.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)
        signal.pause()

    with running(POLICY) as broker:
        sleeper = os.fork()
        if sleeper == 0:
            with contextlib.suppress(BaseException):
                as_user(ALICE, [], sleeps)
            os._exit(0)
        end = time.monotonic() + 60
        while not (pid := _child_of(sleeper)):
            assert time.monotonic() < end
        most = 0
        try:
            resource = {"namespace": {"type": "net", "pid": pid}}
            with flooded(broker, [resource] * limits.RESOURCES_PER_OPEN, 12) as found:
                for _ in range(4):
                    assert as_user(BOB, [], asks, broker.socket) == "granted"
                    assert as_user(BOB, [], _ask_all, broker.socket) == ["granted", "granted"]
                    most = max(most, len(descriptors_of(broker.pids["opener"])))
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(sleeper, 0)
        assert "RateLimited" in found
        # its connections, what may wait, and the one request that is being answered
        assert most <= broker.idle["opener"] + 40 + limits.NAMESPACE_HELD + 2 * 2 * limits.RESOURCES_PER_OPEN
        broker.wait_idle()


def _child_of(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        found = file.read().split()
    return int(found[0]) if found else 0


def _fill(address, count):
    """So many at once, then one more, then again after one is closed; and one that only a process holds."""
    become_root_of_user_namespace()
    with Raw(address) as client:
        results = [outcome(client.ask(NEW)) for _ in range(count + 1)]
        reply = client.ask(NEW)
        os.close(client.descriptors.pop(0))
        results.append(outcome(client.ask(NEW)))
        # a process in it, and no descriptor
        descriptor = client.descriptors.pop(0)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            LIBC.setns(descriptor, namespaces.CLONE["uts"])
            os.close(descriptor)
            for other in client.descriptors:
                os.close(other)
            os.write(writing, b"x")
            signal.pause()
        os.read(reading, 1)
        os.close(descriptor)
        results.append(outcome(client.ask(NEW)))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        results.append(outcome(client.ask(NEW)))
        return [results, reply["parameters"]]


def test_a_user_has_so_many_living_namespaces_and_not_one_more(dev):
    with running(
        "version: 1\nlimits: {namespaces: 3}\neveryone: {namespaces: [{type: uts, create: true}], devices: [{path: /dev/null}]}\n"
    ) as broker:
        results, parameters = as_user(ALICE, [], _fill, broker.socket, 3)
        assert results == ["granted"] * 3 + ["QuotaExceeded", "granted", "QuotaExceeded", "granted"]
        assert parameters == {"limit": "namespaces", "maximum": 3}
        assert as_user(BOB, [], _ask_all, broker.socket)[1] == "granted"


def _at_once(address, counts):
    become_root_of_user_namespace()
    results = []
    for count in counts:
        with Raw(address) as client:
            results.append(outcome(client.ask(*[NEW] * count)))
    return results


def test_one_request_makes_no_more_than_may_live(dev):
    """Until it is answered the worker alone holds what it has made: looking at its user's processes finds none of it."""
    with running(POLICY.replace("limits: {", "limits: {namespaces: 3, ")) as broker:
        granted = ["granted", "QuotaExceeded", "QuotaExceeded", "granted"]
        assert as_user(ALICE, [], _at_once, broker.socket, [3, 4, 64, 3]) == granted


def _one_after_the_other(address, count):
    """One lives at any time, but for the last one."""
    results = []
    with Raw(address) as client:
        for _ in range(count):
            results.append(outcome(client.ask(NEW)))
            while client.descriptors:
                os.close(client.descriptors.pop())
        results.append(outcome(client.ask(NEW)))
        return [*results, outcome(client.ask(NEW))]


def test_idle_processes_of_one_user_do_not_make_anothers_namespaces_live(dev):
    """Each was in 65,536 groups, which the kernel wrote for whoever looked at its uids: 18 ms, and 400 were enough."""
    policy = POLICY.replace("limits: {", "limits: {namespaces: 1, ")
    with running(policy) as broker, crowd(ALICE, 400):
        assert as_user(BOB, [], _one_after_the_other, broker.socket, 3) == ["granted"] * 4 + ["QuotaExceeded"]


def _hide_among_many(address, seconds, keep):
    """Ask all the time, with a limit of two, while processes have so much open that looking at it takes long.

    One of `keep` living ones is looked for; beside it each that is made is closed.
    """
    resource.setrlimit(resource.RLIMIT_NOFILE, (5000, 5000))
    become_root_of_user_namespace()
    with Raw(address) as client:
        results = [outcome(client.ask(NEW)) for _ in range(2)]
        for _ in range(2 - keep):
            os.close(client.descriptors.pop())
        for _ in range(4500):
            os.dup(0)
        children = []
        for _ in range(4):
            children.append(os.fork())
            if children[-1] == 0:
                LIBC.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
                signal.pause()
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            results.append(outcome(client.ask(NEW)))
            while len(client.descriptors) > keep:
                os.close(client.descriptors.pop())
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return results


def _cpu_s(pid):
    """Of a process and its children that have ended."""
    with open(f"/proc/{pid}/stat") as file:
        return sum(map(int, file.read().rpartition(")")[2].split()[11:15])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize(("keep", "last"), [(2, "QuotaExceeded"), (1, "granted")])
def test_looking_at_what_an_owner_holds_takes_a_fifth_of_a_cpu(dev, keep, last):
    """LIVING_RESTS: it was two thirds of a CPU, and nobody was charged for it. Others do not wait for that."""
    with running(POLICY.replace("limits: {", "limits: {namespaces: 2, ")) as broker:
        began_s, before_s = time.monotonic(), _cpu_s(broker.pids["worker"])
        found = as_user(ALICE, [], _hide_among_many, broker.socket, 6, keep)
        used = (_cpu_s(broker.pids["worker"]) - before_s) / (time.monotonic() - began_s)
        assert (set(found[:2]), set(found[2:])) == ({"granted"}, {last})
        assert used < 0.35
        assert as_user(BOB, [], _ask_all, broker.socket) == ["granted", "granted"]


UIDS = 70  # of one user: many more than the worker has places
CROWD = range(60_000, 60_000 + 2 * limits.NAMESPACE_REQUESTS)  # of users, each an owner, so that some may be too quick
PLACES = limits.NAMESPACE_REQUESTS - 4  # for new namespaces, never all of them: namespaces/test_queue.py
ABROAD = POLICY.replace("[{type: uts", "[{type: mnt, create: true}, {type: uts").replace("limits: {", MANY)


@contextlib.contextmanager
def asked(broker, first, count):
    """Of a container whose users have all asked, before the worker may go on; it goes on at the end at the latest."""

    def asks(address):
        with Raw(address) as client:
            return [outcome(client.open("/dev/null")) for _ in range(20)]

    os.kill(broker.pids["worker"], signal.SIGSTOP)
    try:
        with container(broker.socket, first, count) as made:
            assert as_user(BOB, [], asks, broker.socket) == ["granted"] * 20  # what was sent before has come by now
            yield made
    finally:
        os.kill(broker.pids["worker"], signal.SIGCONT)


def _waits(broker, *, stops):
    """How long BOB waits for a new namespace behind those of CROWD, and how many of their children were stopped at once."""
    reading, writing = os.pipe()
    found, most = [], 0
    thread = threading.Thread(target=lambda: found.append(as_user(BOB, [], _ask_and_wait, broker.socket, 1, writing)))
    with asked(broker, CROWD[0], len(CROWD)) as attack:
        thread.start()
        assert select.select([reading], [], [], 60)[0]
        if stops:
            attack.stop_all()
        began_s = time.monotonic()
        os.kill(broker.pids["worker"], signal.SIGCONT)
        while thread.is_alive():
            most = max(most, len(stopped(broker.pids["worker"])))
            thread.join(0.02)
        took_s = time.monotonic() - began_s
    os.close(reading)
    os.close(writing)
    return found[0][0], took_s, most


@pytest.mark.timing
def test_a_place_that_a_stopped_child_has_is_free_after_half_a_second_for_those_who_wait(dev):
    """NAMESPACE_STOPPED_MS, not NAMESPACE_SECONDS, where other owners have all places for new ones, and stop all there.

    It is BOB's turn after two or three of these; each would be four seconds and more without that.
    """
    lines = "".join(f"u{uid}:x:{uid}:{uid}::/:/usr/sbin/nologin\n" for uid in CROWD)
    with replaced_file("/etc/passwd", Path("/etc/passwd").read_text() + lines), running(ABROAD) as broker:
        quiet = [_waits(broker, stops=False) for _ in range(3)]
        assert {answer for answer, _, _ in quiet} == {"granted"}
        for _ in range(5):  # a child that was quicker than who stops it has left a place
            answer, took_s, most = _waits(broker, stops=True)
            print(f"BOB waits {took_s:.2f} s, {answer}, of stopped ones at once {most}; else {max(quiet)[1]:.2f} s")
            if most >= PLACES:
                break
        assert most == PLACES
        assert answer == "granted"
        assert took_s - max(quiet)[1] < limits.NAMESPACE_SECONDS / 2


def test_a_user_that_stops_the_children_of_all_its_uids_has_one_place_and_others_are_served_at_once(dev):
    """One of them is stopped at a time, for half a second; before it is killed BOB is answered."""
    with replaced_file("/etc/subuid", floods.SUBUID), running(ABROAD) as broker:
        worker = broker.pids["worker"]
        with asked(broker, floods.FIRST, UIDS) as attack:
            attack.stop_all()
            os.kill(worker, signal.SIGCONT)
            seen, meanwhile, end_s = set(), 0, time.monotonic() + 60
            while meanwhile < 3:
                assert time.monotonic() < end_s, f"{len(seen)} were stopped, and BOB served {meanwhile} times meanwhile"
                before = stopped(worker)
                assert len(before) <= 1
                if before - seen:
                    seen |= before
                    assert as_user(BOB, [], _ask_all, broker.socket) == ["granted", "granted"]
                    meanwhile += stopped(worker) == before
                time.sleep(0.01)


class _StoppedThere(answer._Work):
    """A child that its caller stops, as it may once the child is in its user namespace; or that only takes its time."""

    def __init__(self, signal_number):
        self._signal = signal_number
        self.until_s = time.monotonic() + limits.NAMESPACE_SECONDS

    def make_there(self, *_):
        if self._signal:
            os.kill(os.getpid(), self._signal)
        time.sleep(limits.NAMESPACE_STOPPED_MS * 2 / 1000)
        return os.open("/dev/null", os.O_RDONLY)


def test_a_child_that_its_caller_stops_holds_up_nobody():
    """NAMESPACE_STOPPED_MS, and not NAMESPACE_SECONDS as for one that works."""
    began_s = time.monotonic()
    with pytest.raises(OpenFailed, match="ETIMEDOUT"):
        _StoppedThere(signal.SIGSTOP).make("uts", None, None)
    took_ms = (time.monotonic() - began_s) * 1000
    assert limits.NAMESPACE_STOPPED_MS <= took_ms < limits.NAMESPACE_SECONDS * 1000 / 2
    with contextlib.suppress(ChildProcessError):
        assert os.waitpid(-1, os.WNOHANG) == (0, 0)
    os.close(_StoppedThere(0).make("uts", None, None))
