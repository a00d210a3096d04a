"""The inbox framing: what FrameReader reads is what the format says, however it is cut, and every payload has a meaning."""

from __future__ import annotations

import base64
from collections.abc import Iterator

from fuzz.fuzzing import cuts

from fdbroker.inbox import dispatch
from fdbroker.limits import every as limits
from fdbroker.wire import frame

WORDS = (b"PING", b"\0\0\0\4PING", b"\0\0\0\0", b"\0\1\0\0", b"\0\1\0\1", b"\xff\xff\xff\xff")


def seeds() -> Iterator[bytes]:
    ping, shutdown = frame.encode_frame(frame.PING), frame.encode_frame(frame.SHUTDOWN)
    yield ping
    yield ping + shutdown + frame.encode_frame("größe".encode()) + ping[:6]
    yield frame.encode_frame(b"\xff\0 no text") + (limits.MESSAGE_BYTES + 1).to_bytes(4, "big")
    yield frame.encode_frame(b"x" * 300) + limits.MESSAGE_BYTES.to_bytes(4, "big") + b"x"


def meant(data: bytes) -> tuple[list[bytes], bytes, bool]:
    """By the document alone: the payloads, what is left over, and whether a frame is too long."""
    payloads = []
    while len(data) >= 4:
        length = int.from_bytes(data[:4], "big")
        if length > limits.MESSAGE_BYTES:
            return payloads, data, True
        if len(data) < 4 + length:
            break
        payloads.append(data[4 : 4 + length])
        data = data[4 + length :]
    return payloads, data, False


def read(pieces: list[bytes]) -> tuple[list[bytes], int, bool]:
    reader, payloads = frame.FrameReader(), []
    try:
        for piece in pieces:
            reader.feed(piece)
            while (payload := reader.next_message()) is not None:
                payloads.append(payload)
            assert reader.held < 4 + limits.MESSAGE_BYTES
    except frame.TooLong:
        return payloads, 0, True
    return payloads, reader.held, False


def target(data: bytes) -> None:
    payloads, left, too_long = meant(data)
    for pieces in cuts(data):
        assert read(pieces) == (payloads, 0 if too_long else len(left), too_long)
    assert b"".join(map(frame.encode_frame, payloads)) + left == data
    for payload in payloads:
        action = dispatch.dispatch_frame(payload)
        match action:
            case dispatch.Answer(answer):
                assert payload == b"PING"
                assert answer == frame.encode_frame(b"PONG")
            case dispatch.AskShutdown():
                assert payload == b""
            case dispatch.Publish(topic, said, text, encoding):
                assert (topic, said) == (dispatch.FRAMED_TOPIC, payload)
                assert (base64.b64decode(text) if encoding == "base64" else text.encode()) == payload
                assert action == dispatch.Publish(topic, said, text, encoding)  # and nothing else was asked for
            case other:
                raise AssertionError(other)
