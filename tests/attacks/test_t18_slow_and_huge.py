"""T18: one byte every ten seconds; a length of 0xFFFFFFFF."""

from __future__ import annotations

import contextlib
import struct
import time

import pytest
from harness import EVERYONE_NULL, Raw, ask, outcome, running

from fdbroker.limits import every as limits


def test_unfinished_messages_are_ended_in_time_and_whole_ones_are_not(dev):
    with running(EVERYONE_NULL + "limits: {connections: 1000}\n") as broker, contextlib.ExitStack() as stack:
        slow = [stack.enter_context(Raw(broker.socket)) for _ in range(200)]
        idle = stack.enter_context(Raw(broker.socket))
        assert outcome(idle.open("/dev/null")) == "granted"
        began = time.monotonic()
        for index, client in enumerate(slow):
            client.sock.sendall(b"{" if index % 2 else b"\0\0")
        while time.monotonic() - began < limits.MESSAGE_SECONDS - 1:
            time.sleep(2)
            for client in slow[:50]:
                with contextlib.suppress(OSError):
                    client.sock.sendall(b" ") if slow.index(client) % 2 else None
            assert ask(broker.socket, "/dev/null") == "granted"
        assert all(client.reply() is None for client in slow)
        assert time.monotonic() - began < limits.MESSAGE_SECONDS + 10
        assert outcome(idle.open("/dev/null")) == "granted"
        broker.wait_for("not complete in time")


@pytest.mark.parametrize("length", [limits.MESSAGE_BYTES + 1, 0x00FFFFFF, 0x7AFFFFFF, 0xFFFFFFFF])
def test_a_length_above_the_limit_is_refused_before_anything_is_stored(dev, length):
    with running(EVERYONE_NULL) as broker, Raw(broker.socket) as client:
        with open(f"/proc/{broker.pids['inbox']}/statm") as statm:
            before = int(statm.read().split()[1])
        client.sock.sendall(struct.pack("!I", length))
        assert client.sock.recv(100) == struct.pack("!I", 90)  # EMSGSIZE
        assert client.sock.recv(100) == b""
        with open(f"/proc/{broker.pids['inbox']}/statm") as statm:
            assert int(statm.read().split()[1]) - before < 100


def test_the_largest_message_passes_and_one_byte_more_does_not(dev):
    head = b'{"method":"org.varlink.service.GetInfo","parameters":{}'
    for size, expected in ((limits.MESSAGE_BYTES, "granted"), (limits.MESSAGE_BYTES + 1, "disconnected")):
        with running(EVERYONE_NULL) as broker, Raw(broker.socket) as client:
            with contextlib.suppress(OSError):
                client.sock.sendall(head + b" " * (size - len(head) - 1) + b"}\0")
            assert outcome(client.reply()) == expected


@pytest.mark.parametrize("length", [limits.MESSAGE_BYTES])
def test_the_longest_frame_passes(dev, length):
    with running(EVERYONE_NULL) as broker, Raw(broker.socket) as client:
        client.sock.sendall(struct.pack("!I", length) + b"x" * length)
        assert client.sock.recv(100) == struct.pack("!I", 13)  # EACCES: there are no topics


@pytest.mark.parametrize(
    "message",
    [
        b"[]",
        b"{}",
        b"null",
        b'{"method":5}',
        b'{"method":null}',
        b'{"parameters":{}}',
        b"{" * 60000,
        b'{"a":' * 10000,
        b"[" * 60000,
        b'{"method":"x","parameters":NaN}',
        b'{"method":"org.varlink.service.GetInfo"',
        b"\xff" * 10,
        b'{"method":"org.varlink.service.GetInfo"} x',
    ],
    ids=range(13),
)
def test_what_is_no_call_ends_the_connection_and_nothing_else(dev, message):
    with running(EVERYONE_NULL) as broker:
        with Raw(broker.socket) as client:
            if message[:1] != b"{":  # the first byte must say Varlink
                client.sock.sendall(b'{"method":"org.varlink.service.GetInfo"}\0')
                assert outcome(client.reply()) == "granted"
            client.sock.sendall(message + b"\0")
            assert client.reply() is None
        assert ask(broker.socket, "/dev/null") == "granted"
