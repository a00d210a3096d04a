"""The messages between opener and namespaces worker."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdbroker.errors import Denied, LinkViolation, OpenFailed
from fdbroker.terms import Namespace, Socket, Uplink
from fdbroker.wire import link, worker
from fdbroker.wire.worker import KNOWN, UNKNOWN, UNUSABLE, Ask, Lost, Made

BIG = 2**64 - 1
ASKS = [
    Ask(1, 0, Namespace("net", "vpn-ä")),
    Ask(BIG, 2**32 - 1, Namespace("time", pid=4194304)),
    Ask(2, 5, Namespace("mnt"), tuple(range(KNOWN)), KNOWN),
    Ask(2, 5, Namespace("net"), (7,), 1, Uplink("b" * 15, "fd00:88::/64", isolated=True)),
    Ask(2, 5, Namespace("net"), (), 1, Uplink("br0", "10.0.0.0/8", isolated=False)),
    Ask(3, 5, Socket("x" * 255, "inet6", "dgram", 65535)),
    Ask(3, 5, Socket("x", "inet", "stream")),
]


@pytest.mark.parametrize("ask", ASKS)
def test_a_question_survives_and_has_one_size(ask):
    data = worker.encode_ask(ask)
    assert worker.decode_ask(data) == ask
    assert len(data) == len(worker.encode_ask(ASKS[0]))
    for wrong in (data[:-1], data + b"\0", data[:1], b""):
        with pytest.raises(LinkViolation):
            worker.decode_ask(wrong)


@pytest.mark.parametrize(
    "answer",
    [
        Made(1, 2**32 - 1, 0, ()),
        Made(BIG, 0, UNKNOWN, (True,) * KNOWN),
        Made(1, 5, len(UNUSABLE) - 1, (True, False, True)),
    ],
)
def test_an_answer_survives_and_has_one_size(answer):
    data = worker.encode_made(answer)
    assert worker.decode_answer(data) == answer
    assert len(data) == len(worker.encode_made(Made(1, 1, 0, ())))
    for wrong in (data[:-1], data + b"\0", b""):
        with pytest.raises(LinkViolation):
            worker.decode_answer(wrong)


def test_a_refusal_says_why_to_the_opener_and_not_to_the_inbox():
    for told, text in ((True, "it is process 1"), (False, "no rule allows it")):
        data = link.encode_outcome(5, Denied("it is process 1"), why=told)
        outcome = worker.decode_answer(data)
        assert (outcome.connection, type(outcome.refusal), str(outcome.refusal)) == (5, Denied, text)
    assert worker.decode_answer(link.encode_outcome(5, OpenFailed(110))).refusal.number == 110


def test_lost_has_no_more_to_say():
    assert worker.decode_answer(worker.LOST) == Lost()
    with pytest.raises(LinkViolation):
        worker.decode_answer(worker.LOST + b"\0")


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (0, b"\x02"),  # the type
        (13, b"\x04"),  # the kind
        (13, b"\x01"),  # a name, where a pid should be
        (13, b"\x02"),  # a name for a new one
        (14, b"\x08"),  # the namespace type
        (15, b"\x00\x00\x00\x01"),  # a pid beside a name
        (15, b"\xff\xff\xff\xff"),
        (23, b"a\0b"),  # something behind the name's end
        (23, b"\xff\0"),  # not UTF-8
        (23, b"\0"),  # no name
        (278, bytes([KNOWN + 1])),  # how many are known
        (279 + 4 * KNOWN, bytes([KNOWN + 1])),  # the maximum
        (280 + 4 * KNOWN, b"\x02"),  # whether there is an uplink
    ],
)
def test_a_question_with_a_wrong_value_is_a_violation(offset, value):
    data = bytearray(worker.encode_ask(Ask(1, 0, Namespace("net", "vpn"))))
    data[offset : offset + len(value)] = value
    with pytest.raises(LinkViolation):
        worker.decode_ask(bytes(data))


@pytest.mark.parametrize("what", [Namespace("net", "x" * 256), Socket("x" * 256, "inet", "stream")])
def test_what_does_not_fit_is_not_sent(what):
    with pytest.raises(ValueError):
        worker.encode_ask(Ask(1, 0, what))


@given(st.binary(max_size=700))
def test_whatever_comes_is_a_message_or_a_violation(data):
    for decode in (worker.decode_ask, worker.decode_answer):
        with contextlib.suppress(LinkViolation):
            decode(data)


@given(st.data(), st.sampled_from(ASKS))
def test_a_question_that_was_changed_anywhere_is_a_question_or_a_violation(data, ask):
    message = bytearray(worker.encode_ask(ask))
    for _ in range(data.draw(st.integers(1, 4))):
        message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    try:
        changed = worker.decode_ask(bytes(message))
    except LinkViolation:
        return
    assert worker.decode_ask(worker.encode_ask(changed)) == changed
