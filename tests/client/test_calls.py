"""The clients' pure core: what a broker may answer, and what it must not."""

from __future__ import annotations

import os

import pytest

from fdbroker.client import calls
from fdbroker.client.replies import Replies
from fdbroker.client.sync import outgoing
from fdbroker.errors import (
    ClientNotReading,
    Denied,
    NoSuchResource,
    NotWhatItWas,
    OpenFailed,
    ProtocolViolation,
    QuotaExceeded,
    RateLimited,
)
from fdbroker.limits import every as limits
from fdbroker.wire import varlink


def _grant(index, path):
    return {
        "fileDescriptor": index,
        "resource": {"device": path, "access": "ro"},
        "access": "ro",
        "rule": "f:1",
        "rdev": "1:3",
    }


ASKED = calls.asked(["/dev/a", "/dev/b"], "ro")


def _reply(*grants):
    return varlink.Reply({"grants": list(grants)}, "", False)


def _open(count):
    return [os.open("/dev/null", os.O_RDONLY) for _ in range(count)]


def test_grants_become_owned_descriptors_in_the_order_asked_for():
    numbers = _open(2)
    first, second = calls.opened(_reply(_grant(1, "/dev/a"), _grant(0, "/dev/b")), list(numbers), ASKED)
    assert (first.fileno(), second.fileno()) == (numbers[1], numbers[0])
    assert (first.resource, first.access, first.rule, first.rdev) == ("/dev/a", "ro", "f:1", "1:3")
    with first, second:
        assert not first.closed
    assert first.closed


@pytest.mark.parametrize(
    ("reply", "count"),
    [
        (_reply(), 0),
        (_reply(_grant(0, "/dev/a")), 1),
        (_reply(_grant(0, "/dev/a"), _grant(0, "/dev/b")), 2),
        (_reply(_grant(0, "/dev/a"), _grant(2, "/dev/b")), 2),
        (_reply(_grant(0, "/dev/a"), _grant(-1, "/dev/b")), 2),
        (_reply(_grant(0, "/dev/a"), _grant("1", "/dev/b")), 2),
        (_reply(_grant(0, "/dev/b"), _grant(1, "/dev/a")), 2),
        (_reply(_grant(0, "/dev/a"), _grant(1, "/dev/c")), 2),
        (_reply(_grant(0, "/dev/a"), {}), 2),
        (_reply(_grant(0, "/dev/a"), None), 2),
        (_reply(_grant(0, "/dev/a"), _grant(1, "/dev/b")), 1),
        (_reply(_grant(0, "/dev/a"), {**_grant(1, "/dev/b"), "usable": "yes"}), 2),
        (varlink.Reply({}, "", False), 0),
        (varlink.Reply({"grants": 5}, "", False), 0),
    ],
    ids=range(14),
)
def test_an_answer_that_does_not_fit_the_question_is_refused_and_everything_closed(reply, count):
    with pytest.raises(ProtocolViolation):
        calls.opened(reply, _open(count), ASKED)


@pytest.mark.parametrize(
    ("name", "parameters", "kind", "text"),
    [
        (
            "Denied",
            {"resource": {"device": "/dev/x"}},
            Denied,
            "/dev/x: denied: no rule of the policy allows it, or a deny rule forbids it",
        ),
        (
            "NoSuchResource",
            {"resource": {"device": "/dev/x"}},
            NoSuchResource,
            "/dev/x: the policy allows it, and it is not there now",
        ),
        (
            "NotWhatItWas",
            {"resource": {"device": "/dev/x"}, "reason": "it is a FIFO"},
            NotWhatItWas,
            "/dev/x: not what the policy names: it is a FIFO",
        ),
        (
            "OpenFailed",
            {"resource": {"device": "/dev/x"}, "errno": 16},
            OpenFailed,
            "/dev/x: it could not be opened: EBUSY",
        ),
        ("QuotaExceeded", {"limit": "burst", "maximum": 5}, QuotaExceeded, "limit burst is reached, maximum 5"),
        (
            "RateLimited",
            {"retryAfterMilliseconds": 7},
            RateLimited,
            "not now: too many requests, or the broker has no room, try again in 7 ms",
        ),
        ("ClientNotReading", {}, ClientNotReading, "too many grants wait unread; the connection is closed"),
    ],
)
def test_every_error_has_its_exception_and_its_text(name, parameters, kind, text):
    error = calls.refusal(f"io.fdbroker.Broker.{name}", parameters)
    assert type(error) is kind
    assert str(error) == text


