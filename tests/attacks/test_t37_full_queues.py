"""T37: one user fills the queues, so that others cannot store."""

from __future__ import annotations

import contextlib
import socket
import struct

import harness
import pytest
from harness import ALICE, BOB, CAROL, as_user, running

import fdbroker
from fdbroker.errors import NoSuchRecipient, QuotaExceeded

POLICY = f"""
version: 1
topics: {{inbox: {{deliver: [queue]}}, mail: {{deliver: [queue]}}, live: {{}}}}
users:
  {ALICE}: {{send: ["*"], limits: {{stored_messages: 5, stored_bytes: 100000}}}}
  {BOB}: {{send: ["*"], subscribe: ["*"]}}
  {CAROL}: {{subscribe: [mail]}}
"""


@pytest.fixture
def state(dev):
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
        return [(message.number, message.payload.decode()) for message in client.receive(maximum, acknowledge)]


def test_a_senders_share_is_full_at_its_maximum_and_only_its_own(state):
    def fill(address):
        for _ in range(5):
            send(address, "mail", "x")
        with fdbroker.connect(address) as client:
            with pytest.raises(QuotaExceeded) as caught:
                client.send("mail", "y")
            with pytest.raises(NoSuchRecipient, match="nobody: no user of that name or number"):
                client.send("mail", "y", to="nobody")
            client.send("live", "not stored")
        return [caught.value.limit, caught.value.maximum]

    def frame(address):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(address)
            sock.sendall(b"\0\0\0\1x")
            return struct.unpack("!I", sock.recv(4))[0]

    with serving(state) as broker:
        assert as_user(ALICE, [], fill, broker.socket) == ["stored_messages", 5]
        assert as_user(ALICE, [], frame, broker.socket) == 28  # ENOSPC
        assert as_user(BOB, [], frame, broker.socket) == 0
        for uid in (BOB, CAROL):
            numbers = [number for number, _ in as_user(uid, [], receive, broker.socket)]
            as_user(uid, [], receive, broker.socket, numbers)
        assert as_user(ALICE, [], frame, broker.socket) == 0


def test_its_bytes_are_counted_once_however_many_have_them_and_as_stored(state):
    def fill(address):
        send(address, "mail", "x" * 60000)
        with pytest.raises(QuotaExceeded) as caught:
            send(address, "mail", "x" * 60000)
        send(address, "mail", "x" * 30000)
        return [caught.value.limit, caught.value.maximum]

    with serving(state) as broker:
        assert as_user(ALICE, [], fill, broker.socket) == ["stored_bytes", 100000]
        as_user(BOB, [], send, broker.socket, "mail", "x" * 60000)
