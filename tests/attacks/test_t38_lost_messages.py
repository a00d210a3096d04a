"""T38: a message whose status 0 was seen is lost, or one comes again after its acknowledgement.

tests/privileged/test_queue.py does it with hundreds of thousands of messages.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct

import harness
import pytest
from harness import ALICE, BOB, as_user, running

import fdbroker

POLICY = f"""
version: 1
topics: {{inbox: {{deliver: [queue]}}, mail: {{deliver: [queue]}}}}
limits: {{requests_per_second: 1000000, burst: 1000000}}
users:
  {ALICE}: {{send: ["*"]}}
  {BOB}: {{subscribe: ["*"]}}
  0: {{send: ["*"]}}
"""
_BATCH = 16


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


def receive(address, acknowledge=(), maximum=1000):
    with fdbroker.connect(address) as client:
        return [(message.number, message.payload.decode()) for message in client.receive(maximum, acknowledge)]


def _send_until_killed(address, turn, killed):
    """Messages, sixteen at a time; the inbox is killed as soon as the first status 0 is here: all whose 0 came."""
    seen = []
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(address)
        sock.settimeout(10)
        frames = []
        for index in range(_BATCH):
            text = f"{turn} {index} ".encode() + b"x" * 3000
            frames.append(struct.pack("!I", len(text)) + text)
        sock.sendall(b"".join(frames))
        data = sock.recv(4)
        os.kill(killed, signal.SIGKILL)
        with contextlib.suppress(ConnectionResetError):
            while more := sock.recv(4096):
                data += more
        for index, (status,) in enumerate(struct.iter_unpack("!I", data[: len(data) // 4 * 4])):
            assert status == 0
            seen.append(f"{turn} {index}")
    return seen


def test_whoever_has_seen_status_0_finds_it_stored_although_the_inbox_was_killed_that_moment(state):
    seen, got, last = [], [], []
    for turn in range(6):
        with serving(state) as broker:
            broker.expected_code = None
            messages = as_user(BOB, [], receive, broker.socket, last)
            assert not {number for number, _ in messages}.intersection(last)  # none comes again
            last = [number for number, _ in messages]
            got += [" ".join(text.split()[:2]) for _, text in messages]
            seen += _send_until_killed(broker.socket, turn, broker.pids["inbox"])
            assert broker.process.wait(60) == 70
    with serving(state) as broker:
        got += [" ".join(text.split()[:2]) for _, text in as_user(BOB, [], receive, broker.socket, last)]
    assert len(seen) >= 6
    assert set(seen) <= set(got), sorted(set(seen) - set(got))
    assert len(got) == len(set(got))


def test_a_damaged_file_is_set_aside_and_the_log_says_so(state):
    with serving(state) as broker:
        as_user(ALICE, [], send, broker.socket, "mail", "x")
    path = os.path.join(state, "messages.sqlite")
    with open(path, "r+b") as file:
        file.write(b"\xaa" * 200)
    with serving(state) as broker:
        (record,) = [one for one in broker.records() if one["MESSAGE_ID"].endswith("a09")]
        assert record["PRIORITY"] == "2"
        assert f"are damaged (file is not a database): kept as {path}.damaged-" in record["MESSAGE"]
        assert as_user(BOB, [], receive, broker.socket) == []
        as_user(ALICE, [], send, broker.socket, "mail", "y")
        assert [text for _, text in as_user(BOB, [], receive, broker.socket)] == ["y"]