def test_unknown_errors_and_odd_parameters_are_survived():
    assert (
        str(calls.refusal("org.varlink.service.MethodNotFound", {"method": "x"}))
        == "org.varlink.service.MethodNotFound {'method': 'x'}"
    )
    for name in ("Denied", "NotWhatItWas", "OpenFailed", "QuotaExceeded", "RateLimited", "ClientNotReading"):
        str(calls.refusal(f"io.fdbroker.Broker.{name}", {"resource": 5, "errno": "x", "maximum": None}))


@pytest.mark.parametrize(
    ("paths", "access"),
    [
        ([], "ro"),
        (["/dev/x"] * 65, "ro"),
        (["/dev/x"], "r"),
        (["/dev/" + "x" * 65536], "ro"),
        (["net"], "ro"),
        ("/dev/x", "ro"),
    ],
)
def test_what_cannot_be_asked_is_a_value_error(paths, access):
    with pytest.raises(ValueError):
        calls.open_call(calls.asked(paths, access))


def test_descriptors_wait_in_order_for_the_replies_that_own_them():
    replies = Replies()
    numbers = _open(3)
    first, second = varlink.encode_reply({"grants": [1]}), varlink.encode_reply({"grants": [1, 2]})
    replies.feed(first + second[:5], numbers[:1])
    assert calls.count_descriptors(replies.next_reply()) == 1
    assert replies.take(1) == numbers[:1]
    assert replies.next_reply() is None
    replies.feed(second[5:], numbers[1:])
    assert calls.count_descriptors(replies.next_reply()) == 2
    with pytest.raises(ProtocolViolation):
        replies.take(3)
    assert replies.take(2) == numbers[1:]
    assert replies.spent
    calls.close_all(numbers)
    replies.feed(b"", _open(2))
    assert not replies.spent
    replies.close()


def test_a_forgotten_descriptor_is_closed_and_said():
    from fdbroker.client.descriptor import Descriptor

    descriptor = Descriptor(os.open("/dev/null", os.O_RDONLY), "/dev/null", "ro", "f:1", "1:3")
    number = descriptor.fileno()
    with pytest.warns(ResourceWarning, match="never closed"):
        del descriptor
    with pytest.raises(OSError):
        os.fstat(number)


def test_a_detached_descriptor_is_the_callers():
    from fdbroker.client.descriptor import Descriptor

    descriptor = Descriptor(os.open("/dev/null", os.O_RDONLY), "/dev/null", "ro", "f:1", "1:3")
    number = descriptor.detach()
    descriptor.close()
    os.close(number)
    with pytest.raises(ValueError, match="closed or detached"):
        descriptor.fileno()
    assert "closed" in repr(descriptor)


def test_the_address_is_the_given_one_else_the_environments_else_the_default():
    assert calls.address("/a", {"FDBROKER_SOCKET": "/b"}) == "/a"
    assert calls.address(None, {"FDBROKER_SOCKET": "/b"}) == "/b"
    assert calls.address(None, {}) == "/run/fdbroker/socket"


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: calls.receive_call(-1, ()), "maximum is -1"),
        (lambda: calls.receive_call(1, [1 << 63]), "acknowledge is 9223372036854775808"),
        (lambda: calls.receive_call(1, range(limits.ACKNOWLEDGED + 1)), "at most 1000 in one call"),
        (lambda: calls.subscribe_call(["x"], 1 << 63), "after is 9223372036854775808"),
        (lambda: calls.subscribe_call(["x"], -1), "after is -1"),
        (lambda: outgoing("x", "", "", ()).__enter__(), "to is empty"),
        (lambda: outgoing("x", "", None, [0] * 17).__enter__(), "17 descriptors: at most 16"),
        (lambda: outgoing("x", "y" * 70_000, None, [0] * 16).__enter__(), "17 descriptors, with the memfd"),
    ],
    ids=range(8),
)
def test_what_no_broker_takes_is_not_sent(make, why):
    with pytest.raises(ValueError, match=why):
        make()


def test_what_a_broker_just_takes_is_sent():
    assert calls.receive_call(0, range(limits.ACKNOWLEDGED))
    assert calls.subscribe_call(["x"], (1 << 63) - 1)
    with outgoing("x", "y" * 70_000, 5, [0] * 15) as (_, numbers):
        assert len(numbers) == 16
