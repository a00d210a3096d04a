"""Descriptors and large payloads in messages, between users, with a real broker."""

from __future__ import annotations

import asyncio
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import ALICE, BOB, MS_BIND, as_user, folder, mount, running, unmount
from messaging import NOT_SEALED, Subscriber, half_sealed, raw_send, sealed, send_frame, subscribed, unsealed

import fdbroker
import fdbroker.aio
from fdbroker.client import calls, sync
from fdbroker.errors import DescriptorsRefused, MessageTooLong, QuotaExceeded, TopicDenied

POLICY = f"""
version: 1
limits: {{requests_per_second: 100000, burst: 100000}}
topics:
  inbox: {{}}
  small: {{maximum_bytes: 100000}}
  kept: {{deliver: [journal, subscribers, queue]}}
everyone: {{send: ["*"], subscribe: ["*"]}}
users: {{{BOB}: {{limits: {{connections: 200, subscriptions: 200}}}}}}
"""


@pytest.fixture
def broker(dev):
    with folder() as where, running(POLICY, "--state", str(where / "state")) as made:
        yield made
        made.wait_idle()


def texts(message):
    return [os.pread(one.fileno(), 100, 0).decode() for one in message.descriptors]


@pytest.mark.parametrize("count", [1, 16])
def test_what_is_sent_along_with_a_frame_reaches_every_subscriber(broker, count):
    with subscribed(broker, "inbox") as first, subscribed(broker, "inbox") as second:
        assert as_user(ALICE, [], send_frame, broker.socket, b"hello", count) == 0
        for messages in (first, second):
            with next(messages) as message:
                assert (message.payload, message.uid) == (b"hello", ALICE)
                assert texts(message) == [str(index) for index in range(count)]


def test_without_a_receiver_they_are_closed(broker):
    for _ in range(50):
        assert send_frame(broker.socket, b"hello", 16) in (0, 122)  # the last ones may still be being closed


def test_a_large_payload_reaches_every_subscriber_as_the_same_file(broker):
    """From the library, by both clients; nothing is copied: it is the same inode."""
    data = os.urandom(1 << 20) * 5

    def send(address):
        with fdbroker.connect(address) as client:
            client.send("inbox", data)

        async def talk():
            async with await fdbroker.aio.connect(address) as client:
                await client.send("inbox", data, descriptors=[0])

        asyncio.run(talk())

    with subscribed(broker, "inbox") as first, subscribed(broker, "inbox") as second:
        as_user(ALICE, [], send, broker.socket)
        for along in (0, 1):
            with next(first) as one, next(second) as other:
                assert one.read() == other.read() == data
                assert (one.payload, len(one.descriptors)) == (b"", along)
                assert os.fstat(one.file.fileno()).st_ino == os.fstat(other.file.fileno()).st_ino
                with pytest.raises(OSError, match="not permitted"):
                    os.write(one.file.fileno(), b"x")


def test_asyncio_subscribers_own_what_comes(broker):
    async def talk():
        async with (
            await fdbroker.aio.connect(broker.socket) as sender,
            await fdbroker.aio.connect(broker.socket) as subscriber,
        ):
            found = []

            async def listen():
                async for message in subscriber.subscribe(["inbox"]):
                    with message:
                        found.append((len(message.read()), len(message.descriptors)))
                    break

            task = asyncio.create_task(listen())
            while not task.done():
                await sender.send("inbox", b"x" * 100_000, descriptors=[0, 1])
                await asyncio.sleep(0.01)
            return found

    assert asyncio.run(talk()) == [(100_000, 2)]


