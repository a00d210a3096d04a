"""Faults of what the service stands on: a disk that is full, a journal that goes, a policy that is garbage while it is read.

What a process that dies or hangs does under the shipped units is in tests/system/test_faults.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import threading
import time
from collections import Counter

import harness
import pytest
from harness import ALICE, BOB, CAROL, as_user, running
from system.inside.load import NAMESPACER, OPENERS, POLICY, RECEIVER, SENDERS, Load

import fdbroker
from fdbroker.errors import QuotaExceeded

MAIL = f"""
version: 1
topics: {{mail: {{deliver: [queue]}}, brief: {{deliver: [queue], keep: 2s}}}}
limits: {{stored_messages: 100000, stored_bytes: 1073741824, requests_per_second: 1000000, burst: 1000000}}
users:
  {ALICE}: {{send: [mail, brief]}}
  {BOB}: {{subscribe: [mail, brief]}}
"""


@pytest.fixture
def state():
    """Where messages are stored, in a folder that is root's alone."""
    with harness.folder() as where:
        yield str(where / "state")


@contextlib.contextmanager
def small_disk(mebibytes):
    """A folder on a file system of that size, which is root's alone."""
    with harness.folder() as where:
        disk = where / "disk"
        disk.mkdir()
        harness.mount("small", str(disk), "tmpfs", 0, f"mode=0755,size={mebibytes}m")
        try:
            yield disk
        finally:
            harness.unmount(str(disk))


def fill(disk):
    """Another program takes all the room that is left."""
    with open(disk / "other", "ab", buffering=0) as file:
        with pytest.raises(OSError, match="No space left"):
            while True:
                file.write(bytes(4096))


def send_until_full(address, topic, size, most):
    """How many messages were said to be stored before the first that was not; most at the end."""
    with fdbroker.connect(address) as client:
        for number in range(most):
            try:
                client.send(topic, f"{number} ".ljust(size, "x"))
            except QuotaExceeded as refusal:
                return number if refusal.limit == "store_bytes" else -1
    return most


def receive_all(address, acknowledge=True):
    """The numbers that the payloads begin with, all of them, each acknowledged in the next call."""
    got, last = [], []
    with fdbroker.connect(address) as client:
        after = 0
        while True:
            messages = client.receive(1000, last if acknowledge else ())
            messages = [one for one in messages if one.number > after]
            if not messages:
                return got
            got += [int(one.payload.split()[0]) for one in messages]
            last = [one.number for one in messages]
            after = last[-1]


@pytest.mark.parametrize("size", [10, 60_000])
def test_on_a_full_disk_what_was_stored_is_received_and_acknowledged_and_later_more_is_stored(dev, size):
    """The disk is filled by other programs too, so not even the database's log can grow."""
    with small_disk(40) as disk:
        state = ("--state", str(disk / "state"))
        with running(MAIL, *state) as broker:
            first = as_user(ALICE, [], send_until_full, broker.socket, "mail", size, 200)
            fill(disk)
            second = as_user(ALICE, [], send_until_full, broker.socket, "mail", size, 20_000)
            assert second < 20_000
            fill(disk)
            assert os.statvfs(disk).f_bavail == 0
            assert "messages cannot be stored: " in broker.text()
            # all of it is there, and goes, although there is no room for anything
            assert as_user(BOB, [], receive_all, broker.socket) == [*range(first), *range(second)]
            assert as_user(BOB, [], receive_all, broker.socket) == []
            (disk / "other").unlink()
            time.sleep(1.1)
            assert as_user(ALICE, [], send_until_full, broker.socket, "mail", size, 50) == 50
        with running(MAIL, *state) as broker:
            assert as_user(BOB, [], receive_all, broker.socket) == [*range(50)]


def test_killed_on_a_full_disk_it_starts_again_and_lets_acknowledge(dev):
    with small_disk(40) as disk:
        state = ("--state", str(disk / "state"))
        with running(MAIL, *state) as broker:
            fill(disk)
            stored = as_user(ALICE, [], send_until_full, broker.socket, "mail", 1000, 20_000)
            fill(disk)
            broker.expected_code = None
            os.kill(broker.pids["inbox"], 9)
            broker.process.wait(60)
        fill(disk)
        with running(MAIL, *state) as broker:
            assert as_user(BOB, [], receive_all, broker.socket) == [*range(stored)]
        with running(MAIL, *state) as broker:
            assert as_user(BOB, [], receive_all, broker.socket) == []


