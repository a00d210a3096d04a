"""The inbox framing, whole, byte by byte, and at its limits."""

from __future__ import annotations

import pytest

from fdbroker.limits import every as limits
from fdbroker.wire.frame import FrameReader, TooLong, encode_frame, encode_status


def test_frames_come_out_as_they_went_in_however_they_are_cut():
    payloads = [b"PING", b"", b"x" * 1000, b"\0" * 5]
    data = b"".join(map(encode_frame, payloads))
    for step in (1, 2, 3, 7, len(data)):
        reader, got = FrameReader(), []
        for at in range(0, len(data), step):
            reader.feed(data[at : at + step])
            while (payload := reader.next_message()) is not None:
                got.append(payload)
        assert got == payloads
        assert not reader.held


def test_the_limit_is_judged_by_the_length_alone():
    reader = FrameReader()
    reader.feed((limits.MESSAGE_BYTES + 1).to_bytes(4, "big"))
    with pytest.raises(TooLong):
        reader.next_message()
    reader = FrameReader()
    reader.feed(encode_frame(b"x" * limits.MESSAGE_BYTES))
    assert reader.next_message() == b"x" * limits.MESSAGE_BYTES
    with pytest.raises(ValueError, match="at most 65536"):
        encode_frame(b"x" * (limits.MESSAGE_BYTES + 1))


def test_partial_means_that_something_waits_for_its_end():
    reader = FrameReader()
    assert not reader.held
    reader.feed(b"\0")
    assert reader.held


def test_a_status_is_four_bytes():
    assert encode_status(13) == b"\0\0\0\x0d"
