"""Messages between programs of different users, by both protocols, the library and the command line."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from harness import ALICE, BOB, CAROL, GROUP, Raw, as_user, outcome, running
from messaging import SUBSCRIBE, Subscriber

import fdbroker
import fdbroker.aio
from fdbroker.errors import BrokerUnavailable, MessageTooLong, TopicDenied

POLICY = f"""
version: 1
topics:
  inbox: {{deliver: [journal, subscribers]}}
  news: {{maximum_bytes: 1000}}
  secret: {{}}
everyone: {{send: [inbox, news], subscribe: [news]}}
users: {{0: {{send: ["*"], subscribe: ["*"]}}}}
groups: {{{GROUP}: {{send: ["*"], subscribe: ["*"], limits: {{subscriptions: 2}}}}}}
"""


@pytest.fixture
def broker(dev):
    with running(POLICY) as made:
        yield made
        made.wait_idle()


def frame(address, *payloads):
    """What the framing answers to these, one after the other."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(address)
        sock.sendall(b"".join(struct.pack("!I", len(payload)) + payload for payload in payloads))
        data = b""
        while len(data) < 4 * len(payloads):
            data += sock.recv(100)
    return list(struct.unpack(f"!{len(payloads)}I", data))


def send(address, topic, payload):
    with Raw(address) as client:
        return outcome(client.call("io.fdbroker.Inbox.Send", {"topic": topic, "payload": payload}))


def test_a_message_of_one_user_reaches_another_and_says_who_sent_it(broker):
    with Subscriber(broker.socket, "news") as subscriber:
        assert as_user(ALICE, [], send, broker.socket, "news", "hello ✉") == "granted"
        message = subscriber.message()
        assert (message["topic"], message["uid"], message["gid"], message["payload"]) == (
            "news",
            ALICE,
            ALICE,
            "hello ✉",
        )
        assert abs(message["time"] / 1e6 - time.time()) < 60


def test_the_framing_sends_to_inbox_and_what_is_no_text_travels_in_base64(broker):
    with Subscriber(broker.socket, "inbox") as subscriber:
        assert as_user(ALICE, [], frame, broker.socket, b"hello", b"\xff\0\n", b"x" * 65536) == [0, 0, 0]
        assert [subscriber.message()[key] for key in ("payload",)] == ["hello"]
        second = subscriber.message()
        assert (second["encoding"], base64.b64decode(second["payload"])) == ("base64", b"\xff\0\n")
        assert len(subscriber.message()["payload"]) == 65536
    payloads = [record["FDBROKER_PAYLOAD"] for record in broker.records() if "FDBROKER_PAYLOAD" in record]
    assert payloads[-3:-1] == ["hello", "\\xff\0\n"]
    assert {record["FDBROKER_UID"] for record in broker.records() if record.get("FDBROKER_PAYLOAD") == "hello"} == {
        str(ALICE)
    }


def test_without_a_topic_inbox_the_framing_gets_eacces(dev):
    with running("version: 1\ntopics: {news: {}}\neveryone: {send: ['*']}\n") as broker:
        assert frame(broker.socket, b"hello") == [13]


def test_status_codes_of_the_framing(dev):
    text = "version: 1\ntopics: {inbox: {maximum_bytes: 10}}\neveryone: {send: [inbox]}\nlimits: {burst: 3, requests_per_second: 1}\n"
    with running(text) as broker:
        assert as_user(ALICE, [], frame, broker.socket, b"x" * 10, b"x" * 11, b"x", b"x") == [0, 90, 0, 11]
        assert as_user(BOB, [], frame, broker.socket, b"x") == [0]


def test_so_many_subscriptions_of_a_user_over_all_its_connections(broker):
    def subscribe(address):
        clients = [Raw(address) for _ in range(3)]
        for client in clients[:2]:
            client.send_call(SUBSCRIBE, {"topics": ["news"]}, more=True)
        result = clients[2].call(SUBSCRIBE, {"topics": ["news"]}, more=True)
        for client in clients:
            client.close()
        return [outcome(result), result["parameters"]]

    assert as_user(CAROL, [GROUP], subscribe, broker.socket) == [
        "QuotaExceeded",
        {"limit": "subscriptions", "maximum": 2},
    ]


def test_what_is_no_message_gets_the_standard_error(broker):
    with Raw(broker.socket) as client:
        for method, parameters in (
            ("Send", {"topic": "news"}),
            ("Send", {"payload": "x"}),
            ("Send", {"topic": "news", "payload": 5}),
            ("Send", {"topic": "news", "payload": "%%", "encoding": "base64"}),
            ("Send", {"topic": "news", "payload": "x", "encoding": "utf-8"}),
            ("Send", {"topic": "news", "payload": "x", "uid": 0}),
            ("Subscribe", {"topics": []}),
            ("Subscribe", {"topics": "news"}),
            ("Subscribe", {"topics": [5]}),
            ("Subscribe", {}),
        ):
            assert (
                client.call(f"io.fdbroker.Inbox.{method}", parameters)["error"]
                == "org.varlink.service.InvalidParameter"
            )
        assert client.call(SUBSCRIBE, {"topics": ["news"]})["error"] == "org.varlink.service.ExpectedMore"
        client.send_call("io.fdbroker.Inbox.Send", {"topic": "news", "payload": "x"}, oneway=True)
        assert outcome(client.call("org.varlink.service.GetInfo")) == "granted"  # and no answer before it


def test_a_oneway_message_arrives_without_an_answer(broker):
    with Subscriber(broker.socket, "news") as subscriber, Raw(broker.socket) as client:
        client.send_call("io.fdbroker.Inbox.Send", {"topic": "news", "payload": "quiet"}, oneway=True)
        assert subscriber.message()["payload"] == "quiet"


