"""What all bridges share: a bounded queue in front of the broker, a word on what was lost, and an orderly end.

Runs in: a bridge. An attacker controls how much comes in and what is in it, never to which topic it goes.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine
from typing import Any

from fdbroker.client.aio import Client
from fdbroker.client.calls import CallFailed
from fdbroker.errors import BrokerUnavailable, RateLimited, Refused
from fdbroker.limits import bridges as limits
from fdbroker.limits.inbox import MESSAGE_BYTES
from fdbroker.wire.journal import escaped

_RETRY_S = 0.01  # at least this long before a message that was refused for its rate is tried again


def say(text: str) -> None:
    """One line for the admin, on standard error, which is the journal's under systemd."""
    sys.stderr.write(f"fdbroker: {escaped(text)}\n")
    sys.stderr.flush()


class Losses:
    """Counts what was dropped, by reason, and says so: the first at once, then one line for each some seconds.

    What is still to be said when nothing more is dropped is said by `run`.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, tell: Callable[[str], None] = say) -> None:
        self._clock = clock
        self._tell = tell
        self._counts: Counter[str] = Counter()
        self._next_s = clock()

    def add(self, why: str, count: int = 1) -> None:
        """So many messages were dropped, and why: words of ours, never of a sender's."""
        self._counts[why] += count
        if self._clock() >= self._next_s:
            self.say_all()

    def say_all(self) -> None:
        """Say what has been counted."""
        self._next_s = self._clock() + limits.BRIDGE_LOSSES_SECONDS
        for reason, lost in self._counts.items():
            self._tell(f"{lost} {'message was' if lost == 1 else 'messages were'} dropped: {reason}")
        self._counts.clear()

    async def run(self) -> None:
        """Say what is left, from time to time, without end."""
        while True:
            await asyncio.sleep(limits.BRIDGE_LOSSES_SECONDS)
            self.say_all()


class Outbox:
    """Messages that wait to be sent, the oldest first. Beyond the maximum the oldest is dropped, and counted."""

    def __init__(self, address: str | None, losses: Losses) -> None:
        self._address = address
        self._losses = losses
        self._waiting: deque[tuple[str, str, int]] = deque()
        self._bytes = 0
        self._filled = asyncio.Event()

    def add(self, topic: str, payload: str) -> None:
        """Send this when its turn comes; one that is longer than any message may be is dropped."""
        size = len(payload.encode())
        if size > MESSAGE_BYTES:
            self._losses.add(f"longer than {MESSAGE_BYTES} bytes")
            return
        self._waiting.append((topic, payload, size))
        self._bytes += size
        while len(self._waiting) > limits.BRIDGE_MESSAGES or self._bytes > limits.BRIDGE_BYTES:
            self._next()
            self._losses.add("the broker takes them slower than they come")
        self._filled.set()

    async def run(self) -> None:
        """Send what waits, without end. Raises BrokerUnavailable when nobody answers."""
        client = await Client.connect(self._address)
        try:
            while True:
                if not self._waiting:
                    self._filled.clear()
                    await self._filled.wait()
                topic, payload = self._next()
                try:
                    await self._send(client, topic, payload)
                except BrokerUnavailable:  # it may have been restarted since the last message
                    client.close()
                    client = await Client.connect(self._address)
                    await self._send(client, topic, payload)
        finally:
            client.close()

    def _next(self) -> tuple[str, str]:
        topic, payload, size = self._waiting.popleft()
        self._bytes -= size
        return topic, payload

    async def _send(self, client: Client, topic: str, payload: str) -> None:
        while True:
            try:
                await client.send(topic, payload)
                return
            except RateLimited as limited:
                await asyncio.sleep(max(_RETRY_S, limited.retry_after_ms / 1000))
            except (Refused, CallFailed) as refusal:  # another policy may come: the bridge goes on
                self._losses.add(str(refusal))
                return


async def until_one_ends(*parts: Coroutine[Any, Any, None]) -> None:
    """Run these together until the first ends or fails; the others are cancelled, and its exception is raised."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
