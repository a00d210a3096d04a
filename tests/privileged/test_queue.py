"""Stored messages with a real broker: they outlive the service, kill -9 of the inbox included, and nobody takes another's."""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import random
import signal
import socket
import struct
import threading
import time

import harness
import pytest
from harness import ALICE, BOB, CAROL, as_user, command, running

import fdbroker
import fdbroker.aio
from fdbroker.errors import BrokerUnavailable, TopicDenied

POLICY = f"""
version: 1
topics:
  inbox: {{deliver: [subscribers, queue]}}
  mail: {{deliver: [queue], keep: 1h}}
  brief: {{deliver: [queue], keep: 1s}}
  live: {{}}
users:
  {ALICE}: {{send: ["*"], limits: {{stored_messages: 5}}}}
  {BOB}: {{send: ["*"], subscribe: ["*"]}}
  {CAROL}: {{subscribe: [mail]}}
"""
SENDS = int(os.environ.get("FDBROKER_SENDS", "200000"))


@pytest.fixture
def state():
    """Where messages are stored, in a folder that is root's alone."""
    with harness.folder() as where:
        yield str(where / "state")


@contextlib.contextmanager
def serving(state, policy=POLICY):
    with running(policy, "--state", state) as made:
        yield made


def send(address, topic, payload, to=None):
    with fdbroker.connect(address) as client:
        client.send(topic, payload, to=to)


def receive(address, acknowledge=(), maximum=100):
    with fdbroker.connect(address) as client:
        return [
            (message.number, message.topic, message.uid, message.payload.decode())
            for message in client.receive(maximum, acknowledge)
        ]


def payloads(received):
    return [payload for _, _, _, payload in received]


def test_a_message_waits_for_a_user_who_is_not_there_over_a_restart(dev, state):
    with serving(state) as broker:
        as_user(ALICE, [], send, broker.socket, "mail", "to all")
        as_user(ALICE, [], send, broker.socket, "mail", "to bob", str(BOB))
        assert os.stat(state).st_mode & 0o777 == 0o700
        owner = os.stat(state).st_uid
        assert owner != 0
    with serving(state) as broker:
        assert os.stat(state).st_uid == owner  # a broker without system users takes the same number again
        bobs, carols = (as_user(uid, [], receive, broker.socket) for uid in (BOB, CAROL))
        assert (payloads(bobs), payloads(carols)) == (["to all", "to bob"], ["to all"])
        assert {uid for _, _, uid, _ in bobs} == {ALICE}
        assert as_user(BOB, [], receive, broker.socket, [bobs[0][0]]) == bobs[1:]
        broker.wait_idle()
    with serving(state) as broker:
        assert as_user(BOB, [], receive, broker.socket) == bobs[1:]
        assert as_user(CAROL, [], receive, broker.socket) == carols


def test_a_message_is_over_when_its_time_is(dev, state):
    with serving(state) as broker:
        as_user(ALICE, [], send, broker.socket, "brief", "x")
        assert payloads(as_user(BOB, [], receive, broker.socket)) == ["x"]
        time.sleep(1.1)
        assert as_user(BOB, [], receive, broker.socket) == []


@pytest.mark.parametrize("trouble", ["mode", "owner", "file", "link", "parent", "closed", "owned", "way"])
def test_a_folder_that_is_not_the_inboxs_alone_is_refused(dev, trouble):
    with harness.folder() as where:
        state = where / "state"
        if trouble in ("parent", "closed", "owned", "way"):
            (where / "in").mkdir()
            state = where / "in" / "state"
        if trouble == "file":
            state.write_text("")
        elif trouble == "link":
            os.symlink("/tmp", state)
        elif trouble == "parent":
            os.chmod(where / "in", 0o777)
        elif trouble == "closed":
            os.chmod(where / "in", 0o700)
        elif trouble == "owned":
            os.chown(where / "in", ALICE, -1)
        elif trouble == "way":
            (where / "in").rename(where / "there")
            os.symlink(where / "there", where / "in")
        else:
            state.mkdir(0o755 if trouble == "mode" else 0o700)
            os.chown(state, 61999 if trouble == "mode" else ALICE, -1)
        with harness.folder() as other:
            broker = harness.Broker(other, POLICY, ("--state", str(state)))
            assert broker.process.wait(60) == 78
            assert f"{state} cannot hold messages: " in broker.text()
            assert "Traceback" not in broker.text()


