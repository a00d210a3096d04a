"""T47: one user's flood slows another."""

from __future__ import annotations

import contextlib
import subprocess
import time

import floods
import harness
import pytest
from floods import PING, TOGETHER, Victim, connected, felt, flooding, frame
from harness import ALICE, BOB, EVERYONE_NULL, Raw, as_user, ask, outcome, running

# what the design asks for is 2; on a machine that does other things as well a p99 of some hundred requests is not exact,
# beside virtual machines it was 3.8 once, and without what holds a flood back it is 9 to 25
MOST = 5.0
# What a process may have more of memory after floods than before its first client, in KiB: 3 MiB was the most that was
# seen, in the inbox, a moment after TOGETHER; after a second of each of FLOODS, one after the other, it was 1 MiB.
GROWN = 8192
CONNECTS = tuple(name for name, flood in floods.FLOODS.items() if flood.__qualname__.startswith("connecting"))


@pytest.fixture
def broker(dev):
    with harness.replaced_file("/etc/subuid", floods.SUBUID), harness.folder() as where:
        with running(floods.POLICY, "--state", str(where / "state")) as made:
            yield made


def _has(broker):
    """Descriptors, threads and children of each process; and its memory, in KiB."""
    counts, memory = {}, {}
    for name, pid in broker.pids.items():
        status = harness.status_of(pid)
        children = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
        counts[name] = (len(harness.descriptors_of(pid)), int(status["Threads"]), sorted(children))
        memory[name] = int(status["VmRSS"].split()[0])
    return counts, memory


def test_after_floods_nothing_of_them_is_left_in_the_broker(broker):
    """Together, and of each kind that connects without end, with nobody there for whom they would be slowed."""
    before, memory = _has(broker)
    assert CONNECTS == ("connects", "connects, PING", "garbage")
    come = 0
    for names in (TOGETHER, *((name,) for name in CONNECTS)):
        wanted, rounds = come + 10, 0
        while come <= wanted:  # until the flood was there
            assert rounds < 10, (names, come)
            rounds += 1
            with flooding(broker.socket, *names):
                time.sleep(1.5)
            end = time.monotonic() + 30
            while (left := _has(broker))[0] != before:
                assert time.monotonic() < end, (names, left, before)
                time.sleep(0.05)
            grown = {name: left[1][name] - memory[name] for name in memory}
            assert max(grown.values()) < GROWN, (names, grown)
            assert as_user(BOB, [], ask, broker.socket, "/dev/null") == "granted"
            come = int(broker.records("granted")[-1]["FDBROKER_CONNECTION"])


@pytest.mark.parametrize(
    "names", [("Open",), ("Open of 64",), ("connects",), TOGETHER, ("Open, as 700 uids",)], ids=", ".join
)
@pytest.mark.timing
def test_the_broker_does_little_for_a_flood_while_another_waits(broker, names):
    """Judged by the time from request to answer, or by what its processes worked meanwhile, whichever is less.

    The time has in it what else the machine does; the work, of a process that is working on another CPU just then, is
    brought up to date by the kernel at each tick only. Without what holds a flood back both are far above. What else
    the machine does may also keep the other user from taking its answer, so the best of three counts.
    """
    for _ in range(3):
        found = felt(broker, names, rounds=1)
        over = {kind: (one.time, one.work) for kind, one in found.items() if min(one.time, one.work) >= MOST}
        if not over:
            break
    assert not over
    # of many uids the owner's first refusals are written, whatever they are, and the others counted
    broker.wait_for('"FDBROKER_DECISION": "deny"' if " uids" in names[0] else "slowed")


def test_a_flood_is_answered_whole_and_in_order(dev):
    def flood(address):
        with contextlib.closing(connected(address)) as sock:
            sock.settimeout(60)
            count, got = 12_000, b""
            for _ in range(count // 1000):
                sock.sendall((PING * 999) + frame(b"x"))
                while len(got) < 8 * 999 + 4:
                    got += sock.recv(65536)
                if got != frame(b"PONG") * 999 + b"\0\0\0\x0d":
                    return got[-100:].decode(errors="replace")
                got = b""
        return "all of it"

    with running(EVERYONE_NULL + "limits: {requests_per_second: 200, burst: 100}\n") as broker:
        with Victim(broker) as victim:
            victim.link.send(0)  # it only is there
        with Raw(broker.socket) as other:
            reply = outcome(other.call("org.varlink.service.GetInfo"))
            assert reply == "granted"
            assert as_user(ALICE, [], flood, broker.socket) == "all of it"


def _ping_pong(address):
    with contextlib.closing(connected(address)) as sock:
        sock.settimeout(30)
        began = time.monotonic()
        for _ in range(3000):
            sock.sendall(PING)
            assert sock.recv(100) == frame(b"PONG")
        return time.monotonic() - began


def test_who_is_alone_is_not_slowed(dev):
    """Far above its budget, which a second user's presence would make it wait for."""
    with running(EVERYONE_NULL + "limits: {requests_per_second: 1, burst: 1}\n") as broker:
        as_user(ALICE, [], _ping_pong, broker.socket)
        assert "slowed" not in broker.text()


def test_who_is_not_alone_is_slowed_and_it_is_recorded(dev):
    with running(EVERYONE_NULL + "limits: {requests_per_second: 100, burst: 100}\n") as broker:
        with flooding(broker.socket, "PING"):
            end = time.monotonic() + 20
            while not broker.records("slowed"):
                assert time.monotonic() < end
                with contextlib.closing(connected(broker.socket)) as sock:
                    sock.sendall(PING)
                    sock.recv(100)
                time.sleep(0.05)
        assert broker.records("slowed")[0]["FDBROKER_UID"] == str(floods.MALLORY)


def test_a_connect_storm_holds_up_its_own_user_alone_and_not_for_long(dev):
    with running(EVERYONE_NULL + "limits: {requests_per_second: 50, burst: 50}\n") as broker:
        with flooding(broker.socket, "connects"):
            end = time.monotonic() + 20
            while not broker.records("slowed"):  # only while another user has work, too
                assert time.monotonic() < end
                assert as_user(BOB, [], ask, broker.socket, "/dev/null") == "granted"
            for _ in range(20):
                assert as_user(BOB, [], ask, broker.socket, "/dev/null") == "granted"
        end = time.monotonic() + 10
        while as_user(floods.MALLORY, [], ask, broker.socket, "/dev/null") != "granted":
            assert time.monotonic() < end
            time.sleep(0.1)
        broker.wait_idle()


def test_a_client_that_breaks_dozens_of_connections_is_let_in(dev):
    with running(EVERYONE_NULL) as broker:
        for _ in range(30):
            with Raw(broker.socket) as client:
                client.sock.sendall(b"\xff\xff\xff\xff")
                client.sock.recv(10)
        assert "slowed" not in broker.text()
        for _ in range(10):
            with Raw(broker.socket) as client:
                client.sock.sendall(b"\xff\xff\xff\xff")
                client.sock.recv(10)
        began = time.monotonic()
        assert ask(broker.socket, "/dev/null") == "granted"
        assert time.monotonic() - began < 10
        broker.wait_for("slowed")
