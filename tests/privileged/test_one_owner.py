"""What counts for an owner counts for all its uids together: in the inbox, for the worker, on a desktop.

MALLORY asks by subordinate uids. BOB is another owner, for whom nothing of that counts.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
from concurrent.futures import ThreadPoolExecutor

import floods
import pytest
from buses import bob_session, open_folder, send
from harness import BOB, PATIENCE_S, RATES, Raw, as_user, folder, outcome, replaced_file, running
from subordinate import Many

from fdbroker.limits import every as limits

MALLORY, FIRST = floods.MALLORY, floods.FIRST
UIDS = (MALLORY, FIRST, FIRST + 65_535)
AGAIN, NO_SPACE = 11, 28  # EAGAIN, ENOSPC
NEW = {"namespace": {"type": "uts", "create": True}}


@pytest.fixture(autouse=True)
def subordinate(root):
    """MALLORY has the uids from FIRST on."""
    with replaced_file("/etc/subuid", floods.SUBUID):
        yield


def _sent(address, count, payload="x"):
    """The statuses of so many frames, all sent at once."""
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as sock:
        sock.settimeout(15)
        sock.connect(address)
        sock.sendall(floods.frame(payload.encode()) * count)
        said = b""
        while len(said) < 4 * count:
            said += sock.recv(4 * count)
        return list(struct.unpack(f"!{count}I", said))


def _each(broker, count, payload="x"):
    """For each uid of MALLORY, and last for BOB: how many of so many frames were taken, and how the others ended."""
    found = [as_user(uid, [], _sent, broker.socket, count, payload) for uid in (*UIDS, BOB)]
    return [statuses.count(0) for statuses in found], {status for statuses in found for status in statuses}


@pytest.mark.parametrize(
    ("deliver", "maxima", "count"),
    [
        ("subscribers", "requests_per_second: 1, burst: 100", 100),
        ("journal", f"records_per_second: 1, record_burst: {100 * limits.RECORDS_PER_MESSAGE}", 100),
    ],
    ids=["messages", "records"],
)
def test_all_uids_of_a_user_send_at_one_rate(dev, deliver, maxima, count):
    """Each uid sends a whole burst; what all of them get through is one, and what a second more each brought."""
    policy = (
        f"version: 1\ntopics: {{inbox: {{deliver: [{deliver}]}}}}\nlimits: {{{maxima}}}\neveryone: {{send: [inbox]}}\n"
    )
    with running(policy) as broker:
        (*mallorys, bobs), statuses = _each(broker, count)
        assert mallorys[0] == bobs == count
        assert sum(mallorys) < 2 * count
        assert statuses == {0, AGAIN}


@pytest.mark.parametrize(
    ("maxima", "payload"),
    [("stored_messages: 5", "x"), ("stored_bytes: 55000", "x" * 10000)],
    ids=["messages", "bytes"],
)
def test_all_uids_of_a_user_store_together_what_it_may(dev, maxima, payload):
    """Three messages of each uid, of which the user may store five, or 55,000 bytes."""
    policy = f"version: 1\ntopics: {{inbox: {{deliver: [queue]}}}}\nlimits: {{{maxima}}}\neveryone: {{send: [inbox]}}\n"
    policy += f"users: {{{BOB}: {{subscribe: [inbox]}}}}\n"
    with folder() as where, running(policy, "--state", str(where / "state")) as broker:
        found, statuses = _each(broker, 3, payload)
        assert found == [3, 2, 0, 3]
        assert statuses == {0, NO_SPACE}


def test_all_uids_of_a_user_rest_together(dev):
    """What one uid does beyond its user's budget, another one waits for: BOB's later PINGs are answered before."""
    policy = f"version: 1\nlimits: {{requests_per_second: 1, burst: 10}}\nusers: {{{BOB}: {{limits: {{{RATES}}}}}}}\n"
    with running(policy) as broker, Many(broker.socket) as many:
        bob, one, other = (many.connect(uid) for uid in (BOB, FIRST, FIRST + 1))

        def pings(sock, uid, count):
            for _ in range(count):
                many.send(sock, uid, floods.PING)
                assert sock.recv(8) == floods.frame(b"PONG")

        pings(other, FIRST + 1, 1)
        overtaken = []
        for _ in range(3):  # what else the machine does may take as long as a rest, once
            many.send(one, FIRST, floods.PING * 100)
            answers = 0
            while answers < 800 and select.select([one], [], [], 0.05)[0]:
                answers += len(one.recv(800))
                pings(bob, BOB, 1)  # while nobody else has work, nobody rests
            many.send(other, FIRST + 1, floods.PING)
            pings(bob, BOB, 10)
            overtaken.append(not select.select([other], [], [], 0)[0])
            assert other.recv(8) == floods.frame(b"PONG")
            while answers < 800:
                answers += len(one.recv(800))
        assert True in overtaken
        assert str(MALLORY) in {record["FDBROKER_OWNER"] for record in broker.records("slowed")}


def _first_answer(many, sock, bob):
    """What a subscription brings first: a refusal, or one of the messages that BOB sends for as long as nothing comes."""
    while not select.select([sock], [], [], 0.05)[0]:
        many.send(bob, BOB, floods.NEWS)
        assert b"error" not in bob.recv(1000)
    return sock.recv(1000)


def test_all_uids_of_a_user_have_its_subscriptions_together(dev):
    """Two connections of each uid want to subscribe, of which four may."""
    policy = "version: 1\ntopics: {news: {}}\nlimits: {subscriptions: 4}\neveryone: {send: [news], subscribe: [news]}\n"
    with running(policy) as broker, Many(broker.socket) as many:
        bob, answers = many.connect(BOB), {}
        for uid in (*UIDS, *UIDS, BOB):
            sock = many.connect(uid)
            many.send(sock, uid, floods.SUBSCRIBE)
            answers.setdefault(uid == BOB, []).append(_first_answer(many, sock, bob))
        refused = [answer for answer in answers[False] if b"QuotaExceeded" in answer]
        assert len(refused) == 2
        assert all(b'"limit":"subscriptions","maximum":4' in answer for answer in refused)
        assert all(b'"message"' in answer for answer in (*answers[False][:4], *answers[True]))


def _ask_new(address, ready):
    """Ask for a new namespace, say so, and say how that ended."""
    with Raw(address) as client:
        client.send_call("io.fdbroker.Broker.Open", {"resources": [NEW]})
        os.write(ready, b"x")
        return outcome(client.reply())


def test_all_uids_of_a_user_have_one_place_with_the_worker(dev):
    """The worker stands still until twenty uids of MALLORY's have asked, more than it has places, and BOB after them."""
    policy = (
        f"version: 1\nlimits: {{{RATES}, namespaces: 64}}\neveryone: {{namespaces: [{{type: uts, create: true}}]}}\n"
    )
    uids = range(FIRST, FIRST + limits.NAMESPACE_REQUESTS + 4)
    reading, writing = os.pipe()
    with running(policy) as broker, Many(broker.socket) as many, ThreadPoolExecutor(len(uids) + 1) as threads:
        os.kill(broker.pids["worker"], signal.SIGSTOP)
        try:
            found = [threads.submit(as_user, uid, [], _ask_new, broker.socket, writing) for uid in uids]
            for _ in uids:
                assert select.select([reading], [], [], PATIENCE_S)[0]
                os.read(reading, 1)
            last = many.connect(MALLORY)
            for _ in range(20):  # what is denied does not wait; those before these are asked by then
                many.send(last, MALLORY, floods.OPEN)
                assert b"Denied" in last.recv(1000)
            found.append(threads.submit(as_user, BOB, [], _ask_new, broker.socket, writing))
            assert select.select([reading], [], [], PATIENCE_S)[0]
        finally:
            os.kill(broker.pids["worker"], signal.SIGCONT)
        assert {one.result() for one in found} == {"granted"}
        order = [one["FDBROKER_UID"] for one in broker.records("granted")]
        assert len(order) == len(uids) + 1
        assert order.index(str(BOB)) < 5
    os.close(reading)
    os.close(writing)


def test_all_uids_of_a_user_are_one_user_on_a_desktop(dev):
    """Each uid sends as many at once as one user may; fewer than two users' are shown, and the next one's are."""
    policy = "version: 1\ntopics: {notifications: {}}\neveryone: {send: [notifications]}\n"
    policy += f"users: {{{BOB}: {{subscribe: [notifications]}}}}\n"
    burst = limits.NOTIFICATIONS_PER_USER_BURST
    assert len(UIDS) * burst < limits.NOTIFICATIONS_BURST  # that of all users together holds nothing back
    with open_folder() as where, running(policy) as broker, bob_session(broker, where) as session:
        for uid in UIDS:
            as_user(uid, [], send, broker.socket, *([f"of {uid}"] * burst))
        as_user(BOB, [], send, broker.socket, "the last one")
        while not (found := session.all()) or not found[-1][4].endswith("the last one"):
            found = session.after(len(found) + 1)
        assert burst < len(found) <= 2 * burst
        assert {note[4].rpartition(": ")[2] for note in found} >= {f"of {MALLORY}", "the last one"}
        session.bridge.wait_for(f"too many at once of user {MALLORY}")
