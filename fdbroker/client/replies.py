"""What comes back on a connection: replies with the descriptors that each owns, and how a subscription goes on. No I/O.

Runs in: any program. What it reads comes from the broker.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable

from fdbroker.client import closing
from fdbroker.client.calls import Message, refusal
from fdbroker.errors import BrokerUnavailable, FdbrokerError, PolicyBroken, ProtocolViolation, QuotaExceeded
from fdbroker.wire import varlink

# A listing is at most OFFERS names of 4 KiB; everything else is far smaller.
REPLY_BYTES = 32 * 1024 * 1024
# How long a subscriber waits before it tries again to reach a broker that is gone: at first, and at most.
_RETRY_S, _RETRY_MAX_S = 0.05, 5.0
# The limits that a client meets when it connects: the broker says so, whatever the client wrote, and hangs up.
_AT_ACCEPT = ("connections", "descriptors")


class Continued:
    """Where a subscription goes on when it is made again, because the broker was gone."""

    def __init__(self, after: int | None) -> None:
        self.after = after
        self._began_us = time.time_ns() // 1000
        self._earlier = False  # what is stored may be older than the subscription
        self._again = False
        self._wait_s = _RETRY_S

    def goes_on(self, error: FdbrokerError) -> bool:
        """Whether to subscribe again after `error`; not when the broker was never reached but with a broken policy."""
        return self._again or not isinstance(error, PolicyBroken)

    def lost(self) -> float:
        """The connection is gone: how many seconds to wait before the next try."""
        self._again = True
        if self.after is None:
            self.after, self._earlier = 0, True
        wait_s, self._wait_s = self._wait_s, min(self._wait_s * 2, _RETRY_MAX_S)
        return wait_s

    def is_new(self, message: Message) -> bool:
        """Whether the caller wants it and has not had it; it has from now on."""
        self._wait_s = _RETRY_S
        if self._earlier and message.time_us < self._began_us:
            return False
        self.after, self._earlier = max(self.after or 0, message.number), False
        return True


class Replies:
    """Bytes and descriptors in, replies out, each with the descriptors that it owns.

    Bytes that were sent before a message with descriptors can arrive together with it, so received descriptors wait
    in a FIFO and each reply takes as many as it says. After ProtocolViolation it must be closed.
    """

    def __init__(self) -> None:
        self._reader = varlink.VarlinkReader(REPLY_BYTES)
        self._descriptors: deque[int] = deque()
        self._replied = False
        self._turned_away: varlink.Reply | None = None

    def feed(self, data: bytes, descriptors: Iterable[int]) -> None:
        """Add what arrived; takes the descriptors."""
        self._descriptors.extend(descriptors)
        self._reader.feed(data)

    def next_reply(self) -> varlink.Reply | None:
        """The next whole reply, or None until more arrives. Raises ProtocolViolation."""
        message = self._reader.next_message()
        if message is None:
            return None
        reply = varlink.decode_reply(message)
        if not self._replied and reply.error:
            error = refusal(reply.error, reply.parameters)
            if isinstance(error, PolicyBroken) or (isinstance(error, QuotaExceeded) and error.limit in _AT_ACCEPT):
                self._turned_away = reply
        self._replied = True
        return reply

    def ended(self, why: str) -> FdbrokerError:
        """A new exception for a connection that has ended: BrokerUnavailable, or why the client was turned away."""
        if self._turned_away is not None:
            return refusal(self._turned_away.error, self._turned_away.parameters)
        return BrokerUnavailable(why)

    def take(self, count: int) -> list[int]:
        """The next `count` descriptors, now the caller's. Raises ProtocolViolation when fewer came."""
        if len(self._descriptors) < count:
            raise ProtocolViolation(f"a reply with {count} descriptors, and {len(self._descriptors)} came")
        return [self._descriptors.popleft() for _ in range(count)]

    @property
    def spent(self) -> bool:
        """Whether nothing waits: what is left once every call has its answer belongs to none."""
        return not self._descriptors and not self._reader.held

    def close(self) -> None:
        """Close the descriptors that no reply has taken, which may be a message's."""
        closing.close_later(self._descriptors)
        self._descriptors.clear()
