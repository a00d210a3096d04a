"""What came with messages is closed by threads: in order, bounded, never twice, and nobody waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import socket
import struct
import subprocess
import sys
import threading
import time

import pytest

import fdbroker.aio
from fdbroker.client import aio, calls, closing, sync
from fdbroker.client.replies import Replies
from fdbroker.kernel import sockets
from fdbroker.limits import every as limits
from fdbroker.wire import varlink

SAID = {"number": 1, "topic": "t", "uid": 7, "gid": 7, "pid": 1, "time": 1, "encoding": "text", "payload": ""}
MOST = limits.RECEIVED_THREADS + limits.RECEIVED_STUCK + 1  # one that looks whether those that run are stuck


def opened():
    return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)


def is_open(number):
    try:
        fcntl.fcntl(number, fcntl.F_GETFD)
    except OSError:
        return False
    return True


def wait_for(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def message(count, **said):
    numbers = [opened() for _ in range(count)]
    return numbers, calls.message({**SAID, "fileDescriptors": list(range(count)), **said}, numbers)


@pytest.fixture
def slow(monkeypatch):
    """Closings that wait, for the number as the kernel does it: it is free at once. What has begun, and what ends them."""
    begun, go_on, close = [], threading.Event(), closing._close

    def wait(number):
        close(number)
        begun.append(number)
        assert go_on.wait(30)

    monkeypatch.setattr(closing, "_close", wait)
    monkeypatch.setattr(closing, "_closing", closing.Closing())
    yield begun, go_on
    go_on.set()
    wait_for(lambda: not closing._closing._jobs._threads)


def test_a_message_is_closed_for_its_receiver_at_once(slow):
    begun, go_on = slow
    numbers, received = message(3)
    with received:
        pass
    for descriptor in received.descriptors:
        assert descriptor.closed
        with pytest.raises(ValueError, match="closed"):
            descriptor.fileno()
    wait_for(lambda: begun == numbers[:1])
    assert [is_open(number) for number in numbers] == [False, True, True]  # none of these is given to another file
    received.close()
    go_on.set()
    wait_for(lambda: begun == numbers)  # in order, and each once
    wait_for(lambda: not closing._closing._jobs._threads)


def test_who_sent_what_waits_holds_up_itself_alone(slow):
    begun, go_on = slow
    for _ in range(20):
        message(16, uid=7)[1].close()
    message(1, uid=8)[1].close()
    wait_for(lambda: len(begun) == 2)
    message(1, uid=9, owner=7)[1].close()  # uids of one user are one sender
    time.sleep(0.05)
    assert len(begun) == 2
    go_on.set()
    wait_for(lambda: len(begun) == 20 * 16 + 2)


def test_no_more_threads_than_that_and_none_is_left(slow):
    """RECEIVED_THREADS at once, and RECEIVED_STUCK beside them once those are stuck, of which one sender has a quarter."""
    begun, go_on = slow
    for _ in range(limits.RECEIVED_STUCK):
        message(1, uid=5)[1].close()
    most = limits.RECEIVED_STUCK // 4
    wait_for(lambda: len(begun) == most)
    time.sleep(limits.STUCK_SECONDS + 0.2)
    assert len(begun) == most
    for uid in range(100, 130):
        message(1, uid=uid)[1].close()
    wait_for(lambda: len(begun) == MOST - 1)
    time.sleep(limits.STUCK_SECONDS + 0.2)
    assert (len(begun), closing._closing._jobs._threads) == (MOST - 1, MOST)
    go_on.set()
    wait_for(lambda: len(begun) == limits.RECEIVED_STUCK + 30)
    wait_for(lambda: not closing._closing._jobs._threads)


def test_a_detached_descriptor_and_a_grant_are_no_threads_business(slow):
    begun, _ = slow
    (number,), received = message(1)
    assert received.descriptors[0].detach() == number
    received.close()
    grant = calls.Descriptor(opened(), "/dev/null", "ro", "f:1", "1:3")
    lent = grant.fileno()
    grant.close()
    assert (is_open(number), is_open(lent), begun) == (True, False, [])
    os.close(number)


def test_what_no_caller_takes_is_closed_by_threads_too(slow):
    begun, go_on = slow
    go_on.set()
    numbers = [opened() for _ in range(4)]
    calls.discard(varlink.Reply({"message": {**SAID, "fileDescriptors": [0]}}, "", continues=True), numbers[:1])
    with pytest.raises(fdbroker.errors.ProtocolViolation):
        calls.message({"fileDescriptors": 5}, numbers[1:2])
    replies = Replies()
    replies.feed(b"", numbers[2:])
    replies.close()
    wait_for(lambda: sorted(begun) == sorted(numbers))
    grants = [opened()]
    calls.discard(varlink.Reply({"grants": []}, "", continues=False), grants)
    assert (is_open(grants[0]), len(begun)) == (False, 4)


def test_what_came_with_a_message_that_was_cut_is_closed_by_who_reads_it():
    theirs, ours = socket.socketpair()
    numbers, taken = [opened() for _ in range(3)], []
    with theirs, ours:
        socket.send_fds(theirs, [b"x"], numbers)
        with pytest.raises(OSError, match="cut"):
            sockets.receive_into(ours, bytearray(10), 1, close=taken.extend)
    assert len(taken) == 1
    for number in (*numbers, *taken):
        os.close(number)


def test_an_error_of_close_is_nobodys():
    wait_for(lambda: not closing._closing._jobs._threads)
    closing.close_later([1 << 30, -1])
    wait_for(lambda: not closing._closing._jobs._threads)


def test_a_forked_child_closes_its_own(slow):
    begun, _ = slow
    message(4)[1].close()
    wait_for(lambda: begun)
    (number,), received = message(1)
    with closing._closing._lock:  # as if another thread held it
        child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            before = len(begun)
            received.close()
            wait_for(lambda: begun[before:] == [number])
            code = 0
        os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert is_open(number)
    received.close()


EXITING = """
import os, sys, threading
from fdbroker.client import calls, closing
close = threading.Event().wait
closing._close = lambda number: close()
numbers = [os.open("/dev/null", os.O_RDONLY) for _ in range(3)]
said = {"number": 1, "topic": "t", "uid": 7, "gid": 7, "pid": 1, "time": 1, "encoding": "text", "payload": ""}
calls.message({**said, "fileDescriptors": [0, 1]}, numbers[:2]).close()
late = calls.message({**said, "uid": 8, "fileDescriptors": [0]}, numbers[2:])  # for the interpreter to forget
sys.late = late
print("end")
"""


def test_a_closing_that_waits_does_not_keep_the_interpreter():
    result = subprocess.run([sys.executable, "-c", EXITING], capture_output=True, text=True, timeout=30, check=True)
    assert (result.stdout, result.stderr) == ("end\n", "")


@contextlib.contextmanager
def lingering(sock):
    """What sends, on this connection, a TCP socket whose last close takes five seconds."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        peer, _ = server.accept()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 5))
    one.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            one.send(b"x" * 65536)

    def send():
        socket.send_fds(sock, [reply(fileDescriptors=[0])], [one.fileno()])
        one.close()

    with peer:
        yield send