def test_a_subscription_ends_with_the_connection_and_a_stop_closes_it(broker):
    subscriber = Subscriber(broker.socket, "news")
    subscriber.close()
    assert send(broker.socket, "news", "x") == "granted"
    broker.wait_idle()
    with Subscriber(broker.socket, "news") as subscriber:
        assert broker.stop() == 0
        assert subscriber.reply() is None
    broker.pids = {}
    broker.idle = {}


def test_both_clients_send_and_subscribe(broker):
    with fdbroker.connect(broker.socket) as sender, fdbroker.connect(broker.socket) as subscriber:
        messages = subscriber.subscribe(["news"])
        received = _until_it_comes(sender, messages)
        assert (received.uid, received.topic, received.payload) == (os.getuid(), "news", b"\xff")
        with pytest.raises(TopicDenied, match="topic none: denied"):
            sender.send("none", "x")
        with pytest.raises(MessageTooLong, match="at most 1000 bytes"):
            sender.send("news", "x" * 1001)
        with pytest.raises(MessageTooLong, match="at most 1000 bytes"):
            sender.send("news", "x" * 70000)  # by a memfd

    async def talk():
        async with await fdbroker.aio.connect(broker.socket) as sender:
            async with await fdbroker.aio.connect(broker.socket) as subscriber:
                got = []

                async def listen():
                    async for message in subscriber.subscribe(["news"]):
                        got.append(message.payload)
                        break

                task = asyncio.create_task(listen())
                while not task.done():
                    await sender.send("news", "over asyncio")
                    await asyncio.sleep(0.01)
                assert got == [b"over asyncio"]
                with pytest.raises(TopicDenied):
                    await sender.send("none", b"x")

    asyncio.run(talk())


def _until_it_comes(sender, messages):
    """The first message that arrives; those that were sent before the subscription was in force do not."""
    got = []
    thread = threading.Thread(target=lambda: got.append(next(messages)))
    thread.start()
    while thread.is_alive():
        sender.send("news", b"\xff")
        thread.join(0.01)
    return got[0]


def test_the_command_line_sends_and_subscribes(broker):
    command = (sys.executable, "-I", "-m", "fdbroker")
    environment = {**os.environ, "FDBROKER_SOCKET": broker.socket}
    listening = subprocess.Popen(
        (*command, "subscribe", "--json", "news"), stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        line = ""
        os.set_blocking(listening.stdout.fileno(), False)
        end = time.monotonic() + 20
        while not line and time.monotonic() < end:
            sent = subprocess.run(
                (*command, "send", "news"), input="from a pipe", text=True, env=environment, capture_output=True
            )
            assert sent.returncode == 0, sent.stderr
            line = listening.stdout.readline()
        said = json.loads(line)
        assert (said["topic"], said["payload"], said["uid"]) == ("news", "from a pipe", os.getuid())
    finally:
        listening.kill()
        listening.wait()
        listening.stdout.close()
    denied = subprocess.run((*command, "send", "none", "x"), text=True, env=environment, capture_output=True)
    assert denied.returncode == 77
    assert "topic none: denied" in denied.stderr


def _shown_clients():
    """The two clients of docs/protocol.md, by language."""
    text = (Path(__file__).parents[2] / "docs/protocol.md").read_text()
    found = re.findall(r"```(c|python)\n(.*?)```", text, re.DOTALL)
    return {language: code for language, code in found if "sun_path" in code or "struct.pack" in code}


@pytest.mark.parametrize("language", ["c", "python"])
def test_the_clients_of_the_documentation_work(broker, tmp_path, language):
    """They use nothing of ours, and are as short as the protocol is."""
    code = _shown_clients()[language]
    assert len(code.splitlines()) <= 32
    source = tmp_path / f"client.{language}"
    source.write_text(code)
    command = [sys.executable, "-I", "-W", "error", str(source)]
    if language == "c":
        command = [str(tmp_path / "client")]
        flags = ("-x", "c", "-Wall", "-Wextra", "-Werror", "-O2", "-o", command[0])
        subprocess.run(["cc", *flags, str(source)], check=True)
    with Subscriber(broker.socket, "inbox") as subscriber:
        done = subprocess.run([*command, "hello", broker.socket], capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "delivered\n", "")
        assert subscriber.message()["payload"] == "hello"
    broker.reload(POLICY.replace("inbox: {deliver: [journal, subscribers]}", "other: {}").replace("inbox, ", ""))
    done = subprocess.run([*command, "hello", broker.socket], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (77, "Permission denied\n")


def test_both_clients_ping_and_say_when_nobody_answers(broker, tmp_path):
    async def over_asyncio(address):
        async with await fdbroker.aio.connect(broker.socket) as client:
            client._address = address
            return await client.ping()

    with fdbroker.connect(broker.socket) as client:
        assert 0 < client.ping() < 10
    assert 0 < asyncio.run(over_asyncio(broker.socket)) < 10
    path = str(tmp_path / "other")
    with pytest.raises(BrokerUnavailable, match="there is no socket"):
        asyncio.run(over_asyncio(path))
    for answer in (b"", b"\0\0\0\4NONE"):
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path)
            server.listen()
            thread = threading.Thread(target=lambda: answered(server, answer))  # noqa: B023 -- joined below
            thread.start()
            with pytest.raises(BrokerUnavailable):
                asyncio.run(over_asyncio(path))
            thread.join()
        os.unlink(path)


def answered(server, data):
    connection, _ = server.accept()
    with connection:
        connection.recv(100)
        connection.sendall(data)
