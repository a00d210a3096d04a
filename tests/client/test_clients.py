"""Both clients, against a running broker and against one that breaks the rules."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import threading
import time

import pytest
from fakes import answering
from harness import MEM, RATES, command, folder, node, running

import fdbroker
import fdbroker.aio
from fdbroker.client.sync import ping
from fdbroker.errors import BrokerUnavailable, Denied, PolicyBroken, ProtocolViolation, QuotaExceeded
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
        thread.join(30)


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
        with pytest.raises(BrokerUnavailable, match="too many clients wait to be let in at /mnt"):
            fdbroker.connect(path, timeout_s=0.3)

        async def late():
            async with asyncio.timeout(0.3):
                await fdbroker.aio.connect(path)

        with pytest.raises(TimeoutError):
            asyncio.run(late())


def test_refusals_reach_every_caller(dev):
    from fdbroker.errors import RateLimited

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


AT_ACCEPT = {
    "the limit": (QuotaExceeded, {"limit": "connections", "maximum": 64}),
    "no descriptors": (QuotaExceeded, {"limit": "descriptors", "maximum": 1000}),
    "a broken policy": (PolicyBroken, {}),
}


@pytest.mark.parametrize("why", AT_ACCEPT)
def test_whoever_is_turned_away_hears_why_whatever_it_speaks(root, why):
    """Twenty times each, for the end comes before, while or after the client writes."""
    kind, parameters = AT_ACCEPT[why]

    def blocking(address, use):
        with fdbroker.connect(address) as client:
            with pytest.raises(kind):
                use(client)
            with pytest.raises(BrokerUnavailable):
                client.open("/dev/x")

    async def several(address):
        async with await fdbroker.aio.connect(address) as client:
            calls = [client.open("/dev/x"), client.offers(), client.send("t", "x", descriptors=[0])]
            errors = await asyncio.gather(*calls, return_exceptions=True)
            assert [type(error) for error in errors] == [kind] * 3
            assert len(set(map(id, errors))) == 3
            await ended(client)
            with pytest.raises(kind):
                await client.ping()
        async with await fdbroker.aio.connect(address) as client:
            await asyncio.sleep(0.02)  # the refusal comes before the first call
            with pytest.raises(kind):
                await client.open("/dev/x")
            await ended(client)

    async def ended(client):
        """A program that takes a refusal for an answer must not hear it for ever: it could connect again."""
        for _ in range(2):
            with pytest.raises(BrokerUnavailable):
                await client.open("/dev/x")

    async def streams(address):
        for stream in ("watch", "subscribe"):
            async with await fdbroker.aio.connect(address) as client:
                with pytest.raises(kind):
                    await anext(client.watch() if stream == "watch" else client.subscribe(["t"]))

    with answering(varlink.encode_error(f"io.fdbroker.Broker.{kind.wire_name}", parameters), unread=True) as address:
        for _ in range(20):
            with pytest.raises(kind):
                ping(address)
            blocking(address, lambda client: client.open("/dev/x"))
            blocking(address, lambda client: client.send("t", "x" * 100_000, descriptors=[0]))
            blocking(address, lambda client: next(client.watch()))
            blocking(address, lambda client: next(client.subscribe(["t"])))
            asyncio.run(several(address))
            asyncio.run(streams(address))
        code, out, err = command(address, "ping")
        assert (code, out) == (75, "")
        assert str(kind(**parameters) if parameters else kind()) in err


def test_a_subscription_outlives_a_policy_that_is_broken_for_a_while(dev):
    """A broker that comes back with a broken policy is gone like one that does not come back yet."""
    broken = varlink.encode_error("io.fdbroker.Broker.PolicyBroken", {})
    message = {"number": 1, "topic": "t", "uid": 0, "gid": 0, "pid": 1, "payload": "x", "encoding": "text"}
    said = varlink.encode_reply({"message": {**message, "time": time.time_ns() // 1000 + 10**9}}, continues=True)

    def serve(listener):
        for answer in (b"", broken, broken, said):
            with listener.accept()[0] as sock:
                sock.sendall(answer)
                if answer == said:
                    sock.recv(65536)
                    sock.recv(1)

    async def talk(address):
        async with asyncio.timeout(10), await fdbroker.aio.connect(address) as client:
            return (await anext(client.subscribe(["t"]))).payload

    for blocking in (True, False):
        with folder() as where, socket.socket(socket.AF_UNIX) as listener:
            address = str(where / "s")
            listener.bind(address)
            listener.listen()
            thread = threading.Thread(target=serve, args=(listener,))
            thread.start()
            if blocking:
                with fdbroker.connect(address) as client:
                    assert next(client.subscribe(["t"])).payload == b"x"
            else:
                assert asyncio.run(talk(address)) == b"x"
            thread.join(30)


def test_at_the_limit_of_connections_every_command_says_so(dev):
    """The service's own limit of 64, with real connections."""
    with running(POLICY) as broker, contextlib.ExitStack() as held:
        for _ in range(64):
            held.enter_context(fdbroker.connect(broker.socket)).offers()
        for words in (("ping",), ("list",), ("open", "/dev/pool/a"), ("send", "t", "x" * 100_000), ("subscribe", "t")):
            code, out, err = command(broker.socket, *words)
            assert (code, out, err) == (75, "", "fdbroker: limit connections is reached, maximum 64\n")


