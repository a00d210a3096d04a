"""The inbox framing: a 4-byte length in network byte order, then the payload.

Runs in: inbox, client. An attacker controls every byte.
Source: docs/protocol.md, "Inbox framing".
"""

from __future__ import annotations

import struct

from fdbroker.errors import ProtocolViolation
from fdbroker.limits import inbox as limits

_LENGTH = struct.Struct("!I")
_MESSAGE_BYTES = limits.MESSAGE_BYTES

PING = b"PING"
PONG = b"PONG"
SHUTDOWN = b""


class TooLong(ProtocolViolation):
    """A message is announced, or has grown, above MESSAGE_BYTES."""


def encode_frame(payload: bytes) -> bytes:
    """One frame. Raises ValueError when `payload` is longer than MESSAGE_BYTES."""
    if len(payload) > _MESSAGE_BYTES:
        raise ValueError(f"a frame holds at most {_MESSAGE_BYTES} bytes, not {len(payload)}")
    return _LENGTH.pack(len(payload)) + payload


def encode_status(number: int) -> bytes:
    """The answer to all but PING: 0 or an errno."""
    return _LENGTH.pack(number)


class FrameReader:
    """Collects bytes and gives whole payloads. After TooLong it must not be used again."""

    __slots__ = ("_buffer",)

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        """Add what arrived; the caller stops reading while messages wait, so this holds two messages at most."""
        self._buffer += data

    def next_message(self) -> bytes | None:
        """The next whole payload, or None until more arrives. Raises TooLong on the length alone."""
        if len(self._buffer) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._buffer)
        if length > _MESSAGE_BYTES:
            raise TooLong(f"a frame of {length} bytes, at most {_MESSAGE_BYTES}")
        end = _LENGTH.size + length
        if len(self._buffer) < end:
            return None
        payload = bytes(self._buffer[_LENGTH.size : end])
        del self._buffer[:end]
        return payload

    @property
    def held(self) -> int:
        """How many bytes wait: once there is no whole message any more, those of the beginning of one."""
        return len(self._buffer)
