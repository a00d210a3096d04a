"""Descriptors and large payloads in messages, between users, with a real broker."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import select
import socket
import struct
import subprocess
import sys
import threading
import time

import pytest
from harness import ALICE, BOB, Raw, as_user, folder, outcome, running, status_of

import fdbroker
import fdbroker.aio
from fdbroker import limits
from fdbroker.errors import DescriptorsRefused, MessageTooLong, QuotaExceeded, TopicDenied
from fdbroker.kernel import memfd

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
SEND = "io.fdbroker.Inbox.Send"


@pytest.fixture
def broker(dev):
    with folder() as where, running(POLICY, "--state", str(where / "state")) as made:
        yield made
        made.wait_idle()


@contextlib.contextmanager
def subscribed(broker, *topics):
    """A client whose subscription is in force, and the messages that come."""
    with fdbroker.connect(broker.socket) as client:
        messages = client.subscribe(topics)
        found = []
        thread = threading.Thread(target=lambda: found.append(next(messages)))
        thread.start()
        while thread.is_alive():
            with fdbroker.connect(broker.socket) as sender:
                sender.send(topics[0], "are you there")
            thread.join(0.02)
        yield (message for message in messages if message.payload != b"are you there")


def temporary(text):
    """An owned descriptor of a file that nobody else can name."""
    number = os.memfd_create("x")
    os.write(number, text)
    return number


def send_frame(address, payload, count):
    numbers = [temporary(b"%d" % index) for index in range(count)]
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(address)
            socket.send_fds(sock, [struct.pack("!I", len(payload)) + payload], numbers)
            return struct.unpack("!I", sock.recv(4))[0]
    finally:
        for number in numbers:
            os.close(number)


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


def raw_send(address, parameters, make):
    """Send with the descriptors that `make` makes; the short outcome and the parameters of an error."""
    numbers = make()
    try:
        with Raw(address) as client:
            call = json.dumps({"method": SEND, "parameters": parameters}).encode() + b"\0"
            socket.send_fds(client.sock, [call], numbers)
            reply = client.reply()
            return [outcome(reply), (reply or {}).get("parameters")]
    finally:
        for number in numbers:
            os.close(number)


def unsealed():
    return [temporary(b"text")]


def half_sealed():
    number = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.write(number, b"text")
    fcntl.fcntl(number, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | 0x10)  # F_SEAL_FUTURE_WRITE
    return [number]


def sealed(size=4):
    return [memfd.sealed("x", b"x" * size)]


NOT_SEALED = {"reason": "the payload is no memfd that is sealed with SHRINK, GROW and WRITE"}


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


def test_one_users_messages_hold_so_many_and_another_user_does_not_notice(broker):
    """Halves of messages hold them; the message that is one too many is refused, not the connection."""

    def hold(address):
        most, each = limits.HELD_DESCRIPTORS, limits.DESCRIPTORS_PER_MESSAGE
        with contextlib.ExitStack() as stack:
            for _ in range(most // each):
                client = stack.enter_context(Raw(address))
                client.sock.sendall(b"{")  # not the first bytes: those could still wait to be accepted
                time.sleep(0.05)
                socket.send_fds(client.sock, [b'"method":'], [0] * each)
            time.sleep(0.3)
            mine = raw_send(address, {"topic": "inbox", "fileDescriptor": 0}, sealed)
            theirs = as_user(ALICE, [], raw_send, address, {"topic": "inbox", "fileDescriptor": 0}, sealed)
            with fdbroker.connect(address) as client:
                client.send("inbox", "without any")
        return [mine, theirs]

    assert hold(broker.socket) == [
        ["QuotaExceeded", {"limit": "held_descriptors", "maximum": limits.HELD_DESCRIPTORS}],
        ["granted", {}],
    ]


def test_a_subscriber_that_does_not_read_loses_messages_and_others_get_theirs(broker):
    with subscribed(broker, "inbox") as quick, subscribed(broker, "inbox") as slow:
        with fdbroker.connect(broker.socket) as client:
            for number in range(30):
                client.send("inbox", str(number), descriptors=[0] * 16)
                with next(quick) as message:
                    assert (message.payload, message.lost) == (str(number).encode(), 0)
            client.send("inbox", "end")
        lost = count = 0
        for message in slow:
            with message:
                lost += message.lost
                if message.payload == b"end":
                    break
                count += 1
                assert len(message.descriptors) == 16
        assert (count + lost, 0 < count <= limits.UNREAD_DESCRIPTORS // 16) == (30, True)


def test_a_subscriber_that_does_not_read_does_not_use_up_what_a_sender_may_hold(broker):
    with contextlib.ExitStack() as deaf:
        for _ in range(6):
            one = deaf.enter_context(Raw(broker.socket))
            one.send_call("io.fdbroker.Inbox.Subscribe", {"topics": ["inbox"]}, more=True)
        with subscribed(broker, "inbox") as messages, fdbroker.connect(broker.socket) as client:
            for _ in range(40):
                for text, count in (("x" * 20_000, 0), ("with", 16)):  # so each of the six stops with another message
                    client.send("inbox", text, descriptors=[0] * count)
                    with next(messages) as message:
                        assert (message.payload.decode(), message.lost, len(message.descriptors)) == (text, 0, count)


def test_a_descriptor_whose_close_waits_keeps_nobody_else_waiting(broker):
    """A TCP socket with SO_LINGER that its peer does not read, with the inbox's copy as the last one."""

    def send_slow(address):
        with socket.create_server(("127.0.0.1", 0)) as server:
            slow = socket.create_connection(server.getsockname())
            peer, _ = server.accept()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 3))
        slow.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                slow.send(b"x" * 65536)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(address)
            socket.send_fds(sock, [b"\0\0\0"], [slow.fileno()])
            time.sleep(0.3)  # the inbox has it
            os.close(slow.detach())
            sock.sendall(b"\1x")
            assert sock.recv(4) == b"\0\0\0\0"
        time.sleep(0.3)
        threads = status_of(broker.pids["inbox"])["Threads"]
        began = time.monotonic()
        for _ in range(20):
            assert send_frame(address, b"more", 1) == 0
        took = time.monotonic() - began
        peer.close()
        return [threads, took]

    threads, took = send_slow(broker.socket)
    assert threads == "2"  # it is being closed
    assert took < 2
    end = time.monotonic() + 10
    while status_of(broker.pids["inbox"])["Threads"] != "1":
        assert time.monotonic() < end
        time.sleep(0.05)


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
            ["number", "topic", "uid", "gid", "pid", "session", "time", "payload", "encoding", "lost", "descriptors"]
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
