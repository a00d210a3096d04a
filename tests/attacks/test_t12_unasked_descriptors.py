"""T12: descriptors that nobody asked for."""

from __future__ import annotations

import array
import errno
import os
import socket
import time

import pytest
from harness import ALICE, EVERYONE_NULL, Raw, as_user, ask, outcome, running

from fdbroker import limits
from fdbroker.kernel import sockets


def test_none_is_ever_kept(dev):
    """Two thousand messages, with every number of them that one can have."""

    def push(address):
        null = os.open("/dev/null", os.O_RDONLY)
        results = set()
        for count in [*range(1, 254)] * 8:
            with Raw(address) as client:
                try:
                    socket.send_fds(client.sock, [b'{"method":"org.varlink.service.GetInfo"}\0'], [null] * count)
                except PermissionError:  # Linux 6.16: the kernel refuses for us
                    results.add("EPERM")
                    client.send_call("org.varlink.service.GetInfo")
                results.add(outcome(client.reply()))
        return sorted(results)

    policy = EVERYONE_NULL + "limits: {connections: 1000}\n"
    with running(policy) as broker:
        ask(broker.socket, "/dev/null")
        assert as_user(ALICE, [], push, broker.socket) in (
            ["EPERM", "granted"],
            ["granted"],
        )
        broker.wait_idle()
        assert ask(broker.socket, "/dev/null") == "granted"


def test_where_the_kernel_does_not_refuse_there_is_no_room_for_them():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        sockets.ask_credentials(ours)
        null = os.open("/dev/null", os.O_RDONLY)
        try:
            socket.send_fds(theirs, [b"x"], [null] * 253)
        finally:
            os.close(null)
        before = set(os.listdir("/proc/self/fd"))
        assert sockets.receive_with_sender(ours, 100) == (b"x", os.getuid(), [], True)
        assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("call", ["info", "open", "list", "ping", "send", "wrong", "half"])
def test_where_messages_may_have_some_none_stays_and_who_sends_too_many_is_disconnected(dev, call):
    """As one who may send; whatever it sends them with, and in whatever order it goes away."""
    texts = {
        "info": b'{"method":"org.varlink.service.GetInfo"}\0',
        "open": b'{"method":"io.fdbroker.Broker.Open","parameters":{"resources":[{"device":"/dev/null"}]}}\0',
        "list": b'{"method":"io.fdbroker.Broker.List"}\0',
        "ping": b"\0\0\0\4PING",
        "send": b"\0\0\0\4text",
        "wrong": b'{"method":"io.fdbroker.Inbox.Send","parameters":{"topic":"inbox","payload":"x"}}\0',
        "half": b'{"method":"io.fdbroker.Inbox.Send",',
    }

    def push(address):
        null = os.open("/dev/null", os.O_RDONLY)
        ends = [set(), set()]
        for turn, count in enumerate([*range(1, 254), *[1, 16, 17, 253] * 15]):
            with Raw(address) as client:
                try:
                    socket.send_fds(client.sock, [texts[call]], [null] * count)
                except OSError as error:  # what it may have in flight itself, before the broker has closed the others
                    if error.errno != errno.ETOOMANYREFS:
                        raise
                    time.sleep(0.02)
                    continue
                if turn % 3 and call != "half":
                    got = client.sock.recv(65536)
                    ends[count > limits.DESCRIPTORS_PER_MESSAGE].add("granted" if got else "disconnected")
        return [sorted(one) for one in ends]

    policy = EVERYONE_NULL.replace("everyone: {", "everyone: {send: [inbox], ") + (
        "topics: {inbox: {}}\nlimits: {connections: 1000, requests_per_second: 100000, burst: 100000}\n"
    )
    with running(policy) as broker:
        ask(broker.socket, "/dev/null")
        few, many = as_user(ALICE, [], push, broker.socket)
        if call != "half":
            assert few == ["granted"]
            # while those of the connections before are still being closed, none is let in, and so none is too many
            assert many in (["disconnected"], ["disconnected", "granted"])
        broker.wait_idle()
        assert ask(broker.socket, "/dev/null") == "granted"


def test_more_than_there_is_room_for_is_closed_and_said():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        null = os.open("/dev/null", os.O_RDONLY)
        try:
            for sent, room in ((2, 1), (3, 2), (253, 252), (1, 0)):
                theirs.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [null] * sent))])
                before = set(os.listdir("/proc/self/fd"))
                with pytest.raises(OSError, match="cut"):
                    sockets.receive_into(ours, bytearray(10), room)
                assert set(os.listdir("/proc/self/fd")) == before
        finally:
            os.close(null)