def test_on_a_full_disk_what_is_over_goes_and_makes_room(dev):
    with small_disk(40) as disk, running(MAIL, "--state", str(disk / "state")) as broker:
        as_user(ALICE, [], send_until_full, broker.socket, "brief", 60_000, 100)
        fill(disk)
        kept = as_user(ALICE, [], send_until_full, broker.socket, "mail", 60_000, 20_000)
        fill(disk)
        time.sleep(2.1)
        end = time.monotonic() + 20
        while as_user(ALICE, [], send_until_full, broker.socket, "mail", 60_000, 10) < 10:
            assert time.monotonic() < end, broker.text()
            time.sleep(0.2)
        assert len(as_user(BOB, [], receive_all, broker.socket)) >= kept + 10


def test_without_room_for_the_reserve_nothing_new_is_stored(dev):
    with small_disk(8) as disk, running(MAIL, "--state", str(disk / "state")) as broker:
        assert as_user(ALICE, [], send_until_full, broker.socket, "mail", 10, 10) == 0
        assert "messages cannot be stored: the disk is full: there is no room for the reserve" in broker.text()


# ---- what happens under load

LOADED = POLICY.replace('"1:5"}]', '"1:5"}, {path: /dev/lab/other, class: mem}]')


@contextlib.contextmanager
def loaded(broker):
    """Load from users without rights; `with` ends once they have ended."""
    with harness.folder() as where, Load(where / "load", [], broker.socket) as load:
        yield load


def judge(load, texts, *, rights_change=False):
    """Nothing granted unrecorded, nothing stored lost, nobody stuck; `texts` are the logs of all brokers.

    With `rights_change` the policy takes a topic away from time to time: what is acknowledged then comes again.
    """
    records = [json.loads(line) for text in texts for line in text.splitlines() if line.startswith("{")]
    kinds = Counter((one["FDBROKER_UID"], one["MESSAGE_ID"][-3:]) for one in records if "FDBROKER_UID" in one)
    for said in load.said.values():
        assert "error" not in said, said["error"]
    for uid in (*OPENERS, NAMESPACER):
        got = len(load.said[uid]["at_s"])
        assert got > 5
        assert kinds[str(uid), "a01"] - kinds[str(uid), "a03"] >= got
        assert not load.said[uid].get("wrong")
    for uid in SENDERS:
        stored, received = set(load.said[uid]["stored"]), set(load.said[RECEIVER]["received"][str(uid)])
        assert len(stored) > 5
        assert stored <= received
    assert rights_change or load.said[RECEIVER]["again"] == 0


def refusals(load):
    return {kind for said in load.said.values() for kind in said["found"]}


def test_garbage_in_the_policys_place_gives_nobody_anything(dev, state):
    """Written over and over, in pieces, while it is loaded. What is valid although its end is missing allows less."""
    harness.node("/dev/lab/zero", os.makedev(1, 5))
    harness.node("/dev/lab/other", os.makedev(1, 3))
    rand = random.Random(3)
    whole = [POLICY.encode(), LOADED.encode()]

    def never(address, seconds):
        """How often somebody without a rule was granted something."""
        end_s, granted = time.monotonic() + seconds, 0
        with harness.Raw(address) as client:
            while time.monotonic() < end_s:
                granted += "error" not in client.open("/dev/lab/other")
        return granted

    def garbage():
        text = rand.choice(whole)
        cut = rand.randrange(len(text))
        return rand.choice([b"", b"\0" * 100, rand.randbytes(2000), text[:cut], text[:cut] + b"\n  x: [", text[cut:]])

    with running(POLICY, "--state", state) as broker:
        with loaded(broker) as load:
            reader = threading.Thread(target=lambda: found.append(as_user(CAROL, [], never, broker.socket, 5)))
            found = []
            reader.start()
            end_s = time.monotonic() + 5
            while time.monotonic() < end_s:
                with broker.policy.open("wb", buffering=0) as file:
                    for part in (garbage(), rand.choice(whole)) if rand.random() < 0.7 else (garbage(),):
                        file.seek(0)
                        file.truncate()
                        for first in range(0, len(part), 200):
                            file.write(part[first : first + 200])
                            if rand.random() < 0.2:
                                broker.process.send_signal(signal.SIGHUP)
                        time.sleep(rand.uniform(0, 0.03))
            reader.join()
        assert found == [0]
        assert broker.text().count("is NOT reloaded") > 3
        judge(load, [broker.text()], rights_change=True)
        assert refusals(load) <= {"Denied", "TopicDenied"}
        broker.reload(LOADED)
        assert "the policy is reloaded" in broker.text()
        broker.wait_idle()


