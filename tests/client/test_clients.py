"""Both clients, against a running broker and against one that breaks the rules."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading

import pytest
from harness import MEM, folder, node, running

import fdbroker
import fdbroker.aio
from fdbroker.client.sync import ping
from fdbroker.errors import BrokerUnavailable, Denied, ProtocolViolation
from fdbroker.wire import varlink

POLICY = 'version: 1\neveryone: {devices: [{path: "/dev/pool/*", access: rw}]}\n'


def test_the_blocking_client(dev):
    node("/dev/pool/a", MEM["zero"])
    node("/dev/pool/b", MEM["null"])
    with running(POLICY) as broker, fdbroker.connect(broker.socket) as client:
        with client.open("/dev/pool/a", "rw") as descriptor:
            assert os.read(descriptor.fileno(), 3) == b"\0\0\0"
            assert descriptor.rdev == "1:5"
        with pytest.raises(Denied, match="/dev/null"):
            client.open("/dev/null")
        first, second = client.open_all(["/dev/pool/b", "/dev/pool/a"])
        with first, second:
            assert (os.fstat(first.fileno()).st_rdev, os.fstat(second.fileno()).st_rdev) == (MEM["null"], MEM["zero"])
        assert [offer.resource.path for offer in client.offers()] == ["/dev/pool/a", "/dev/pool/b"]
        assert ping(broker.socket) < 5


def test_the_asyncio_client(dev):
    node("/dev/pool/a", MEM["zero"])

    async def use(address):
        async with await fdbroker.aio.connect(address) as client:
            with await client.open("/dev/pool/a") as descriptor:
                assert os.read(descriptor.fileno(), 3) == b"\0\0\0"
            with pytest.raises(Denied):
                await client.open("/dev/null")
            assert [offer.resource.path for offer in await client.offers()] == ["/dev/pool/a"]
            # one that gives up does not disturb those behind it
            given_up = asyncio.ensure_future(client.open("/dev/pool/a"))
            await asyncio.sleep(0)
            given_up.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await given_up
        async with await fdbroker.aio.connect(address) as client:
            count = 0
            async for offers in client.watch():
                count += 1
                if count == 1:
                    assert [offer.resource.path for offer in offers] == ["/dev/pool/a"]
                    node("/dev/pool/c", MEM["zero"])
                else:
                    assert [offer.resource.path for offer in offers] == ["/dev/pool/a", "/dev/pool/c"]
                    break

    with running(POLICY) as broker:
        asyncio.run(use(broker.socket))


def test_nobody_there_is_said_with_the_address():
    for address in ("/nonexistent/socket", "/dev/null"):
        with pytest.raises(BrokerUnavailable, match=address):
            fdbroker.connect(address)
        with pytest.raises(BrokerUnavailable, match=address):
            asyncio.run(fdbroker.aio.connect(address))


GRANT = {"fileDescriptor": 0, "resource": {"device": "/dev/x"}, "access": "ro", "rule": "f:1"}
ONE = varlink.encode_reply({"grants": [GRANT]})
EVIL = {
    "nothing": (b"", 0),
    "half a reply": (ONE[:10], 0),
    "no json": (b"x\0", 0),
    "no descriptor": (ONE, 0),
    "another resource": (ONE.replace(b"/dev/x", b"/dev/y"), 1),
    "one descriptor too many": (ONE, 2),
    "no grants": (varlink.encode_reply({"grants": []}), 0),
    "descriptors with an error": (varlink.encode_error("io.fdbroker.Broker.Denied", {"grants": [GRANT]}), 1),
    "two replies": (ONE + ONE, 2),
    "a reply of another call": (varlink.encode_reply({"resources": []}), 0),
}


@contextlib.contextmanager
def _evil(data, count):
    """A broker that answers the first call with this, and hangs up."""
    with folder() as where, socket.socket(socket.AF_UNIX) as listener:
        path = str(where / "socket")
        listener.bind(path)
        listener.listen()

        def serve():
            sock, _ = listener.accept()
            with sock:
                sock.recv(65536)
                numbers = [os.open("/dev/null", os.O_RDONLY) for _ in range(count)]
                if data:
                    socket.send_fds(sock, [data], numbers)
                for number in numbers:
                    os.close(number)

        thread = threading.Thread(target=serve)
        thread.start()
        yield path
        thread.join(5)


@pytest.mark.parametrize("kind", EVIL)
def test_a_broker_that_breaks_the_rules_gets_an_error_and_leaks_nothing(root, kind):
    with _evil(*EVIL[kind]) as path, fdbroker.connect(path, timeout_s=5) as client:
        with pytest.raises((BrokerUnavailable, ProtocolViolation, Denied)):
            client.open("/dev/x").close()
        with pytest.raises(BrokerUnavailable):
            client.open("/dev/x")


@pytest.mark.parametrize("kind", EVIL)
def test_and_so_it_does_from_the_asyncio_client(root, kind):
    async def use(path):
        async with asyncio.timeout(5), await fdbroker.aio.connect(path) as client:
            try:
                (await client.open("/dev/x")).close()
            except (BrokerUnavailable, ProtocolViolation, Denied):
                return
            assert kind in ("one descriptor too many", "two replies")  # found when the next one would be read

    with _evil(*EVIL[kind]) as path:
        asyncio.run(use(path))


def test_a_call_that_was_interrupted_ends_the_client_for_the_next_would_get_its_answer(dev):
    import signal

    node("/dev/pool/a", MEM["zero"])

    class Interrupted(Exception):
        pass

    def interrupt(*_):
        raise Interrupted

    with folder() as where, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(where / "s"))
        listener.listen()
        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            with fdbroker.connect(str(where / "s")) as client:
                signal.setitimer(signal.ITIMER_REAL, 0.2)
                with pytest.raises(Interrupted):
                    client.open("/dev/pool/a")
                with pytest.raises(BrokerUnavailable):
                    client.open("/dev/pool/b")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def test_an_answer_that_does_not_come_is_a_timeout(root):
    with folder() as where, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(where / "s"))
        listener.listen()
        with (
            fdbroker.connect(str(where / "s"), timeout_s=0.2) as client,
            pytest.raises(BrokerUnavailable, match="in time"),
        ):
            client.open("/dev/x")


def test_closing_an_asyncio_client_ends_every_call_that_waits_for_it(root):
    async def use(path):
        client = await fdbroker.aio.connect(path)
        long = ["/dev/" + "x" * 900] * 64
        tasks = [asyncio.ensure_future(client.open_all(long)) for _ in range(10)]
        await asyncio.sleep(0.2)
        client.close()
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
        assert all(isinstance(result, BrokerUnavailable) for result in results), results

    with folder() as where, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(where / "s"))
        listener.listen()
        asyncio.run(use(str(where / "s")))


def test_a_full_backlog_is_waited_for_and_no_longer_than_asked(root):
    with folder() as where, socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as stack:
        path = str(where / "s")
        listener.bind(path)
        listener.listen(0)
        stack.enter_context(fdbroker.connect(path))
        with pytest.raises(BrokerUnavailable):
            fdbroker.connect(path, timeout_s=0.3)

        async def late():
            async with asyncio.timeout(0.3):
                await fdbroker.aio.connect(path)

        with pytest.raises(TimeoutError):
            asyncio.run(late())


def test_refusals_reach_every_caller(dev):
    from fdbroker.errors import QuotaExceeded, RateLimited

    async def held(address):
        client = await fdbroker.aio.connect(address)
        await asyncio.sleep(0.2)
        with pytest.raises(QuotaExceeded):
            await client.open("/dev/x")
        client.close()

    with running(POLICY + "limits: {burst: 1, requests_per_second: 1, connections: 1}\n") as broker:
        with fdbroker.connect(broker.socket) as client:
            client.offers()
            with pytest.raises(RateLimited):
                next(client.watch())
            asyncio.run(held(broker.socket))
