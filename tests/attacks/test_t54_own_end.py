"""T54: a connection that is sent to itself, or crosswise, never closes, although no process of its client lives."""

from __future__ import annotations

import contextlib
import os
import socket
import time

import floods
import pytest
from harness import ALICE, as_user, running
from lingering import Lingering

POLICY = """\
version: 1
topics: {inbox: {}, news: {}}
everyone: {send: ["*"], subscribe: ["*"], devices: [{path: /dev/null, access: rw, class: mem, device: "1:3"}]}
"""
RIGHTLESS = 'version: 1\neveryone: {devices: [{path: /dev/null, access: rw, class: mem, device: "1:3"}]}\n'
WATCH = floods.call("Broker.List", more=True)
SECONDS = 10


def _full(sock, message):
    """Ask until neither side takes any more, and read nothing."""
    sock.setblocking(False)
    quiet_s = time.monotonic()
    while time.monotonic() - quiet_s < 0.3:
        try:
            sock.send(message)
            quiet_s = time.monotonic()
        except BlockingIOError:
            time.sleep(0.01)


def behind_subscribe(one, other):
    one.sendall(floods.SUBSCRIBE)
    time.sleep(0.2)
    _send(one, b"x", one, other)


def behind_a_watch(one, other):
    one.sendall(WATCH)
    one.recv(65536)
    _send(one, floods.PING, one)


def with_subscribe(one, other):
    _send(one, floods.SUBSCRIBE + floods.call("Inbox.Send", topic="news", payload="x"), one)


def half_a_message(one, other):
    _send(one, b"\0\0\0\xff half", one, other)


def _send_behind(sock, message):
    """Send a message with the connection's own end behind those that wait: a little is read until there is room."""
    while True:
        try:
            socket.send_fds(sock, [message], [sock.fileno()])
        except BlockingIOError:
            sock.recv(4096)
            time.sleep(0.02)
        else:
            return


def behind_unread_answers(one, other):
    _full(one, floods.INFO * 20)
    _send_behind(one, floods.INFO)


def behind_unread_grants(one, other):
    _full(one, floods.OPEN)
    _send_behind(one, floods.OPEN)


def crosswise(one, other):
    """Each has the other's end in its queue, behind a subscription."""
    for sock in (one, other):
        sock.sendall(floods.SUBSCRIBE)
    time.sleep(0.2)
    _send(one, b"x", other)
    _send(other, b"x", one)


def as_a_message(one, other):
    """To a subscriber that never reads, by the broker itself."""
    one.sendall(floods.SUBSCRIBE)
    time.sleep(0.2)
    for sock in (one, other):
        _send(other, floods.call("Inbox.Send", topic="news", payload="x", fileDescriptors=[0]), sock)


def before_it_is_let_in(one, other):
    for _ in range(200):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(one.getpeername())
            _send(sock, floods.INFO, sock)


def _send(sock, data, *ends):
    with contextlib.suppress(OSError):  # a kernel that keeps descriptors out
        sock.setblocking(False)
        socket.send_fds(sock, [data], [end.fileno() for end in ends])


def with_what_waits_for_it(one, other):
    """To close the first descriptor waits for ten minutes, or until the second is closed."""
    slow = Lingering(600)
    _send(one, b"\0\0\0\xff half", *slow.ours, *slow.others)
    for end in (*slow.others, *slow.ours):  # in this order: where they were not sent, this process would wait
        end.close()


WAYS = (
    *(behind_subscribe, behind_a_watch, with_subscribe, half_a_message, behind_unread_answers, behind_unread_grants),
    *(crosswise, as_a_message, before_it_is_let_in, with_what_waits_for_it),
)


def _client(address, name):
    way = next(way for way in WAYS if way.__name__ == name)
    socks = [socket.socket(socket.AF_UNIX) for _ in range(2)]
    for sock in socks:
        sock.connect(address)
    with contextlib.suppress(OSError):  # it was disconnected: so much the better
        way(*socks)
    return os.getpid()


@pytest.mark.parametrize("policy", [POLICY, RIGHTLESS], ids=["may send", "may not"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_nothing_of_it_is_left_soon_after_its_process(dev, way, policy):
    with running(policy) as broker:
        as_user(ALICE, [], _client, broker.socket, way.__name__)
        ended_s = time.monotonic()
        while (counts := broker.counts()) != broker.idle:
            assert time.monotonic() - ended_s < SECONDS, f"{counts}, were {broker.idle}"
            time.sleep(0.05)


def test_a_subscriber_that_asks_for_more_is_disconnected_and_one_that_sends_no_more_is_not(dev):
    with running(POLICY) as broker, floods.connected(broker.socket) as one, floods.connected(broker.socket) as other:
        for sock in (one, other):
            sock.settimeout(30)
            sock.sendall(floods.SUBSCRIBE)
        time.sleep(0.2)
        one.sendall(b"x")
        assert one.recv(100) == b""
        other.shutdown(socket.SHUT_WR)
        time.sleep(0.2)
        with floods.connected(broker.socket) as sender:
            sender.sendall(floods.NEWS)
            assert b'"payload":"x"' in other.recv(1000)
        broker.wait_for("the client broke the protocol")