def reply(**said):
    return varlink.encode_reply({"message": {**SAID, **said}}, continues=True)


def test_the_end_of_a_subscription_waits_for_nothing_that_is_unread():
    theirs, ours = socket.socketpair()
    with theirs, lingering(theirs) as send, sync.Client(ours, 5.0) as client:
        theirs.sendall(reply())
        next(client.subscribe(["t"]))
        send()
        began_s = time.monotonic()
        client.close()
        assert time.monotonic() - began_s < 2
        with pytest.raises(fdbroker.errors.BrokerUnavailable):
            client.about()


def test_and_so_it_is_with_asyncio():
    async def use():
        theirs, ours = socket.socketpair()
        with theirs, lingering(theirs) as send:
            async with aio.Client(ours) as client:
                theirs.sendall(reply())
                await anext(client.subscribe(["t"]))
                send()
                began_s = time.monotonic()
                client.close()
                assert time.monotonic() - began_s < 2

    asyncio.run(use())


def test_a_flood_does_not_fill_the_receivers_table():
    """Thousands of messages that come as fast as they can be read, with descriptors that take no time to close."""
    count, most = 2000, 0
    theirs, ours = socket.socketpair()

    def flood():
        numbers = [opened()] * 16
        for _ in range(count):
            socket.send_fds(theirs, [reply(fileDescriptors=list(range(16)))], numbers)
        os.close(numbers[0])

    thread = threading.Thread(target=flood)
    thread.start()
    with theirs, sync.Client(ours, 5.0) as client:
        for number, received in enumerate(client.subscribe(["t"]), 1):
            received.close()
            if number % 20 == 0:
                most = max(most, len(os.listdir("/proc/self/fd")))
            if number == count:
                break
        thread.join(30)
    assert most < 512


def test_a_sender_whose_closings_wait_slows_its_receiver_down_by_little(slow):
    took = []
    for _ in range(100):
        received = message(16)[1]
        began_s = time.monotonic()
        received.close()
        took.append(time.monotonic() - began_s)
    assert sum(took) < 1
    slow[1].set()