def test_a_node_that_comes_goes_and_changes_between_the_stages_is_the_right_one_or_refused(dev, state):
    """Every descriptor that anyone got is the policy's device, whatever was at its name a moment before and after."""
    harness.node("/dev/lab/zero", os.makedev(1, 5))
    rand = random.Random(7)
    with running(POLICY, "--state", state) as broker:
        with loaded(broker) as load:
            end_s = time.monotonic() + 5
            while time.monotonic() < end_s:
                os.unlink("/dev/lab/zero")
                time.sleep(rand.choice((0, 0, 0.002)))
                harness.node("/dev/lab/zero", os.makedev(1, rand.choice((3, 8))))
                time.sleep(rand.choice((0, 0, 0.002)))
                harness.node("/dev/lab/new", os.makedev(1, 5))
                os.rename("/dev/lab/new", "/dev/lab/zero")
                time.sleep(rand.uniform(0, 0.01))
        judge(load, [broker.text()])
        assert refusals(load) <= {"NoSuchResource", "NotWhatItWas", "OpenFailed"}
        assert refusals(load)
        broker.wait_idle()


MEMORY = "/sys/fs/cgroup/memory"


@contextlib.contextmanager
def no_memory():
    """`take(pid)` leaves a process without a page more: the kernel kills it, out of memory. `kills()` counts these."""
    one = os.path.exists(f"{MEMORY}/cgroup.procs")  # version 1 of control groups, or 2
    parent = MEMORY if one else "/sys/fs/cgroup"
    group = f"{parent}/fdbroker-test-{os.getpid()}"
    try:
        os.mkdir(group)
    except OSError as error:
        harness.cannot(f"no memory control group can be made: {error}")
    try:
        limit = f"{group}/memory.limit_in_bytes" if one else f"{group}/memory.max"
        if not os.path.exists(limit):
            harness.cannot("this machine has no memory controller")

        def write(path, text):
            with open(path, "w") as file:
                file.write(text)

        def take(pid):
            write(limit, "0")  # what it has counts for the group that it comes from
            write(f"{group}/cgroup.procs", str(pid))

        def kills():
            with open(f"{group}/memory.oom_control" if one else f"{group}/memory.events") as file:
                return int(next(line.split()[1] for line in file if line.startswith("oom_kill ")))

        yield take, kills
    finally:
        os.rmdir(group)


def test_killed_by_the_kernel_out_of_memory_nothing_is_granted_unrecorded_or_lost(dev, state):
    """A real one, in a control group, of each process in turn; the test starts the next broker as systemd does."""
    harness.node("/dev/lab/zero", os.makedev(1, 5))
    texts = []
    with harness.folder() as where, no_memory() as (take, kills):
        broker = harness.Broker(where, POLICY, ("--state", state))
        try:
            broker.wait_ready()
            idle = broker.idle
            with loaded(broker) as load:
                for number, name in enumerate(("opener", "keeper", "inbox", "launcher"), 1):
                    time.sleep(0.5)
                    take(broker.pids[name])
                    if name in ("launcher", "keeper"):  # for both a reload takes memory
                        broker.process.send_signal(signal.SIGHUP)
                    broker.process.wait(20)
                    assert kills() == number
                    texts.append(broker.text())
                    end_s = time.monotonic() + 10
                    while any(os.path.exists(f"/proc/{pid}") for pid in broker.pids.values()):
                        assert time.monotonic() < end_s, "processes are left over"
                        time.sleep(0.02)
                    broker = harness.Broker(where, POLICY, ("--state", state))
                    broker.wait_ready()
                time.sleep(0.5)
            texts.append(broker.text())
            judge(load, texts)
            broker.idle = idle  # of the one that began without load
            broker.wait_idle()
            assert broker.stop() == 0
        finally:
            broker.process.kill()
            broker.process.wait()


