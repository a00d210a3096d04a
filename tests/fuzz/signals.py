"""Whatever values a signal carries, it becomes one JSON text that says who sent it and has each of them.

The values are made of the input here, not by the library: of what no bus would deliver its reader makes a crash.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from dbus_fast import MessageType

from fdbroker.bridges.dbus import _received

WORDS = (
    b"\2\x7f\xf0\0\0\0\0\0\0",
    b"\2\x7f\xf8\0\0\0\0\0\0",
    b"\1\x80\0\0\0\0\0\0\0",
    b"\3\2\xc3\xa4",
    b"\7\7\7",
    b"\6\1",
)
_DEPTH = 32  # of containers in D-Bus, and as many of variants. Source: D-Bus Specification, "Valid Signatures"


def seeds() -> Iterator[bytes]:
    yield b""
    yield b"\0\1" + b"\1" + (7).to_bytes(8, "big") + b"\2" + struct.pack("!d", math.nan)
    yield b"\3\2hi\4\3\xff\0x" + b"\5\2\0\1\0\0" + b"\6\1\2\5\0\1\12\7\0\1" + b"\6\0\1\7\4\1\xff"
    yield b"\7" * 20 + b"\3\6\n\x00\x1b[m\x7f"


class Values:
    """Reads an input as D-Bus values, and as what each of them is to be in JSON."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def bytes(self, count: int) -> bytes:
        taken, self.data = self.data[:count], self.data[count:]
        return taken

    def number(self, count: int = 1) -> int:
        return int.from_bytes(self.bytes(count), "big")

    def next(self, depth: int = 0) -> tuple[Any, Any]:
        match self.number() % (8 if depth < _DEPTH else 5):
            case 0:
                value = bool(self.number() & 1)
            case 1:
                value = int.from_bytes(self.bytes(8), "big", signed=True)
            case 2:
                (value,) = struct.unpack("!d", self.bytes(8).ljust(8, b"\0"))
                return value, value if math.isfinite(value) else None
            case 3:
                value = self.bytes(self.number()).decode(errors="replace")
            case 4:
                value = self.bytes(self.number())
                return value, list(value)
            case 5:
                items = [self.next(depth + 1) for _ in range(self.number() % 8)]
                return [one for one, _ in items], [becomes for _, becomes in items]
            case 6:
                kind, count = self.number() % 3, self.number() % 8
                pairs = [(self.key(kind), self.next(depth + 1)) for _ in range(count)]
                return {key: one for (key, _), (one, _) in pairs}, {name: becomes for (_, name), (_, becomes) in pairs}
            case _:
                value, becomes = self.next(depth + 1)
                return SimpleNamespace(value=value), becomes  # a variant, as the bridge sees it
        return value, value

    def key(self, kind: int) -> tuple[Any, str]:
        """A key of a dictionary, which are all of one basic type, and its name in JSON."""
        number = self.number()
        return (
            (f"k{number}\n", f"k{number}\n"),
            (-number, f"{-number}"),
            (number > 9, "true" if number > 9 else "false"),
        )[kind]


class Outbox:
    def __init__(self) -> None:
        self.added: list[tuple[str, str]] = []

    def add(self, topic: str, text: str) -> None:
        self.added.append((topic, text))


def target(data: bytes) -> None:
    values, body, wanted = Values(data), [], []
    destination = ":1.6" if values.number() == 1 else None
    while values.data and len(body) < 8:
        value, becomes = values.next()
        body.append(value)
        wanted.append(becomes)
    outbox = Outbox()
    head = {"sender": ":1.5", "path": "/org/x", "interface": "org.x", "member": "Changed", "signature": "v"}
    _received(
        SimpleNamespace(**head, message_type=MessageType.SIGNAL, destination=destination, body=body), "news", outbox
    )
    if destination:  # sent to us by our name: no match rule was asked
        assert outbox.added == []
        return
    ((topic, text),) = outbox.added
    assert topic == "news"
    assert "\n" not in text
    assert json.loads(text) == {**head, "body": wanted}