@pytest.mark.parametrize(
    ("parameters", "make", "expected"),
    [
        ({"topic": "inbox", "fileDescriptor": 0}, sealed, ["granted", {}]),
        ({"topic": "inbox", "fileDescriptor": 0}, unsealed, ["DescriptorsRefused", NOT_SEALED]),
        ({"topic": "inbox", "fileDescriptor": 0}, half_sealed, ["DescriptorsRefused", NOT_SEALED]),
        ({"topic": "inbox", "fileDescriptor": 0}, lambda: list(os.pipe()[:1]), ["DescriptorsRefused", NOT_SEALED]),
        ({"topic": "inbox", "fileDescriptor": 0}, list, ["InvalidParameter", {"parameter": "fileDescriptor"}]),
        ({"topic": "inbox", "fileDescriptor": 1}, sealed, ["InvalidParameter", {"parameter": "fileDescriptor"}]),
        ({"topic": "inbox", "fileDescriptor": -1}, sealed, ["InvalidParameter", {"parameter": "fileDescriptor"}]),
        ({"topic": "inbox", "fileDescriptor": True}, sealed, ["InvalidParameter", {"parameter": "fileDescriptor"}]),
        ({"topic": "inbox", "payload": "x"}, sealed, ["InvalidParameter", {"parameter": "fileDescriptors"}]),
        (
            {"topic": "inbox", "payload": "x", "fileDescriptors": [0, 0]},
            sealed,
            ["InvalidParameter", {"parameter": "fileDescriptors"}],
        ),
        (
            {"topic": "inbox", "fileDescriptor": 0, "fileDescriptors": [0]},
            sealed,
            ["InvalidParameter", {"parameter": "fileDescriptors"}],
        ),
        (
            {"topic": "inbox", "payload": "x", "fileDescriptor": 0},
            sealed,
            ["InvalidParameter", {"parameter": "payload"}],
        ),
        ({"topic": "small", "fileDescriptor": 0}, lambda: sealed(100_000), ["granted", {}]),
        ({"topic": "small", "fileDescriptor": 0}, lambda: sealed(100_001), ["TooLong", {"maximum": 100_000}]),
        (
            {"topic": "kept", "payload": "x", "fileDescriptors": [0]},
            sealed,
            ["DescriptorsRefused", {"reason": "the topic's messages go to the journal and the queue"}],
        ),
        ({"topic": "kept", "fileDescriptor": 0}, lambda: sealed(65_537), ["TooLong", {"maximum": 65_536}]),
        ({"topic": "none", "fileDescriptor": 0}, sealed, ["Denied", {"topic": "none"}]),
    ],
)
def test_what_does_not_fit_is_refused_and_closed(broker, parameters, make, expected):
    assert as_user(ALICE, [], raw_send, broker.socket, parameters, make) == expected


def test_where_it_is_stored_or_recorded_a_memfd_is_only_another_envelope(broker):
    assert as_user(
        ALICE, [], raw_send, broker.socket, {"topic": "kept", "fileDescriptor": 0, "to": str(BOB)}, sealed
    ) == [
        "granted",
        {},
    ]

    def receive(address):
        with fdbroker.connect(address) as client:
            return [[message.payload.decode(), message.file is None] for message in client.receive()]

    assert as_user(BOB, [], receive, broker.socket) == [["xxxx", True]]
    assert [record["FDBROKER_PAYLOAD"] for record in broker.records() if "FDBROKER_PAYLOAD" in record] == ["xxxx"]


