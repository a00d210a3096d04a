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

    __slots__ = ("_attached", "_fed", "_reader")

    def __init__(self) -> None:
        self._reader: VarlinkReader | FrameReader | None = None
        self._fed = 0
        self._attached: deque[tuple[int, Attached]] = deque()  # which byte they came with, counted from the first

    @property
    def framed(self) -> bool:
        """Whether the client speaks the inbox framing; false before the first byte."""
        return isinstance(self._reader, FrameReader)

    @property
    def partial(self) -> int:
        """Whether the beginning of a message waits for its end: 1, or 2 when descriptors have come with it; else 0."""
        return (2 if self._attached else 1) if self.held else 0

    @property
    def held(self) -> int:
        """How many bytes wait."""
        return 0 if self._reader is None else self._reader.held

    def feed(self, data: bytes, attached: Attached | None = None) -> None:
        """Add what arrived, at least one byte; `attached` came with the last of them."""
        if self._reader is None:
            # a frame's length is at most 64 KiB, so its first byte is 0
            self._reader = VarlinkReader() if data[:1] == _BRACE else FrameReader()
        self._reader.feed(data)
        self._fed += len(data)
        if attached is not None:
            self._attached.append((self._fed, attached))

    def next_message(self) -> tuple[bytes, Attached | None] | None:
        """The next whole message and what came with it, or None until more arrives.

        Raises TooLong, ProtocolViolation when descriptors came with several parts of it.
        """
        message = None if self._reader is None else self._reader.next_message()
        if self._reader is None or message is None:
            return None
        attached = None
        while self._attached and self._attached[0][0] <= self._fed - self._reader.held:
            if attached is not None:
                raise ProtocolViolation("descriptors with several parts of one message")
            attached = self._attached.popleft()[1]
        return message, attached
