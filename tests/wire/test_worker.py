"""The messages between opener and namespaces worker."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdbroker.errors import Denied, LinkViolation, OpenFailed
from fdbroker.kernel.received import SCM_MAX_FD
from fdbroker.limits import every as limits
from fdbroker.terms import Namespace, Socket, Uplink
from fdbroker.wire import link, worker
from fdbroker.wire.worker import (
    DESCRIPTORS,
    KNOWN,
    RANGES,
    UNKNOWN,
    UNUSABLE,
    WANTED,
    Ask,
    Lost,
    Made,
    Opened,
    Wanted,
)

BIG = 2**64 - 1
ASKS = [
    Ask(1, 0, 0, (Wanted(Namespace("net", "vpn-ä")),)),
    Ask(BIG, 2**32 - 1, 2**32 - 1, (Wanted(Namespace("time", pid=4194304)),) * WANTED),
    Ask(2, 5, 5, (Wanted(Namespace("mnt")),), tuple(range(KNOWN)), KNOWN, ((5, 5), (6, 2**32 - 2))),
    Ask(2, 5, 6, (Wanted(Namespace("net"), Uplink("b" * 15, "fd00:88::/64", isolated=True)),), (7,), 1, ((5, 5),)),
    Ask(2, 5, 5, (Wanted(Namespace("net"), Uplink("br0", "10.0.0.0/8", isolated=False)),), (), 1),
    Ask(3, 5, 5, (Wanted(Socket("x" * 255, "inet6", "dgram", 65535)), Wanted(Namespace("uts", "a")))),
    Ask(3, 5, 5, (Wanted(Socket("x", "inet", "stream")),)),
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
        Made(1, (Opened(2**32 - 1, 0),)),
        Made(BIG, (Opened(0, UNKNOWN),) * WANTED, (2**32 - 1,) * KNOWN),
        Made(1, (Opened(5, len(UNUSABLE) - 1), Opened(0, UNKNOWN)), (5,)),
    ],
)
def test_an_answer_survives(answer):
    data = worker.FROM_WORKER.encode(answer)
    assert worker.FROM_WORKER.decode(data) == answer
    for wrong in (data[:-1], data + b"\0", b""):
        with pytest.raises(LinkViolation):
            worker.FROM_WORKER.decode(wrong)


def test_an_answer_is_one_message_of_the_kernels():
    """Each resource, and of each the pidfd of its process."""
    assert 2 * limits.RESOURCES_PER_OPEN == DESCRIPTORS <= SCM_MAX_FD


def test_a_request_of_the_most_is_one_message():
    """All names as long as a file's can be."""
    uplink = Uplink("b" * 15, "f" * 64, isolated=True)
    wanted = (Wanted(Socket("n" * 255, "inet", "stream", 1), uplink),) * WANTED
    ask = Ask(BIG, 1, 1, wanted, tuple(range(KNOWN)), KNOWN, ((0, 1),) * RANGES)
    assert len(worker.TO_WORKER.encode(ask)) <= limits.LINK_BYTES


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
        (17, b"\x00\x00"),  # how much is wanted
        (17, (WANTED + 1).to_bytes(2, "big")),
        (19, b"\x02"),  # which kind
        (20, b"\x08"),  # the namespace type
        (21, b"\x00\x00"),  # the name's length
        (23, b"\xff"),  # not UTF-8
        (26, b"\x00\x00\x00\x01"),  # a pid beside a name
        (26, b"\xff\xff\xff\xff"),
        (30, b"\x02"),  # whether there is an uplink
        (31, bytes([0, KNOWN + 1])),  # how many are known
        (33, bytes([KNOWN + 1])),  # the maximum
        (34, (RANGES + 1).to_bytes(2, "big")),  # how many ranges of uids
    ],
)
def test_a_question_with_a_wrong_value_is_a_violation(offset, value):
    data = bytearray(worker.TO_WORKER.encode(Ask(1, 0, 0, (Wanted(Namespace("net", "vpn")),))))
    data[offset : offset + len(value)] = value
    with pytest.raises(LinkViolation):
        worker.TO_WORKER.decode(bytes(data))


@pytest.mark.parametrize("what", [Namespace("net", "x" * 65536), Socket("x" * 65536, "inet", "stream")])
def test_what_does_not_fit_is_not_sent(what):
    with pytest.raises(ValueError):
        worker.TO_WORKER.encode(Ask(1, 0, 0, (Wanted(what),)))


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
