"""T12: descriptors that nobody asked for."""

from __future__ import annotations

import array
import os
import socket

import pytest
from harness import ALICE, EVERYONE_NULL, Raw, as_user, ask, outcome, running

from fdbroker.kernel import sockets


@pytest.mark.parametrize("count", [1, 2, 253])
def test_none_is_ever_kept(dev, count):
    def push(address):
        null = os.open("/dev/null", os.O_RDONLY)
        results = set()
        for _ in range(300):
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
            ["disconnected"],
            ["disconnected", "granted"],
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
        data, uid, cut = sockets.receive_with_sender(ours, 100)
        assert (data, uid, cut) == (b"x", os.getuid(), True)
        assert set(os.listdir("/proc/self/fd")) == before


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