def test_two_brokers_do_not_share_a_folder(dev, state):
    with serving(state), harness.folder() as other:
        second = harness.Broker(other, POLICY, ("--state", state))
        assert second.process.wait(20) != 0
        assert "database is locked" in second.text()


def test_a_reload_cannot_begin_to_store(dev, state):
    without = "version: 1\ntopics: {live: {}}\n"
    with serving(state, without) as broker:
        assert not os.path.exists(state)
        broker.reload(POLICY)
        assert "the new policy needs the folder of the stored messages" in broker.text()
        with pytest.raises(TopicDenied):
            send(broker.socket, "mail", "x")


def test_the_commands(dev, state):
    with serving(state) as broker:
        assert as_user(ALICE, [], command, broker.socket, "send", "--to", str(BOB), "mail", "hello\x1b[2J") == [
            0,
            "",
            "",
        ]
        code, _, text = as_user(ALICE, [], command, broker.socket, "send", "--to", "nobody", "mail", "x")
        assert (code, text) == (65, "fdbroker: nobody: no user of that name or number may subscribe to the topic\n")
        kept = as_user(BOB, [], command, broker.socket, "receive", "--keep")
        assert kept[:2] == as_user(BOB, [], command, broker.socket, "receive")[:2]
        assert kept[1].endswith("\thello\\x1b[2J\n")
        assert as_user(BOB, [], command, broker.socket, "receive") == [0, "", ""]
        as_user(ALICE, [], command, broker.socket, "send", "mail", "again")
        code, out, _ = as_user(BOB, [], command, broker.socket, "receive", "--json")
        said = json.loads(out)
        assert (code, said["payload"], said["topic"], said["uid"]) == (0, "again", "mail", ALICE)


def kill_inbox(broker):
    broker.expected_code = None
    os.kill(broker.pids["inbox"], signal.SIGKILL)
    broker.process.wait(60)


@pytest.mark.parametrize("kind", ["blocking", "asyncio"])
def test_a_subscriber_of_the_library_finds_the_next_broker_and_misses_nothing_stored(dev, state, kind):
    """Before its first message, and after it; the restarted broker must have the same address."""

    def blocking(address, ready):
        got = []
        with fdbroker.connect(address) as client:
            os.write(ready, b"x")
            for message in client.subscribe(["inbox", "live"]):
                got.append(message.payload.decode())
                if len(got) == 4:
                    return got

    def asynchronous(address, ready):
        async def run():
            got = []
            async with await fdbroker.aio.connect(address) as client:
                os.write(ready, b"x")
                async for message in client.subscribe(["inbox", "live"]):
                    got.append(message.payload.decode())
                    if len(got) == 4:
                        return got

        return asyncio.run(run())

    reading, writing = os.pipe()
    found = []
    subscriber = threading.Thread(
        target=lambda: found.append(
            as_user(BOB, [], blocking if kind == "blocking" else asynchronous, address, writing)
        )
    )
    with harness.folder() as where:
        address = str(where / "socket")

        def broker():
            made = harness.Broker(where, POLICY, ("--state", state))
            made.wait_ready()
            return made

        with_old = broker()
        try:
            as_user(ALICE, [], send, address, "inbox", "older than the subscription", BOB)
            time.sleep(0.01)
            subscriber.start()
            os.read(reading, 1)
            time.sleep(0.3)  # until it is in force: nothing answers that
            for texts in (["a"], ["b", "c"], ["d"]):
                kill_inbox(with_old)
                with_old = broker()
                for text in texts:
                    as_user(ALICE, [], send, address, "inbox", text, BOB)
            subscriber.join(20)
            assert found == [["a", "b", "c", "d"]]
        finally:
            with_old.process.kill()
            with_old.process.wait()
    os.close(reading)
    os.close(writing)


def test_without_a_broker_to_come_back_to_closing_ends_the_subscription(dev, state):
    with serving(state) as broker:
        client = fdbroker.connect(broker.socket)
        messages = client.subscribe(["live"])
        with pytest.raises(TopicDenied):
            next(messages)
        client.close()
        with pytest.raises(BrokerUnavailable):
            next(client.subscribe(["live"]))


