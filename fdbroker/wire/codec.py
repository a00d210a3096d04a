"""The messages between our processes as bytes: a format is data, and one writer and one reader know all of them.

Runs in: every process of the broker. A taken-over process controls the bytes. Bytes that are cut, left over, or not a
value of their field are a LinkViolation. All numbers are in network byte order.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from itertools import takewhile
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from fdbroker.limits import opener as limits
from fdbroker.refusals import LinkViolation

_Message = TypeVar("_Message", bound=tuple[Any, ...])


class Cursor:
    """Reads bytes front to back."""

    __slots__ = ("at", "data")

    def __init__(self, data: bytes, at: int = 0) -> None:
        self.data, self.at = data, at

    def take(self, size: int) -> bytes:
        """The next `size` bytes."""
        begin, self.at = self.at, self.at + size
        if self.at > len(self.data):
            raise LinkViolation(f"cut at {len(self.data)} bytes")
        return self.data[begin : self.at]

    def end(self) -> None:
        """Nothing may be left."""
        if self.at != len(self.data):
            raise LinkViolation(f"{len(self.data) - self.at} bytes too many")


class Field(Protocol):
    """How one value travels. `write` raises ValueError or struct.error for a value that does not fit."""

    def write(self, value: Any) -> bytes:
        """The bytes of a value."""

    def read(self, cursor: Cursor) -> Any:
        """The next value. Raises LinkViolation."""


class Number(NamedTuple):
    """An unsigned integer, by its struct format, and at most `most`."""

    form: struct.Struct
    most: int

    def write(self, value: int) -> bytes:
        if value > self.most:
            raise ValueError(f"{value}, at most {self.most}")
        return self.form.pack(value)

    def read(self, cursor: Cursor) -> int:
        value: int = self.form.unpack(cursor.take(self.form.size))[0]
        if value > self.most:
            raise LinkViolation(f"a number of value {value}, at most {self.most}")
        return value


def number(bits: int, most: int | None = None) -> Number:
    """An unsigned integer of 8, 16, 32 or 64 bits."""
    form = struct.Struct({8: "!B", 16: "!H", 32: "!I", 64: "!Q"}[bits])
    return Number(form, (1 << bits) - 1 if most is None else most)


U8, U16, U32, U64 = (number(bits) for bits in (8, 16, 32, 64))


class Mapped(NamedTuple):
    """What travels as another value: `there` makes that, and `back` raises LinkViolation or makes the value again."""

    field: Field
    there: Callable[[Any], Any]
    back: Callable[[Any], Any]

    def write(self, value: Any) -> bytes:
        return self.field.write(self.there(value))

    def read(self, cursor: Cursor) -> Any:
        return self.back(self.field.read(cursor))


FLAG = Mapped(number(8, 1), int, bool)


def word(*words: str) -> Mapped:
    """One of these words, as its position."""
    return Mapped(number(8, len(words) - 1), words.index, words.__getitem__)


class Text(NamedTuple):
    """A text of at most `most` bytes. With `cut` a longer one loses its end, be it in the middle of a character."""

    most: int
    cut: bool = False

    def write(self, value: str) -> bytes:
        data = value.encode(errors="replace")[: self.most] if self.cut else value.encode()
        if len(data) > self.most:
            raise ValueError("a text that is too long")
        return U16.write(len(data)) + data

    def read(self, cursor: Cursor) -> str:
        size = U16.read(cursor)
        if size > self.most:
            raise LinkViolation(f"a text of {size} bytes, at most {self.most}")
        try:
            return cursor.take(size).decode(errors="replace" if self.cut else "strict")
        except UnicodeDecodeError:
            raise LinkViolation("text that is not UTF-8") from None


class Maybe(NamedTuple):
    """A value, or None."""

    field: Field

    def write(self, value: Any) -> bytes:
        return b"\0" if value is None else b"\1" + self.field.write(value)

    def read(self, cursor: Cursor) -> Any:
        return self.field.read(cursor) if FLAG.field.read(cursor) else None


class Some(NamedTuple):
    """At least `least` and at most `most` values; `make` builds what they are read as: a tuple, a list."""

    field: Field
    most: int
    least: int = 0
    make: Callable[[Iterable[Any]], Any] = tuple

    def write(self, value: Any) -> bytes:
        if not self.least <= len(value) <= self.most:
            raise ValueError(f"{len(value)} values, at least {self.least}, at most {self.most}")
        return U16.write(len(value)) + b"".join(map(self.field.write, value))

    def read(self, cursor: Cursor) -> Any:
        count = U16.read(cursor)
        if not self.least <= count <= self.most:
            raise LinkViolation(f"{count} values, at least {self.least}, at most {self.most}")
        return self.make(self.field.read(cursor) for _ in range(count))


class Record:
    """A tuple of several fields; `make` makes it of their values, and may raise LinkViolation.

    The numbers that it begins with are written and read at once.
    """

    def __init__(self, make: Callable[..., Any], *fields: Any) -> None:
        self._make = make
        self.fields: tuple[Field, ...] = fields
        forms = [one.form.format[1:] for one in takewhile((U8, U16, U32, U64).__contains__, fields)]
        self._numbers, self._others = struct.Struct("!" + "".join(forms)), self.fields[len(forms) :]

    def write(self, value: tuple[Any, ...]) -> bytes:
        at = len(value) - len(self._others)
        others = [field.write(one) for field, one in zip(self._others, value[at:], strict=True)]
        return self._numbers.pack(*value[:at]) + b"".join(others)

    def read(self, cursor: Cursor) -> Any:
        numbers = self._numbers.unpack(cursor.take(self._numbers.size))
        return self._make(*numbers, *[field.read(cursor) for field in self._others])


class Choice:
    """One of several classes: a byte says which, then comes what its field says."""

    def __init__(self, fields: Mapping[type, Field]) -> None:
        self._kinds = {kind: position for position, kind in enumerate(fields)}
        self.fields = tuple(fields.values())
        self._which = number(8, len(fields) - 1)

    def write(self, value: Any) -> bytes:
        position = self._kinds[type(value)]
        return self._which.write(position) + self.fields[position].write(value)

    def read(self, cursor: Cursor) -> Any:
        return self.fields[self._which.read(cursor)].read(cursor)


class Bytes:
    """Bytes that somebody else reads."""

    def write(self, value: bytes) -> bytes:
        return U32.write(len(value)) + value

    def read(self, cursor: Cursor) -> bytes:
        return cursor.take(U32.read(cursor))


class Kept:
    """The last field of a message, of values that can be hashed: the latest of them, and their bytes, are remembered.

    Most programs ask again for what they, or others, have asked for. Values of more than KEPT_BYTES are not kept.
    """

    def __init__(self, field: Field) -> None:
        self.field = field
        self._bytes: dict[Any, bytes] = {}
        self._values: dict[bytes, Any] = {}

    def write(self, value: Any) -> bytes:
        data = self._bytes.get(value)
        return self._keep(value, self.field.write(value)) if data is None else data

    def read(self, cursor: Cursor) -> Any:
        data = cursor.take(len(cursor.data) - cursor.at)  # all that is left
        value = self._values.get(data)
        if value is None:
            inner = Cursor(data)
            value = self.field.read(inner)
            inner.end()
            self._keep(value, data)
        return value

    def _keep(self, value: Any, data: bytes) -> bytes:
        if len(data) <= limits.KEPT_BYTES:
            if len(self._values) >= limits.KEPT_VALUES:
                self._bytes.clear()
                self._values.clear()
            self._bytes[value] = data
            self._values[data] = value
        return data


class Table(Generic[_Message]):
    """The messages of one direction: the number with which each begins, its class, its fields in order."""

    def __init__(self, *rows: tuple[int, type[Any], tuple[Field, ...]]) -> None:
        self._numbers = {kind: U8.write(position) for position, kind, _ in rows}
        self.formats = {kind: Record(kind, *fields) for _, kind, fields in rows}
        self.kinds: Mapping[int, type[Any]] = {position: kind for position, kind, _ in rows}

    def encode(self, message: _Message) -> bytes:
        """The bytes of a message of this direction."""
        return self._numbers[type(message)] + self.formats[type(message)].write(message)

    def decode(self, data: bytes) -> _Message:
        """The message that these bytes are. Raises LinkViolation."""
        if not data:
            raise LinkViolation("an empty message")
        kind = self.kinds.get(data[0])
        if kind is None:
            raise LinkViolation(f"unknown message type {data[0]}")
        cursor = Cursor(data, 1)
        try:
            message: _Message = self.formats[kind].read(cursor)
            cursor.end()
        except LinkViolation as violation:
            raise LinkViolation(f"{kind.__name__}: {violation}") from None
        return message
