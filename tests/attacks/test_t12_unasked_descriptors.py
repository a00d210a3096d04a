"""T12: descriptors that nobody asked for."""

from __future__ import annotations

import array
import contextlib
import errno
import os
import socket
import struct
import time

import pytest
from harness import ALICE, BOB, CAROL, EVERYONE_NULL, Raw, as_user, ask, ip, outcome, own_network, private_dev, running

from fdbroker.kernel import received, sockets
from fdbroker.kernel.received import receive_with_sender
from fdbroker.limits import every as limits


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
        found = set(as_user(ALICE, [], push, broker.socket))
        assert "granted" in found
        # before the opener has accepted, they come in: more than a message may have end the connection
        assert found <= {"EPERM", "granted", "disconnected"}
        broker.wait_idle()
        assert ask(broker.socket, "/dev/null") == "granted"


def test_where_the_kernel_does_not_refuse_there_is_no_room_for_them():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        received.ask_credentials(ours)
        null = os.open("/dev/null", os.O_RDONLY)
        try:
            socket.send_fds(theirs, [b"x"], [null] * 253)
        finally:
            os.close(null)
        before = set(os.listdir("/proc/self/fd"))
        assert receive_with_sender(ours, 100) == (b"x", os.getuid(), [], True)
        assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("call", ["info", "open", "list", "ping", "send", "wrong", "half"])
def test_where_messages_may_have_some_none_stays_and_too_many_disconnect(dev, call):
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

    def once(address, null, count, *, reads):
        """What came back, or None when nothing was sent or read."""
        with Raw(address) as client:
            try:
                socket.send_fds(client.sock, [texts[call]], [null] * count)
            except OSError as error:  # what it may have in flight itself, before the broker has closed the others
                if error.errno != errno.ETOOMANYREFS:
                    raise
                time.sleep(0.02)
                return None
            return client.sock.recv(65536) if reads and call != "half" else None

    def push(address):
        null = os.open("/dev/null", os.O_RDONLY)
        ends = [set(), set()]
        for turn, count in enumerate([*range(1, 254), *[1, 16, 17, 253] * 15]):
            too_many = count > limits.DESCRIPTORS_PER_MESSAGE
            end = time.monotonic() + 10
            # while too many of the connections before are still being closed, whoever sends one more is disconnected
            while (got := once(address, null, count, reads=turn % 3)) == b"" and not too_many:
                assert time.monotonic() < end
                time.sleep(0.02)
            if got is not None:
                ends[too_many].add("granted" if got else "disconnected")
        return [sorted(one) for one in ends]

    policy = EVERYONE_NULL.replace("everyone: {", "everyone: {send: [inbox], ") + (
        "topics: {inbox: {}}\nlimits: {connections: 1000, requests_per_second: 100000, burst: 100000}\n"
    )
    with running(policy) as broker:
        ask(broker.socket, "/dev/null")
        few, many = as_user(ALICE, [], push, broker.socket)
        if call != "half":
            assert (few, many) == (["granted"], ["disconnected"])
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


def _lingering(seconds):
    """A TCP socket whose last close waits, for its other end does not read; and what must stay open for that."""
    server = socket.create_server(("127.0.0.1", 0))
    one = socket.create_connection(server.getsockname())
    other, _ = server.accept()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, seconds))
    one.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            one.send(bytes(65536))
    return one, (server, other)


def _queue_slow_one(address, how, seconds, go):
    """One descriptor that is slow to close, before the opener has accepted the connection, or with an urgent byte."""
    slow, kept = _lingering(seconds)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [slow.fileno()]))]
    for _ in range(200):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(address)
            try:
                if how == "urgent":
                    sock.sendall(b"\0\0\0\4PI")
                    sock.sendmsg([b"N"], rights, socket.MSG_OOB)
                else:
                    sock.sendmsg([b"\0\0\0\4PING"], rights)
            except PermissionError:  # it was accepted already, and may send none
                continue
            slow.close()
            os.write(go, b"x")
            time.sleep(seconds)
            return len(kept)
    os.write(go, b"-")
    return 0


@pytest.mark.parametrize("how", ["early", "urgent"])
def test_one_that_is_slow_to_close_holds_up_nobody_however_it_came(how):
    """Whoever closes it, it is not the loop: another user's PING does not wait for SO_LINGER."""
    seconds = 4

    def pings(address):
        with Raw(address) as client:
            client.sock.settimeout(2 * seconds)
            began_s = time.monotonic()
            client.sock.sendall(b"\0\0\0\4PING")
            assert client.sock.recv(8) == b"\0\0\0\4PONG"
            return time.monotonic() - began_s

    sender = ALICE if how == "urgent" else CAROL
    policy = f"version: 1\ntopics: {{inbox: {{}}}}\nusers: {{{sender}: {{send: [inbox]}}}}\n"
    with own_network(), private_dev(), running(policy) as broker:
        ip("link", "set", "lo", "up")
        go = os.pipe()
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                as_user(ALICE, [], _queue_slow_one, broker.socket, how, seconds, go[1])
            os._exit(0)
        try:
            assert os.read(go[0], 1) == b"x"
            assert as_user(BOB, [], pings, broker.socket) < seconds / 2
        finally:
            os.waitpid(child, 0)
            os.close(go[0])
            os.close(go[1])
        broker.wait_idle()


def test_an_urgent_byte_is_a_byte_like_any_other(dev):
    """It ends a watching connection, as all that comes then; before, it would be told of again and again."""

    def watches(address):
        with Raw(address) as client:
            client.sock.settimeout(10)
            client.send_call("io.fdbroker.Broker.List", more=True)
            client.reply()
            try:
                client.sock.send(b"x", socket.MSG_OOB)
            except OSError as error:
                return errno.errorcode[error.errno]
            return client.sock.recv(100).decode()

    with running(EVERYONE_NULL) as broker:
        assert as_user(ALICE, [], watches, broker.socket) in ("", "EOPNOTSUPP")
        broker.wait_idle()
