"""Reading the fixed-format messages between our processes: every length is checked, and nothing may be left over.

Runs in: every process of the broker. A taken-over process controls the bytes.
"""

from __future__ import annotations

import struct
from typing import Any

from fdbroker.errors import LinkViolation


def exact(form: struct.Struct, data: bytes) -> tuple[Any, ...]:
    """A message of one size. Raises LinkViolation."""
    try:
        return form.unpack(data)
    except struct.error:
        raise LinkViolation(f"message type {data[0]} of {len(data)} bytes, must be {form.size}") from None


def flag(value: int) -> bool:
    """A byte that is 0 or 1. Raises LinkViolation."""
    if value > 1:
        raise LinkViolation(f"a flag of value {value}")
    return bool(value)


def word(words: tuple[str, ...], value: int) -> str:
    """The word of that index. Raises LinkViolation."""
    if value >= len(words):
        raise LinkViolation(f"a word of value {value}, of {', '.join(words)}")
    return words[value]


class Cursor:
    """Reads a variable message front to back. Every method raises LinkViolation when the bytes do not fit."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def fields(self, form: struct.Struct) -> tuple[Any, ...]:
        """The next values, by a format."""
        if len(self._data) - self._at < form.size:
            raise LinkViolation(f"message type {self._data[0]} cut at {len(self._data)} bytes")
        values = form.unpack_from(self._data, self._at)
        self._at += form.size
        return values

    def kind(self) -> int:
        """The next byte, which is still to be read: it says by which format."""
        if self._at >= len(self._data):
            raise LinkViolation(f"message type {self._data[0]} cut at {len(self._data)} bytes")
        return self._data[self._at]

    def text(self, length: int) -> str:
        """The next `length` bytes, which are UTF-8."""
        end = self._at + length
        if end > len(self._data):
            raise LinkViolation(f"message type {self._data[0]} cut at {len(self._data)} bytes")
        try:
            value = self._data[self._at : end].decode()
        except UnicodeDecodeError:
            raise LinkViolation("text that is not UTF-8") from None
        self._at = end
        return value

    def rest(self) -> str:
        """All that is left, as text."""
        return self.text(len(self._data) - self._at)

    def end(self) -> None:
        """Nothing may be left."""
        if self._at != len(self._data):
            raise LinkViolation(f"message type {self._data[0]}: {len(self._data) - self._at} bytes too many")