@pytest.mark.parametrize("name", ["opener", "keeper", "inbox", "witness"])
def test_a_process_that_does_not_stop_in_its_time_is_ended(dev, name):
    """Nothing of it is left, and the launcher says nothing but that it stops: also on a machine that is slow.

    Nor does it ask for signs of life any more, of processes that have ended.
    """
    environment = {"PATH": os.environ["PATH"], "WATCHDOG_USEC": "200000"}
    with running(harness.EVERYONE_NULL, environment=environment) as broker:
        os.kill(broker.pids[name], signal.SIGSTOP)
        assert broker.stop() == 0
        assert [pid for pid in broker.pids.values() if os.path.exists(f"/proc/{pid}")] == []
        assert "Traceback" not in broker.text()


# ---- the keeper

LIST = "io.fdbroker.Broker.List"


@contextlib.contextmanager
def watched_over():
    """A broker that has a watchdog, and how many signs of life came in so many seconds."""
    with harness.folder() as where, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(where / "notify"))
        environment = {"PATH": os.environ["PATH"], "NOTIFY_SOCKET": str(where / "notify"), "WATCHDOG_USEC": "1000000"}

        def signs(seconds):
            """The first half second is for what was on its way."""
            found, begin_s = 0, time.monotonic()
            while (left_s := begin_s + seconds - time.monotonic()) > 0:
                manager.settimeout(left_s)
                with contextlib.suppress(TimeoutError):
                    said = manager.recv(4096)
                    found += said == b"WATCHDOG=1" and time.monotonic() > begin_s + 0.5
            return found

        with running(harness.EVERYONE_NULL, environment=environment) as broker:
            yield broker, signs


@pytest.mark.parametrize("name", ["keeper", "opener", "inbox"])
def test_the_watchdog_notices_who_hangs_and_no_other_speaks_for_it(dev, name):
    with watched_over() as (broker, signs):
        assert signs(2.5) >= 2
        os.kill(broker.pids[name], signal.SIGSTOP)
        assert signs(3) == 0
        os.kill(broker.pids[name], signal.SIGCONT)
        assert signs(3) >= 2


def test_while_the_keeper_hangs_lists_wait_and_who_is_connected_does_not_notice(dev):
    """Who comes waits, and is served when it goes on."""
    with running(harness.EVERYONE_NULL) as broker:
        with harness.Raw(broker.socket) as client, harness.Raw(broker.socket) as lists:
            assert harness.outcome(client.open("/dev/null")) == "granted"
            first = lists.call(LIST)
            assert harness.outcome(first) == "granted"
            os.kill(broker.pids["keeper"], signal.SIGSTOP)
            lists.send_call(LIST)
            late = [harness.Raw(broker.socket) for _ in range(20)]
            for one in late:
                one.send_call("io.fdbroker.Broker.Open", {"resources": [{"device": "/dev/null", "access": "ro"}]})
            late[0].sock.settimeout(0.5)
            with pytest.raises(TimeoutError):
                late[0].reply()
            for _ in range(20):
                assert harness.outcome(client.open("/dev/null")) == "granted"
            lists.sock.settimeout(0.5)
            with pytest.raises(TimeoutError):
                lists.reply()
            os.kill(broker.pids["keeper"], signal.SIGCONT)
            for one in (lists, *late):
                one.sock.settimeout(harness.PATIENCE_S)
            assert lists.reply() == first
            for one in late:
                assert harness.outcome(one.reply()) == "granted"
                one.close()
        broker.wait_idle()


def test_the_keeper_killed_while_lists_are_made_ends_the_service_and_nobody_waits(dev):
    with running(harness.EVERYONE_NULL) as broker:
        broker.expected_code = None
        with harness.Raw(broker.socket) as watches, harness.Raw(broker.socket) as lists:
            watches.send_call(LIST, more=True)
            assert watches.reply()
            os.kill(broker.pids["keeper"], signal.SIGSTOP)
            lists.send_call(LIST)
            os.kill(broker.pids["keeper"], signal.SIGKILL)
            assert lists.reply() is None
            assert watches.reply() is None
        assert broker.process.wait(20) == 70
        assert re.search(r"the keeper (was killed|ended with signal 9)", broker.text()), broker.text()