def test_the_commands_take_and_show_large_payloads(broker):
    data = "é" * 200_000
    words = (sys.executable, "-I", "-m", "fdbroker")
    environment = {**os.environ, "FDBROKER_SOCKET": broker.socket}
    listening = subprocess.Popen(
        (*words, "subscribe", "--json", "inbox"), stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        poll = select.poll()
        poll.register(listening.stdout, select.POLLIN)
        end = time.monotonic() + 20
        while not poll.poll(50):
            assert time.monotonic() < end
            with fdbroker.connect(broker.socket) as client:
                client.send("inbox", "are you there")
        subprocess.run((*words, "send", "inbox"), input=data, text=True, check=True, env=environment)
        for line in listening.stdout:
            said = json.loads(line)
            if said["payload"] != "are you there":
                break
        assert said["payload"] == data
        assert said["descriptors"] == 0
        assert sorted(said) == sorted(
            (
                *("number", "topic", "uid", "owner", "gid", "pid", "session"),
                *("time", "payload", "encoding", "lost", "descriptors"),
            )
        )
    finally:
        listening.kill()
        listening.wait()
        listening.stdout.close()


def test_the_library_says_why(broker):
    with fdbroker.connect(broker.socket) as client:
        with pytest.raises(
            DescriptorsRefused, match="cannot go with the message: the topic's messages go to the journal"
        ):
            client.send("kept", "x", descriptors=[0])
        with pytest.raises(MessageTooLong, match="at most 100000 bytes"):
            client.send("small", "x" * 100_001)
        with pytest.raises(TopicDenied):
            client.send("none", "x", descriptors=[0])
        client.send("inbox", "x", descriptors=[sys.__stderr__, 0])
    assert QuotaExceeded.errno == 122


def test_what_the_kernel_does_not_send_is_an_error_at_once(broker):
    with fdbroker.connect(broker.socket) as client, pytest.raises(OSError, match="Bad file descriptor"):
        client.send("inbox", "x", descriptors=[1 << 20])

    async def asynchronous():
        async with await fdbroker.aio.connect(broker.socket) as client:
            with pytest.raises(OSError, match="Bad file descriptor"):
                await asyncio.wait_for(client.send("inbox", "x", descriptors=[1 << 20]), 5)
            await client.send("inbox", "x")

    asyncio.run(asynchronous())


# ---- without the right to send

RIGHTS = f"""
version: 1
topics: {{inbox: {{}}, other: {{}}}}
users:
  {ALICE}: {{send: [other], subscribe: ["*"]}}
  {BOB}: {{subscribe: ["*"]}}
  0: {{send: ["*"], subscribe: ["*"]}}
"""
SENT = {
    "text": ("x", 0),
    "bytes": (b"\xff", 0),
    "a large payload": ("x" * 100_000, 0),
    "a descriptor": ("x", 1),
    "16 descriptors": ("x", 16),
    "a large payload and a descriptor": (b"\xff" * 100_000, 1),
}


@pytest.fixture(params=["this kernel", "one without SO_PASSRIGHTS"])
def without_rights(request, dev):
    """A broker, which on an older kernel cannot keep descriptors off."""
    place = Path(fdbroker.__file__).parent / "inbox" / "service.py"
    text = place.read_text()
    call = "let_descriptors(sock, allowed=bool(allowed.send))"
    assert call in text
    with folder() as where:
        (where / "service.py").write_text(text if request.param == "this kernel" else text.replace(call, "pass"))
        mount(str(where / "service.py"), str(place), "none", MS_BIND)
        try:
            with running(RIGHTS) as made:
                yield made
                made.wait_idle()
        finally:
            unmount(str(place))


@pytest.mark.parametrize("uid", [ALICE, BOB], ids=["to another topic alone", "to no topic"])
def test_whoever_may_not_send_hears_that_whatever_goes_along(without_rights, uid):
    """By both clients, which go on; and nothing of it is delivered."""

    def send_all(address):
        found = []

        def note(error):
            found.append([type(error).__name__, str(error)])

        with fdbroker.connect(address) as client:
            for payload, count in SENT.values():
                try:
                    client.send("inbox", payload, descriptors=[0] * count)
                except Exception as error:
                    note(error)
            client.offers()

        async def talk():
            async with await fdbroker.aio.connect(address) as client:
                calls = [client.send("inbox", payload, descriptors=[0] * count) for payload, count in SENT.values()]
                for error in await asyncio.gather(*calls, return_exceptions=True):
                    note(error)
                await client.offers()

        asyncio.run(talk())
        return found

    denied = ["TopicDenied", "topic inbox: denied: no rule of the policy allows it"]
    with Subscriber(without_rights.socket, "inbox") as subscriber, fdbroker.connect(without_rights.socket) as sender:
        assert as_user(uid, [], send_all, without_rights.socket) == [denied] * len(SENT) * 2
        sender.send("inbox", "the last")
        assert subscriber.message()["payload"] == "the last"


def test_an_eperm_that_has_another_reason_stays_one_and_nothing_is_delivered(broker, monkeypatch):
    """A security module may refuse as well, whatever the policy says."""

    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    with Subscriber(broker.socket, "inbox") as subscriber:
        with fdbroker.connect(broker.socket) as client:
            with monkeypatch.context() as changed:
                changed.setattr(sync.socket, "send_fds", refuse)
                with pytest.raises(PermissionError):
                    client.send("inbox", "x", descriptors=[0])
                with pytest.raises(TopicDenied):
                    client.send("none", "x", descriptors=[0])
            client.send("inbox", "the last")
        assert subscriber.message()["payload"] == "the last"


# ---- text


def test_text_arrives_as_text_on_every_way(broker):
    def sent(subscriber, send, *arguments, **more):
        send(*arguments, **more)
        message = subscriber.message()
        return message["encoding"], message["payload"]

    text, base64 = ("text", "gr\u00fc\u00df\0"), ("base64", "/w==")
    data = text[1].encode()
    by_base64 = {"topic": "inbox", "payload": "Z3LDvMOfAA==", "encoding": "base64"}
    with Subscriber(broker.socket, "inbox") as subscriber, fdbroker.connect(broker.socket) as client:
        for payload in (text[1], data):
            assert sent(subscriber, client.send, "inbox", payload) == text
            assert sent(subscriber, client.send, "inbox", payload, descriptors=[0]) == text
        assert sent(subscriber, send_frame, broker.socket, data, 0) == text
        assert sent(subscriber, raw_send, broker.socket, by_base64, list) == text
        assert sent(subscriber, client.send, "inbox", b"\xff") == base64
        assert sent(subscriber, send_frame, broker.socket, b"\xff", 0) == base64
        for payload in ("x" * 65_000, b"\xff" * 65_000):  # in a memfd, and stored as what it is
            client.send("kept", payload, to=0)
        stored = client.receive()
        assert [message.read() for message in stored] == [b"x" * 65_000, b"\xff" * 65_000]
        reply = client._call(calls.receive_call(10, []))[0].parameters["messages"]
        assert [message["encoding"] for message in reply] == ["text", "base64"]
