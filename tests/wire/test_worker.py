"""The messages between opener and namespaces worker."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdbroker.errors import Denied, LinkViolation, OpenFailed
from fdbroker.terms import Namespace, Socket, Uplink
from fdbroker.wire import link, worker
from fdbroker.wire.worker import KNOWN, RANGES, UNKNOWN, UNUSABLE, Ask, Lost, Made

BIG = 2**64 - 1
ASKS = [
    Ask(1, 0, Namespace("net", "vpn-ä"), 0),
    Ask(BIG, 2**32 - 1, Namespace("time", pid=4194304), 2**32 - 1),
    Ask(2, 5, Namespace("mnt"), 5, tuple(range(KNOWN)), KNOWN),
    Ask(2, 5, Namespace("net"), 6, (7,), 1, Uplink("b" * 15, "fd00:88::/64", isolated=True), ((5, 5), (6, 2**32 - 2))),
    Ask(2, 5, Namespace("net"), 5, (), 1, Uplink("br0", "10.0.0.0/8", isolated=False)),
    Ask(3, 5, Socket("x" * 255, "inet6", "dgram", 65535), 5),
    Ask(3, 5, Socket("x", "inet", "stream"), 5),
]


@pytest.mark.parametrize("ask", ASKS)
def test_a_question_survives(ask):
    data = worker.TO_WORKER.encode(ask)
    assert worker.TO_WORKER.decode(data) == ask
    for wrong in (data[:-1], data + b"\0", data[:1], b""):
        with pytest.raises(LinkViolation):
            worker.TO_WORKER.decode(wrong)


@pytest.mark.parametrize(
    "answer",
    [
        Made(1, 2**32 - 1, 0, ()),
        Made(BIG, 0, UNKNOWN, (True,) * KNOWN),
        Made(1, 5, len(UNUSABLE) - 1, (True, False, True)),
    ],
)
def test_an_answer_survives(answer):
    data = worker.FROM_WORKER.encode(answer)
    assert worker.FROM_WORKER.decode(data) == answer
    for wrong in (data[:-1], data + b"\0", b""):
        with pytest.raises(LinkViolation):
            worker.FROM_WORKER.decode(wrong)


def test_a_refusal_says_why_to_the_opener_and_not_to_the_inbox():
    denied = Denied("it is process 1")
    told = worker.FROM_WORKER.decode(worker.FROM_WORKER.encode(worker.Failed(5, denied)))
    assert (told.request, type(told.refusal), str(told.refusal)) == (5, Denied, "it is process 1")
    told = link.OPENER_TO_INBOX.decode(link.OPENER_TO_INBOX.encode(link.Outcome(5, denied)))
    assert (told.connection, type(told.refusal), str(told.refusal)) == (5, Denied, "no rule allows it")
    assert worker.FROM_WORKER.decode(worker.FROM_WORKER.encode(worker.Failed(5, OpenFailed(110)))).refusal.number == 110


def test_lost_has_no_more_to_say():
    assert worker.FROM_WORKER.decode(worker.LOST) == Lost()
    with pytest.raises(LinkViolation):
        worker.FROM_WORKER.decode(worker.LOST + b"\0")


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (0, b"\x02"),  # the type
        (13, b"\x02"),  # which kind
        (14, b"\x08"),  # the namespace type
        (15, b"\x00\x00"),  # the name's length
        (17, b"\xff"),  # not UTF-8
        (20, b"\x00\x00\x00\x01"),  # a pid beside a name
        (20, b"\xff\xff\xff\xff"),
        (28, bytes([0, KNOWN + 1])),  # how many are known
        (30, bytes([KNOWN + 1])),  # the maximum
        (31, b"\x02"),  # whether there is an uplink
        (32, (RANGES + 1).to_bytes(2, "big")),  # how many ranges of uids
    ],
)
def test_a_question_with_a_wrong_value_is_a_violation(offset, value):
    data = bytearray(worker.TO_WORKER.encode(Ask(1, 0, Namespace("net", "vpn"), 0)))
    data[offset : offset + len(value)] = value
    with pytest.raises(LinkViolation):
        worker.TO_WORKER.decode(bytes(data))


@pytest.mark.parametrize("what", [Namespace("net", "x" * 65536), Socket("x" * 65536, "inet", "stream")])
def test_what_does_not_fit_is_not_sent(what):
    with pytest.raises(ValueError):
        worker.TO_WORKER.encode(Ask(1, 0, what, 0))


@given(st.binary(max_size=700))
def test_whatever_comes_is_a_message_or_a_violation(data):
    for decode in (worker.TO_WORKER.decode, worker.FROM_WORKER.decode):
        with contextlib.suppress(LinkViolation):
            decode(data)


@given(st.data(), st.sampled_from(ASKS))
def test_a_question_that_was_changed_anywhere_is_a_question_or_a_violation(data, ask):
    message = bytearray(worker.TO_WORKER.encode(ask))
    for _ in range(data.draw(st.integers(1, 4))):
        message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    try:
        changed = worker.TO_WORKER.decode(bytes(message))
    except LinkViolation:
        return
    assert worker.TO_WORKER.decode(worker.TO_WORKER.encode(changed)) == changed