# ---- calls that are cancelled

CALLS = 1000
STRESSED = f"""
version: 1
limits: {{{RATES}, unread_grants: 1000}}
topics: {{t: {{}}}}
everyone: {{devices: [{{path: "/dev/pool/*", access: rw}}], send: [t]}}
"""


def test_a_call_that_is_cancelled_in_its_first_turns_ends_alone(dev):
    node("/dev/pool/a", MEM["zero"])

    async def use(address):
        async with await fdbroker.aio.connect(address) as client:
            for turns in range(6):
                task = asyncio.ensure_future(client.open_all(["/dev/pool/a"] * 60))
                for _ in range(turns):
                    await asyncio.sleep(0)
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    for descriptor in await task:
                        descriptor.close()
            for _ in range(100):
                with contextlib.suppress(TimeoutError):
                    (await asyncio.wait_for(client.open("/dev/pool/a"), 1e-5)).close()
            with await client.open("/dev/pool/a") as descriptor:
                assert descriptor.rdev == "1:5"

    with running(STRESSED) as broker:
        asyncio.run(use(broker.socket))
        broker.wait_idle()


@pytest.mark.parametrize("seed", [1, 2])
def test_a_thousand_calls_cancelled_at_random_points_leave_the_client_as_it_was(dev, seed):
    numbers = {f"/dev/pool/{name}": os.makedev(*at) for name, at in (("a", (1, 3)), ("b", (1, 5)), ("c", (1, 7)))}
    for path, number in numbers.items():
        node(path, number)
    chance = random.Random(seed)
    ended = dict.fromkeys(("answered", "cancelled"), 0)

    async def one(client):
        kind = chance.randrange(4)
        if kind == 3:
            await client.send("t", "x" * chance.choice((1, 1000, 100_000)), descriptors=[0] * chance.randrange(2))
        elif kind == 2:
            assert [offer.resource.path for offer in await client.offers()] == sorted(numbers)
        else:
            paths = chance.choices(sorted(numbers), k=chance.choice((1, 1, 1, 16)))
            found = await client.open_all(paths)
            assert [os.fstat(descriptor.fileno()).st_rdev for descriptor in found] == [numbers[path] for path in paths]
            for descriptor in found:
                descriptor.close()

    async def worker(client, jobs):
        for _ in jobs:
            task = asyncio.ensure_future(one(client))
            try:
                match chance.randrange(4):
                    case 0:
                        await task
                    case 1:
                        await asyncio.wait_for(task, chance.random() * 0.01)
                    case _:
                        for _ in range(chance.randrange(6)):
                            await asyncio.sleep(0)
                        task.cancel()
                        await task
                ended["answered"] += 1
            except (asyncio.CancelledError, TimeoutError):
                ended["cancelled"] += 1

    async def use(address):
        async with asyncio.timeout(120), await fdbroker.aio.connect(address) as client:
            jobs = iter(range(CALLS))
            await asyncio.gather(*(worker(client, jobs) for _ in range(20)))
            for path, number in numbers.items():
                with await client.open(path) as descriptor:
                    assert os.fstat(descriptor.fileno()).st_rdev == number
            assert not client._waiting

    with running(STRESSED) as broker:
        asyncio.run(use(broker.socket))
        broker.wait_idle()
    assert ended["answered"] + ended["cancelled"] == CALLS
    assert ended["cancelled"] > CALLS / 4, ended


