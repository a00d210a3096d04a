"""T39: a descriptor that is sent along holds up the inbox, or uses up what it may have open."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import socket
import struct
import sys
import time

import fuse
import pytest
from harness import ALICE, BOB, Raw, as_user, folder, running, status_of
from messaging import raw_send, sealed, send_frame, subscribed

import fdbroker
import fdbroker.aio
from fdbroker.cli import commands
from fdbroker.limits import every as limits

POLICY = f"""
version: 1
limits: {{requests_per_second: 100000, burst: 100000}}
topics: {{inbox: {{}}}}
everyone: {{send: ["*"], subscribe: ["*"]}}
users: {{{BOB}: {{limits: {{connections: 200, subscriptions: 200}}}}}}
"""


@pytest.fixture
def broker(dev):
    with running(POLICY) as made:
        yield made
        made.wait_idle()


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


def _by_command(address):
    sys.stdout = open(1, "w", buffering=1, closefd=False)
    sys.argv = ["fdbroker", "subscribe", "inbox", "--json", "--socket", address]
    commands.run()


def _by_library(address):
    with fdbroker.connect(address) as client:
        for message in client.subscribe(["inbox"]):
            with message:
                os.write(1, message.payload)


def _by_asyncio(address):
    async def main():
        async with await fdbroker.aio.connect(address) as client:
            async for message in client.subscribe(["inbox"]):
                with message:
                    os.write(1, message.payload)

    asyncio.run(main())


@contextlib.contextmanager
def _listener(how, address):
    """A subscriber of BOB's in a process of its own; its pid, and what waits until it has printed a text."""
    reading, writing = os.pipe()

    def listen():
        signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # it may be ignored: a shell does that in the background
        fuse.become(BOB)
        os.dup2(writing, 1)
        how(address)

    pid = fuse.forked(listen)
    os.close(writing)
    seen = bytearray()

    def has_printed(text, seconds=10):
        end = time.monotonic() + seconds
        while text not in seen:
            if select.select([reading], [], [], max(0, end - time.monotonic()))[0]:
                seen.extend(os.read(reading, 65536))
            elif time.monotonic() > end:
                return False
        return True

    try:
        yield pid, has_printed
    finally:
        os.close(reading)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _say(broker, text):
    with fdbroker.connect(broker.socket) as client:
        client.send("inbox", text)


@pytest.mark.parametrize("how", [_by_command, _by_library, _by_asyncio])
def test_a_file_whose_close_is_never_answered_stops_no_subscriber(broker, how):
    """And an interrupt ends its main thread; the kernel keeps the rest of the process until FLUSH is answered."""

    def send(number):
        with fdbroker.connect(broker.socket) as client:
            client.send("inbox", "evil", descriptors=[number] * 3)

    with folder() as where, _listener(how, broker.socket) as (pid, has_printed), fuse.unanswered(where) as (path, end):
        while not has_printed(b"first", 0.1):
            _say(broker, "first")
        with contextlib.ExitStack() as stack:
            stack.enter_context(fuse.holder(path, send))
            stack.callback(end)  # before its holder: else that could not end
            assert has_printed(b"evil")
            for number in range(5):
                _say(broker, f"after {number}")
                assert has_printed(b"after %d" % number), "the subscriber has stopped"
            assert int(status_of(pid)["Threads"]) > 1  # it is being closed
            os.kill(pid, signal.SIGINT)
            until = time.monotonic() + 10
            while status_of(pid)["State"][0] != "Z":
                assert time.monotonic() < until
                time.sleep(0.05)
            assert os.waitpid(pid, os.WNOHANG) == (0, 0)  # a process with a thread in the kernel is not gone
