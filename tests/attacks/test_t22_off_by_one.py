"""T22: off-by-one limits, and booleans that mean the opposite."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time

import pytest
from harness import EVERYONE_NULL, MEM, Raw, ask, node, outcome, running


@pytest.mark.parametrize("maximum", [1, 4])
def test_connections(dev, maximum):
    with running(EVERYONE_NULL + f"limits: {{connections: {maximum}}}\n") as broker, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Raw(broker.socket)) for _ in range(maximum + 1)]
        outcomes = [outcome(client.open("/dev/null")) for client in clients]
        assert outcomes == ["granted"] * maximum + ["QuotaExceeded"]


def test_a_connection_that_was_closed_makes_room_at_once(dev):
    """One of seven was refused: its end goes from the inbox to the opener, and on to the keeper."""
    with running(EVERYONE_NULL + "limits: {connections: 1}\n") as broker:
        for _ in range(100):
            with Raw(broker.socket) as client:
                assert outcome(client.open("/dev/null")) == "granted"


@pytest.mark.parametrize("burst", [1, 5])
def test_burst_and_rate(dev, burst):
    with (
        running(EVERYONE_NULL + f"limits: {{burst: {burst}, requests_per_second: 1}}\n") as broker,
        Raw(broker.socket) as client,
    ):
        assert [outcome(client.open("/dev/null")) for _ in range(burst)] == ["granted"] * burst
        reply = client.open("/dev/null")
        assert outcome(reply) == "RateLimited"
        assert 0 < reply["parameters"]["retryAfterMilliseconds"] <= 1000
        with Raw(broker.socket) as again:  # a new connection brings no new bucket
            assert outcome(again.open("/dev/null")) == "RateLimited"
        time.sleep(reply["parameters"]["retryAfterMilliseconds"] / 1000 + 0.05)
        assert outcome(client.open("/dev/null")) == "granted"


@pytest.mark.parametrize("maximum", [1, 3])
def test_unread_grants(dev, maximum):
    call = b'{"method":"io.fdbroker.Broker.Open","parameters":{"resources":[{"device":"/dev/null"}]}}\0'
    with running(EVERYONE_NULL + f"limits: {{unread_grants: {maximum}}}\n") as broker, Raw(broker.socket) as client:
        client.sock.sendall(call * (maximum + 1))
        broker.wait_for("too many grants wait unread")
        assert [outcome(client.reply()) for _ in range(maximum)] == ["granted"] * maximum
        assert outcome(client.reply()) in ("ClientNotReading", "disconnected")


def test_limits_of_a_user_and_of_groups(dev):
    policy = EVERYONE_NULL + "limits: {connections: 1}\nusers: {0: {limits: {connections: 2}}}\n"
    with running(policy) as broker, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Raw(broker.socket)) for _ in range(3)]
        assert [outcome(client.open("/dev/null")) for client in clients] == ["granted"] * 2 + ["QuotaExceeded"]


def test_the_reply_of_the_largest_batch_of_long_names_is_refused_before_anything_leaves(dev):
    long = "/dev/" + "q" * 200
    node(long, MEM["zero"])
    longer = "/dev/" + "f" * 250
    node(longer, MEM["zero"])
    policy = 'version: 1\neveryone: {devices: [{path: "/dev/q*"}, {path: "/dev/f*"}]}\n'
    with running(policy) as broker, Raw(broker.socket) as client:
        assert outcome(client.open(*[long] * 64)) == "granted"
    with running(policy.replace("/dev/f*", "/dev/f*/*/*")) as broker, Raw(broker.socket) as client:
        deep = "/dev/" + "/".join(["f" * 250] * 3)
        node(deep.replace("f" * 250, "f" * 249, 1), MEM["zero"])
        deep = deep.replace("f" * 250, "f" * 249, 1)
        reply = client.open(*[deep] * 64)
        assert outcome(reply) == "QuotaExceeded"
        assert reply["parameters"] == {"limit": "reply_bytes", "maximum": 32768}
        assert not client.descriptors
        assert outcome(client.open(*[deep] * 4)) == "granted"


def test_read_only_is_read_only(dev):
    node("/dev/x", MEM["full"])
    with running("version: 1\neveryone: {devices: [{path: /dev/x}]}\n") as broker, Raw(broker.socket) as client:
        assert outcome(client.open("/dev/x")) == "granted"
        number = client.take()
        assert fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(number, b"x")
        os.close(number)
        assert ask(broker.socket, "/dev/x", access="rw") == "Denied"