# ---- the storm


def storm_policy(uids):
    users = "\n".join(f"  {uid}: {{send: [inbox]}}" for uid in uids)
    return f"""
version: 1
topics: {{inbox: {{deliver: [queue]}}}}
limits: {{stored_messages: 1000000, stored_bytes: 1073741824, requests_per_second: 1000000, burst: 1000000}}
users:
{users}
  {BOB}: {{subscribe: [inbox]}}
"""


def storm_sender(address, uid, count, results):
    """Sends each message once, sixteen at a time; puts those whose status 0 it saw."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    stored = []
    number = 0
    while number < count:
        try:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(address)
                while number < count:
                    batch = range(number, min(number + 16, count))
                    number = batch.stop
                    payloads = [b"%d %d" % (uid, one) for one in batch]
                    sock.sendall(b"".join(struct.pack("!I", len(payload)) + payload for payload in payloads))
                    got = b""
                    while len(got) < 4 * len(batch):
                        data = sock.recv(4096)
                        if not data:
                            break
                        got += data
                    statuses = struct.unpack(f"!{len(got) // 4}I", got[: len(got) // 4 * 4])
                    stored += [one for one, status in zip(batch, statuses, strict=False) if status == 0]
                    if len(statuses) < len(batch):
                        break
        except OSError:
            time.sleep(0.02)
    results.put((uid, stored))


def storm_receiver(address, done, results):
    """Receives and acknowledges until `done` and nothing is left; puts all, and what came again after its end."""
    os.setgroups([])
    os.setresgid(BOB, BOB, BOB)
    os.setresuid(BOB, BOB, BOB)
    confirmed, seen, again = set(), [], []
    unsure = []
    while True:
        try:
            with fdbroker.connect(address) as client:
                while True:
                    finished = done.is_set()
                    messages = client.receive(1000, unsure)
                    confirmed.update(unsure)
                    again += [message.number for message in messages if message.number in confirmed]
                    seen += [message.payload.decode() for message in messages]
                    unsure = [message.number for message in messages]
                    if finished and not messages:
                        results.put((len(confirmed), seen, again))
                        return
                    if not messages:
                        time.sleep(0.01)
        except BrokerUnavailable:
            time.sleep(0.02)


def test_killed_at_random_moments_it_loses_nothing_that_it_said_was_stored(dev, state):
    """200,000 messages from 8 processes, or FDBROKER_SENDS."""
    fork = multiprocessing.get_context("fork")
    senders = range(52001, 52009)
    results, received, done = fork.Queue(), fork.Queue(), fork.Event()
    rand = random.Random(4)
    kills = 0
    with harness.folder() as where:
        address = str(where / "socket")
        policy = storm_policy(senders)
        broker = harness.Broker(where, policy, ("--state", state))
        broker.wait_ready()
        workers = [
            fork.Process(target=storm_sender, args=(address, uid, SENDS // len(senders), results)) for uid in senders
        ]
        receiver = fork.Process(target=storm_receiver, args=(address, done, received))
        try:
            for worker in (*workers, receiver):
                worker.start()
            stored = {}
            while len(stored) < len(senders):
                end = time.monotonic() + rand.uniform(0.02, 0.6)
                while len(stored) < len(senders) and time.monotonic() < end:
                    with contextlib.suppress(Exception):
                        uid, numbers = results.get(timeout=0.05)
                        stored[uid] = numbers
                kill_inbox(broker)
                kills += 1
                broker = harness.Broker(where, policy, ("--state", state))
                broker.wait_ready()
            done.set()
            confirmed, seen, again = received.get(timeout=60)
        finally:
            broker.process.kill()
            broker.process.wait()
            for worker in (*workers, receiver):
                worker.kill()
                worker.join()
    sent = {f"{uid} {one}" for uid, numbers in stored.items() for one in numbers}
    assert kills >= 3
    assert len(sent) > SENDS // 2
    assert sent <= set(seen), f"{len(sent - set(seen))} of {len(sent)} are lost"
    assert again == []
    assert confirmed >= len(sent)
    print(f"{SENDS} sent, {len(sent)} said to be stored, {confirmed} acknowledged, {kills} kills")
