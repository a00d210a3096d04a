"""What waits for the broker is bounded, and what is lost is counted and said."""

from __future__ import annotations

import asyncio

import pytest

from fdbroker.bridges import outbox as module
from fdbroker.bridges.outbox import Losses, Outbox, until_one_ends
from fdbroker.client import calls
from fdbroker.errors import BrokerUnavailable, MessageTooLong, RateLimited, TopicDenied
from fdbroker.limits import bridges as limits
from fdbroker.limits.inbox import MESSAGE_BYTES


class Broker:
    """A client in the library's place: what it was given, and what it answers, in turn."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.sent = []
        self.connections = 0

    async def connect(self, address):
        assert address == "there"
        self.connections += 1
        return self

    async def send(self, topic, payload):
        answer = self.answers.pop(0) if self.answers else None
        if answer is not None:
            raise answer
        self.sent.append((topic, payload))

    def close(self):
        pass


def ran(monkeypatch, broker, *messages):
    """What an outbox says while it sends these."""
    said = []
    monkeypatch.setattr(module, "Client", broker)

    async def run():
        box = Outbox("there", Losses(clock=lambda: 0.0, tell=said.append))
        for message in messages:
            box.add("news", message)
        task = asyncio.create_task(box.run())
        while box._waiting or len(broker.sent) + len(said) < len(messages):
            if task.done():
                break
            await asyncio.sleep(0.001)
        box.add("news", "the last")
        while not task.done() and broker.sent[-1:] != [("news", "the last")]:  # noqa: ASYNC110 -- no event to wait for
            await asyncio.sleep(0.001)
        task.cancel()
        await task

    with pytest.raises((asyncio.CancelledError, BrokerUnavailable)):
        asyncio.run(run())
    return said


def test_messages_are_sent_in_order(monkeypatch):
    broker = Broker()
    assert ran(monkeypatch, broker, "1", "2") == []
    assert [payload for _, payload in broker.sent] == ["1", "2", "the last"]


def test_one_that_is_limited_is_sent_later_and_none_overtakes_it(monkeypatch):
    broker = Broker(RateLimited(0), RateLimited(20))
    assert ran(monkeypatch, broker, "1", "2") == []
    assert [payload for _, payload in broker.sent] == ["1", "2", "the last"]


@pytest.mark.parametrize(
    ("refusal", "text"),
    [
        (TopicDenied("news"), "topic news: denied: no rule of the policy allows it"),
        (MessageTooLong(10), "the message is longer than the topic allows: at most 10 bytes"),
        (calls.CallFailed("io.example.New", {}), "io.example.New {}"),
    ],
)
def test_one_that_is_refused_is_dropped_and_the_next_one_is_sent(monkeypatch, refusal, text):
    broker = Broker(refusal)
    assert ran(monkeypatch, broker, "1", "2") == [f"1 message was dropped: {text}"]
    assert [payload for _, payload in broker.sent] == ["2", "the last"]


@pytest.mark.parametrize("payload", ["x" * (MESSAGE_BYTES + 1), "é" * 33000])
def test_one_that_is_too_long_is_dropped(monkeypatch, payload):
    broker = Broker()
    assert ran(monkeypatch, broker, payload) == ["1 message was dropped: longer than 65536 bytes"]
    assert [payload for _, payload in broker.sent] == ["the last"]


def test_a_broker_that_was_restarted_gets_it_on_a_new_connection(monkeypatch):
    broker = Broker(BrokerUnavailable("gone"))
    ran(monkeypatch, broker, "1")
    assert broker.connections == 2
    assert [payload for _, payload in broker.sent] == ["1", "the last"]


def test_a_broker_that_stays_away_ends_the_bridge(monkeypatch):
    broker = Broker(BrokerUnavailable("gone"), BrokerUnavailable("still"))
    ran(monkeypatch, broker, "1")
    assert broker.sent == []


@pytest.mark.parametrize(
    ("payload", "kept"),
    [("x", limits.BRIDGE_MESSAGES), ("x" * 65536, limits.BRIDGE_BYTES // 65536)],
)
def test_the_queue_is_bounded_and_drops_the_oldest(payload, kept):
    said = []

    async def fill():
        now = [0.0]
        box = Outbox(None, Losses(clock=lambda: now[0], tell=said.append))
        for number in range(kept + 3):
            if number == kept + 2:
                now[0] += limits.BRIDGE_LOSSES_SECONDS
            box.add("news", f"{number:x<8}"[: len(payload)] + payload[8:])
        return box

    box = asyncio.run(fill())
    assert len(box._waiting) == kept
    assert box._bytes == sum(size for _, _, size in box._waiting) <= limits.BRIDGE_BYTES
    assert box._waiting[0][1].startswith("3")
    assert said == [
        "1 message was dropped: the broker takes them slower than they come",
        "2 messages were dropped: the broker takes them slower than they come",
    ]


def test_losses_are_said_at_once_and_then_summed_up():
    now, said = [100.0], []
    losses = Losses(clock=lambda: now[0], tell=said.append)
    losses.add("a")
    assert said == ["1 message was dropped: a"]
    losses.add("a", 4)
    losses.add("b")
    now[0] += limits.BRIDGE_LOSSES_SECONDS - 0.1
    losses.add("a")
    assert len(said) == 1
    now[0] += 0.1
    losses.add("a")
    assert said[1:] == ["6 messages were dropped: a", "1 message was dropped: b"]


def test_what_is_left_is_said_although_nothing_more_is_lost(monkeypatch):
    monkeypatch.setattr(limits, "BRIDGE_LOSSES_SECONDS", 0.01)
    said = []
    losses = Losses(tell=said.append)
    losses.add("a")
    losses.add("a", 999)

    async def a_while():
        await asyncio.sleep(0.2)

    asyncio.run(until_one_ends(losses.run(), a_while()))
    assert said == ["1 message was dropped: a", "999 messages were dropped: a"]


def test_what_is_said_is_one_line_whatever_is_in_it(capsys):
    module.say("a\nb\x1b[31m")
    assert capsys.readouterr().err == "fdbroker: a\\nb\\x1b[31m\n"


def test_the_first_that_fails_ends_all():
    ended = []

    async def for_ever():
        try:
            await asyncio.sleep(1000)
        finally:
            ended.append(True)

    async def fails():
        await asyncio.sleep(0)
        raise BrokerUnavailable("x")

    with pytest.raises(BrokerUnavailable):
        asyncio.run(until_one_ends(for_ever(), fails(), for_ever()))
    assert ended == [True, True]
