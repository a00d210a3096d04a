"""The part of one connection in messages: its rights to topics, and the queue of a subscriber.

Runs in: inbox. Others control how much comes for it, and its client how fast that is taken.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from fdbroker.inbox.attached import Attached
from fdbroker.inbox.rights import Rights, Sender
from fdbroker.limits import inbox as limits

_MESSAGES, _BYTES = limits.SUBSCRIBER_MESSAGES, limits.SUBSCRIBER_BYTES
# how every message begins: where `lost` is put, when there is something to say
BEGIN = b'{"parameters":{"message":{'

Waiting = tuple[bytes, Attached | None]  # bytes to send, and the descriptors that go with the first of them


class Member:
    """One connection's part in it: who it is, what it may do, and, once it has subscribed, what waits for it.

    `replayed`: it is still to get what is stored above that number; None when it has all of it.
    """

    __slots__ = (
        "holding",
        "lost",
        "maxima",
        "queue",
        "queued_bytes",
        "replayed",
        "send",
        "sender",
        "subscribe",
        "subscribed",
    )

    def __init__(self, sender: Sender) -> None:
        self.sender = sender
        self.send: frozenset[str] = frozenset()
        self.subscribe: frozenset[str] = frozenset()
        self.maxima = Rights()
        self.subscribed: frozenset[str] = frozenset()
        self.replayed: int | None = None
        self.queue: deque[Waiting] = deque()
        self.queued_bytes = 0
        self.holding = 0  # messages in the queue that have descriptors
        self.lost = 0

    @property
    def is_idle(self) -> bool:
        """Whether its queue is empty, nothing was lost, and nothing stored is still to be sent."""
        return not self.queue and not self.lost and self.replayed is None

    def put(self, data: bytes, attached: Attached | None = None) -> None:
        """One message more that waits; the oldest ones go where there are too many."""
        self.queue.append((data, attached))
        self.queued_bytes += len(data)
        self.holding += attached is not None
        while len(self.queue) > _MESSAGES or self.queued_bytes > _BYTES:
            self._lose()

    def _lose(self) -> None:
        data, attached = self.queue.popleft()
        self.queued_bytes -= len(data)
        self.holding -= attached is not None
        self.lost += 1

    def shed(self) -> None:
        """Lose the messages that have descriptors: those would count for their sender for as long as they wait here."""
        if self.holding:
            kept = [one for one in self.queue if one[1] is None]
            self.lost += len(self.queue) - len(kept)
            self.queue = deque(kept)
            self.queued_bytes = sum(len(data) for data, _ in kept)
            self.holding = 0

    def take(self, may_send: Callable[[int], bool]) -> Iterator[Waiting]:
        """All that waits, as much for one send as can be; the first message says how many were lost before it.

        `may_send` says whether so many descriptors may be sent now; without them their message is lost.
        """
        together: list[bytes] = []
        while self.queue:
            attached = self.queue[0][1]
            if attached is not None and not may_send(len(attached.numbers)):
                self._lose()
                continue
            data = self.queue.popleft()[0]
            if self.lost:
                data = b'%s"lost":%d,%s' % (BEGIN, self.lost, data[len(BEGIN) :])
                self.lost = 0
            if attached is None:
                together.append(data)
                continue
            if together:
                yield b"".join(together), None
                together.clear()
            yield data, attached
        self.queued_bytes = self.holding = 0
        if together:
            yield b"".join(together), None
