"""T57: a system call of one feature is allowed by the policy of another one, and without it ends the service."""

from __future__ import annotations

import errno
import os
import socket

import pytest
from floods import frame
from harness import ALICE, BOB, Raw, as_user, folder, running
from messaging import SEND

from fdbroker.kernel.sealed import sealed_memfd
from fdbroker.limits import every as limits

ENDS = 20  # so often, and systemd starts the service no more
SIZE = 65_000
SENDS = f"users: {{{ALICE}: {{send: [inbox]}}}}\n"
# each has what the inbox does for one handler alone: without a queue it may open no file
POLICIES = {
    "the journal alone": "version: 1\ntopics: {inbox: {deliver: [journal]}}\n" + SENDS,
    "subscribers alone": "version: 1\ntopics: {inbox: {deliver: [subscribers]}}\n" + SENDS,
    "a queue alone": f"version: 1\ntopics: {{inbox: {{deliver: [queue]}}}}\n{SENDS[:-2]}, {BOB}: {{subscribe: [inbox]}}}}\n",
}
LIMITS = "limits: {record_burst: 100000, records_per_second: 100000, requests_per_second: 100000, burst: 100000}\n"


def _by_frame(address):
    with Raw(address) as client:
        client.sock.sendall(frame(b"x" * SIZE))
        return int.from_bytes(client.sock.recv(4), "big")


def _by_memfd(address):
    """The way of the payloads that one call has no room for: the inbox reads it with pread64."""
    number = sealed_memfd("payload", b"x" * SIZE)
    call = b'{"method":"%s","parameters":{"topic":"inbox","fileDescriptor":0}}\0' % SEND.encode()
    try:
        with Raw(address) as client:
            socket.send_fds(client.sock, [call], [number])
            reply = client.reply()
    finally:
        os.close(number)
    return errno.ECONNRESET if reply is None else 0 if "error" not in reply else -1


def _many(address, action, count):
    return [action(address) for _ in range(count)]


@pytest.mark.parametrize("action", [_by_frame, _by_memfd], ids=["frame", "memfd"])
@pytest.mark.parametrize("name", POLICIES)
def test_messages_of_65000_bytes_are_taken_whatever_else_the_policy_has(dev, name, action):
    """And the same processes serve afterwards: none was killed by its filter, and started again."""
    assert limits.MESSAGE_BYTES > SIZE
    with folder() as where, running(POLICIES[name] + LIMITS, "--state", str(where / "state")) as broker:
        pids = dict(broker.pids)
        assert as_user(ALICE, [], _many, broker.socket, action, ENDS) == [0] * ENDS
        broker.reload(POLICIES[name] + LIMITS)
        assert as_user(ALICE, [], _many, broker.socket, action, ENDS) == [0] * ENDS
        assert as_user(BOB, [], _ping, broker.socket) == "PONG"
        assert broker.process.poll() is None
        for process, pid in pids.items():
            with open(f"/proc/{pid}/stat") as file:
                assert file.read().rpartition(") ")[2][0] not in "ZX", process


def _ping(address):
    with Raw(address) as client:
        client.sock.sendall(frame(b"PING"))
        return client.sock.recv(8)[4:].decode()