def test_of_cancelled_calls_those_that_have_begun_are_sent_whole_and_others_not_at_all(root):
    """Against a broker that reads nothing until they are cancelled, so that one of them is sent in part."""
    tail = ["/dev/" + "y" * 900] * 63
    count = 12

    def answer_all(sock):
        """Every call that comes, until the last one: answered with the first path that it names."""
        buffer, firsts = b"", []
        while f"/dev/{count - 1}" not in firsts:
            data = sock.recv(65536)
            assert data, firsts
            buffer += data
            while b"\0" in buffer:
                message, _, buffer = buffer.partition(b"\0")
                first = json.loads(message)["parameters"]["resources"][0]
                firsts.append(first["device"])
                sock.sendall(varlink.encode_error("io.fdbroker.Broker.Denied", {"resource": first}))
        return firsts

    async def use(path, listener):
        async with asyncio.timeout(20), await fdbroker.aio.connect(path) as client:
            with listener.accept()[0] as sock:
                tasks = [asyncio.ensure_future(client.open_all([f"/dev/{one}", *tail])) for one in range(count)]
                await asyncio.sleep(0.1)
                assert 1 < len(client._unsent) < count
                for task in tasks[1:-1]:
                    task.cancel()
                firsts, *results = await asyncio.gather(
                    asyncio.to_thread(answer_all, sock), *tasks, return_exceptions=True
                )
            assert str(results[0]).startswith("/dev/0: denied")
            assert str(results[-1]).startswith(f"/dev/{count - 1}: denied")
            assert {type(result) for result in results[1:-1]} == {asyncio.CancelledError}
            assert firsts == [f"/dev/{one}" for one in (*range(len(firsts) - 1), count - 1)]
            assert 2 < len(firsts) < count

    with folder() as where, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(where / "s"))
        listener.listen()
        asyncio.run(use(str(where / "s"), listener))


@pytest.mark.parametrize("answer", [b"", b"x\0", ONE], ids=["the end", "no json", "no descriptor"])
def test_every_call_that_fails_has_an_exception_of_its_own(root, answer):
    async def use(path):
        async with await fdbroker.aio.connect(path) as client:
            calls = [client.open("/dev/x") for _ in range(5)]
            errors = await asyncio.gather(*calls, return_exceptions=True)
            errors += await asyncio.gather(*(client.open("/dev/x") for _ in range(5)), return_exceptions=True)
            assert {type(error) for error in errors} <= {BrokerUnavailable, ProtocolViolation}
            assert len({id(error) for error in errors}) == len({str(error.__traceback__) for error in errors}) == 10

    with answering(answer, unread=False) as path:
        asyncio.run(use(path))


def test_ping_takes_no_longer_than_it_was_told(root):
    """Not even from a server that always sends a byte before the time is over."""
    with folder() as where, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(where / "s"))
        listener.listen()

        def drip():
            listener.accept()[0].close()
            served, _ = listener.accept()
            with served, contextlib.suppress(OSError):
                while True:
                    time.sleep(0.1)
                    served.send(b"\0")

        thread = threading.Thread(target=drip)
        thread.start()
        began_s = time.monotonic()
        with fdbroker.connect(str(where / "s"), timeout_s=0.9999999):  # no whole second in SO_SNDTIMEO
            pass
        with pytest.raises(BrokerUnavailable, match="no answer to PING"):
            ping(str(where / "s"), timeout_s=0.5)
        assert time.monotonic() - began_s < 10
    thread.join()
