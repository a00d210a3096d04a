"""Stage decode: bytes to one request. The first byte of a connection tells the protocol.

Runs in: inbox. An attacker controls every byte.
"""

from __future__ import annotations

from fdbroker.wire.frame import FrameReader
from fdbroker.wire.varlink import VarlinkReader

_BRACE = b"{"


class Decoder:
    """The bytes of one connection. After ProtocolViolation it must not be used again."""

    __slots__ = ("_reader",)

    def __init__(self) -> None:
        self._reader: VarlinkReader | FrameReader | None = None

    @property
    def framed(self) -> bool:
        """Whether the client speaks the inbox framing; false before the first byte."""
        return isinstance(self._reader, FrameReader)

    @property
    def partial(self) -> bool:
        """Whether the beginning of a message waits for its end."""
        return self._reader is not None and self._reader.partial

    def feed(self, data: bytes) -> None:
        """Add what arrived, at least one byte."""
        if self._reader is None:
            # a frame's length is at most 64 KiB, so its first byte is 0
            self._reader = VarlinkReader() if data[:1] == _BRACE else FrameReader()
        self._reader.feed(data)

    def next_message(self) -> bytes | None:
        """The next whole message, or None until more arrives. Raises TooLong."""
        return None if self._reader is None else self._reader.next_message()
