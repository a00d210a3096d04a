"""A connection's bytes and descriptors: each descriptor belongs to the message with whose bytes it came, to no other."""

from __future__ import annotations

from collections.abc import Iterator

from fuzz.frame import meant as frames

from fdbroker.errors import ProtocolViolation
from fdbroker.inbox.decode import Decoder
from fdbroker.wire import frame

WORDS = (b"PING", b"\0\0\0\4PING", b"\0\0\0\0", b"{}\0", b'{"method":"x"}\0', b"\x81\x81")
_WITH = 0x80  # of a piece's first byte: descriptors came with it; the rest is its length


def seeds() -> Iterator[bytes]:
    two, calls = frame.encode_frame(b"PING") + frame.encode_frame(b""), b'{"method":"a.b"}\0{"method":"c.d"}\0{'
    for stream in (two, calls):
        yield b"\0" + stream
        for cut in (b"\1\x82", b"\2\x03\x81", b"\3\x81\x07\x82"):
            yield cut + stream


def parts(data: bytes) -> list[tuple[bytes, bool]]:
    """The input as a count, so many lengths, and a stream: its pieces, and whether descriptors came with each."""
    count = data[0] % 17 if data else 0
    lengths, stream = data[1 : 1 + count], data[1 + count :]
    pieces = []
    for length in lengths:
        size = length & ~_WITH & 0xFF
        if size and stream:
            pieces.append((stream[:size], bool(length & _WITH)))
            stream = stream[size:]
    return [*pieces, (stream, False)] if stream else pieces


def meant(pieces: list[tuple[bytes, bool]]) -> tuple[list[tuple[bytes, int]], bool]:
    """Each message with the number of its descriptors' piece, -1 for none; and whether the connection is broken."""
    stream = b"".join(piece for piece, _ in pieces)
    if stream[:1] == b"{":
        messages, too_long = stream.split(b"\0")[:-1], False
        ends = [len(message) + 1 for message in messages]
    else:
        messages, _, too_long = frames(stream)
        ends = [len(message) + 4 for message in messages]
    came, at = [], 0
    for number, (piece, attached) in enumerate(pieces):
        at += len(piece)
        if attached:
            came.append((at, number))
    wanted, begin = [], 0
    for message, size in zip(messages, ends, strict=True):
        of_it = [number for at, number in came if begin < at <= begin + size]
        if len(of_it) > 1:
            return wanted, True
        wanted.append((message, of_it[0] if of_it else -1))
        begin += size
    return wanted, too_long


def target(data: bytes) -> None:
    pieces = parts(data)
    decoder, got, broken = Decoder(), [], False
    try:
        for number, (piece, attached) in enumerate(pieces):
            decoder.feed(piece, number if attached else None)
            while (received := decoder.next_message()) is not None:
                got.append((received[0], -1 if received[1] is None else received[1]))
    except ProtocolViolation:
        broken = True
    assert (got, broken) == meant(pieces)
    assert decoder.framed == (bool(pieces) and pieces[0][0][:1] != b"{")
