"""T35: a subscriber that does not read, or a flood of messages, keeps others waiting or grows the inbox."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time

from harness import ALICE, BOB, NO_RATES, Raw, as_user, outcome, resident_bytes, running
from messaging import SEND, SUBSCRIBE, Subscriber

from fdbroker.limits import every as limits

POLICY = """
version: 1
topics: {news: {}}
everyone: {send: [news], subscribe: [news]}
"""


def test_a_stalled_subscriber_delays_nobody_and_is_told_what_it_lost(dev):
    text = POLICY + NO_RATES
    with running(text) as broker:
        stalled, reading = (Subscriber(broker.socket, "news") for _ in range(2))
        with stalled, reading, Raw(broker.socket) as client:
            assert stalled.message() or reading.message()  # the second one's first message went to the first one too
            count = 4000
            call = json.dumps(
                {"method": "io.fdbroker.Inbox.Send", "parameters": {"topic": "news", "payload": "x" * 900}}
            )
            for _ in range(count // 100):
                client.sock.sendall((call.encode() + b"\0") * 100)
                for _ in range(100):
                    assert outcome(client.reply()) == "granted"
                for _ in range(100):
                    assert "lost" not in reading.message()
            lost = received = 0
            while lost + received < count:
                message = stalled.message()
                lost += message.get("lost", 0)
                received += 1
            assert lost > 0
            assert received > 100
        broker.wait_idle()


def test_many_that_never_read_do_not_grow_the_inbox_beyond_their_bounds(dev):
    """Each user's subscriptions, and what waits for each of them, are bounded."""
    maximum = limits.USER_LIMITS["subscriptions"].default

    def deaf(address):
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(Raw(address)) for _ in range(maximum + 1)]
            for client in clients:
                client.send_call(SUBSCRIBE, {"topics": ["news"]}, more=True)
            refused = outcome(clients[-1].reply())
            with Raw(address) as sender:
                call = json.dumps({"method": SEND, "parameters": {"topic": "news", "payload": "x" * 60000}}).encode()
                for _ in range(100):  # six megabytes for each of them, if they waited
                    sender.sock.sendall(call + b"\0")
                    assert outcome(sender.reply()) == "granted"
            return [refused, resident_bytes(broker.pids["inbox"])]

    with running(POLICY) as broker:
        before = resident_bytes(broker.pids["inbox"])
        refused, after = as_user(ALICE, [], deaf, broker.socket)
        assert refused == "QuotaExceeded"
        # what waits is the same bytes for all: of one user it is no more than one queue, and what is half sent
        assert after - before < limits.SUBSCRIBER_BYTES + maximum * (2 * limits.UNSENT_BYTES)
        broker.wait_idle()


def test_who_floods_is_told_to_wait_and_another_is_not(dev):
    def flood(address, stop):
        counts, began = {}, time.monotonic()
        with Raw(address) as client:
            call = json.dumps({"method": SEND, "parameters": {"topic": "news", "payload": "x"}}).encode() + b"\0"
            while not os.path.exists(stop):
                client.sock.sendall(call * 200)
                for _ in range(200):
                    word = outcome(client.reply())
                    counts[word] = counts.get(word, 0) + 1
        return counts, time.monotonic() - began

    def some(address):
        with Raw(address) as client:
            return [outcome(client.call(SEND, {"topic": "news", "payload": "y"})) for _ in range(50)]

    with running(POLICY + "limits: {burst: 300, requests_per_second: 100}\n") as broker:
        stop, found = f"{broker.folder}/stop", []
        thread = threading.Thread(target=lambda: found.append(as_user(ALICE, [], flood, broker.socket, stop)))
        thread.start()
        try:
            for _ in range(5):
                assert as_user(BOB, [], some, broker.socket) == ["granted"] * 50
        finally:
            open(stop, "w").close()
            thread.join()
        ((counts, seconds),) = found
        assert sorted(counts) == ["RateLimited", "granted"]
        assert counts["granted"] <= 300 + 100 * (seconds + 1)
