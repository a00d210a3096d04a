"""Stage decode: bytes to one request. The first byte of a connection tells the protocol.

Runs in: inbox. An attacker controls every byte, and where descriptors are sent along.
"""

from __future__ import annotations

from collections import deque

from fdbroker.errors import ProtocolViolation
from fdbroker.inbox.attached import Attached
from fdbroker.wire.frame import FrameReader
from fdbroker.wire.varlink import VarlinkReader

_BRACE = b"{"


class Decoder:
    """The bytes of one connection, and the descriptors. After ProtocolViolation it must not be used again."""

    __slots__ = ("_attached", "_fed", "_reader", "framed", "held")

    def __init__(self) -> None:
        self._reader: VarlinkReader | FrameReader = VarlinkReader()
        self._fed = 0
        self._attached: deque[tuple[int, Attached]] = deque()  # which byte they came with, counted from the first
        self.framed = False  # whether the client speaks the inbox framing; false before the first byte
        self.held = 0  # how many bytes wait

    @property
    def has_attached(self) -> bool:
        """Whether descriptors wait for their message to be whole, or to be taken."""
        return bool(self._attached)

    def feed(self, data: bytes, attached: Attached | None = None) -> None:
        """Add what arrived, at least one byte; `attached` came with the last of them."""
        if not self._fed and data[:1] != _BRACE:  # a frame's length is at most 64 KiB, so its first byte is 0
            self._reader, self.framed = FrameReader(), True
        self._reader.feed(data)
        self._fed += len(data)
        self.held += len(data)
        if attached is not None:
            self._attached.append((self._fed, attached))

    def next_message(self) -> tuple[bytes, Attached | None] | None:
        """The next whole message and what came with it, or None until more arrives.

        Raises TooLong, ProtocolViolation when descriptors came with several parts of it.
        """
        message = self._reader.next_message()
        if message is None:
            return None
        self.held = self._reader.held
        attached = None
        while self._attached and self._attached[0][0] <= self._fed - self.held:
            if attached is not None:
                raise ProtocolViolation("descriptors with several parts of one message")
            attached = self._attached.popleft()[1]
        return message, attached
