"""The links' messages: each goes both ways, and nothing else is understood."""

from __future__ import annotations

import pytest

from fdbroker.errors import (
    ClientNotReading,
    Denied,
    LinkViolation,
    NoSuchResource,
    NotWhatItWas,
    OpenFailed,
    QuotaExceeded,
    RateLimited,
)
from fdbroker.terms import Device, Offer, Topic, TopicUse
from fdbroker.wire import link, rights
from fdbroker.wire.rights import Rights, Sender

BIG = 2**64 - 1
TOPICS = (Topic("inbox", ("journal", "subscribers"), 65536), Topic("x" * 64, ("subscribers",), 1))
OFFERS = [Offer(Device(f"/dev/{index}", "rw"), f"/etc/policy.yaml:{index}") for index in range(20)]


@pytest.mark.parametrize(
    ("table", "data", "message"),
    [
        (
            link.INBOX_TO_OPENER,
            link.INBOX_TO_OPENER.encode(link.Open(BIG, (Device("/dev/ä", "rw"),))),
            link.Open(BIG, (Device("/dev/ä", "rw"),)),
        ),
        (link.INBOX_TO_OPENER, link.INBOX_TO_OPENER.encode(link.List(1, watch=True)), link.List(1, True)),
        (link.INBOX_TO_OPENER, link.INBOX_TO_OPENER.encode(link.Closed(1, 2)), link.Closed(1, 2)),
        (link.INBOX_TO_OPENER, link.DRAINED, link.Drained()),
        (link.INBOX_TO_OPENER, link.INBOX_TO_OPENER.encode(link.Shutdown(BIG)), link.Shutdown(BIG)),
        (link.OPENER_TO_LAUNCHER, link.STOP_ASKED, link.StopAsked()),
        (link.INBOX_TO_OPENER, link.PONG, link.Pong()),
        (
            link.OPENER_TO_INBOX,
            link.OPENER_TO_INBOX.encode(
                rights.Connected(
                    7, Sender(2**32 - 2, 5, 6, "c1", 7), Rights(frozenset({0, 255}), frozenset({7}), 1, 2, 3)
                )
            ),
            rights.Connected(7, Sender(2**32 - 2, 5, 6, "c1", 7), Rights(frozenset({0, 255}), frozenset({7}), 1, 2, 3)),
        ),
        (
            link.OPENER_TO_INBOX,
            link.OPENER_TO_INBOX.encode(rights.RightsChanged(BIG, Rights(frozenset({9})))),
            rights.RightsChanged(BIG, Rights(frozenset({9}))),
        ),
        (link.OPENER_TO_INBOX, link.OPENER_TO_INBOX.encode(rights.Topics(tuple(TOPICS))), rights.Topics(TOPICS)),
        (
            link.OPENER_TO_INBOX,
            link.OPENER_TO_INBOX.encode(link.Offered(7, True, OFFERS[:2])),
            link.Offered(7, True, OFFERS[:2]),
        ),
        (link.OPENER_TO_INBOX, link.DRAIN, link.Drain()),
        (link.OPENER_TO_INBOX, link.PING, link.Ping()),
        (link.LAUNCHER_TO_OPENER, link.LAUNCHER_TO_OPENER.encode(link.Policy(3)), link.Policy(3)),
        (link.LAUNCHER_TO_OPENER, link.STOP, link.Stop()),
        (link.LAUNCHER_TO_OPENER, link.PING, link.Ping()),
        (link.OPENER_TO_LAUNCHER, link.OPENER_TO_LAUNCHER.encode(link.Applied(3)), link.Applied(3)),
        (link.OPENER_TO_LAUNCHER, link.READY, link.Ready()),
        (link.OPENER_TO_LAUNCHER, link.PONG, link.Pong()),
    ],
)
def test_each_message_goes_both_ways_and_one_byte_more_or_less_is_a_violation(table, data, message):
    assert table.decode(data) == message
    for wrong in (data[:-1], data + b"\0", data[:1]):
        if wrong != data:
            with pytest.raises(LinkViolation):
                table.decode(wrong)


@pytest.mark.parametrize(
    "refusal",
    [
        Denied("no rule allows it", index=3),
        NoSuchResource("it is not there now", index=0),
        NotWhatItWas("it is a FIFO", index=63),
        OpenFailed(16, index=None),
        QuotaExceeded("burst", 1_000_000),
        RateLimited(10_000),
        RateLimited(10_000, "journal"),
        ClientNotReading(),
    ],
    ids=lambda refusal: refusal.wire_name,
)
def test_every_refusal_goes_both_ways(refusal):
    got = link.OPENER_TO_INBOX.decode(link.OPENER_TO_INBOX.encode(link.Outcome(9, refusal))).refusal
    assert type(got) is type(refusal)
    assert (str(got), got.index, got.offends) == (str(refusal), refusal.index, refusal.offends)


def test_a_grant_is_an_outcome_without_refusal():
    assert link.OPENER_TO_INBOX.decode(link.OPENER_TO_INBOX.encode(link.Outcome(9, None))) == link.Outcome(9, None)


def test_a_listing_of_any_length_comes_whole():
    for count in (0, 1, 8, 9, 20):
        parts = [link.OPENER_TO_INBOX.decode(part) for part in link.split_offers(5, OFFERS[:count])]
        assert [part.last for part in parts] == [False] * (len(parts) - 1) + [True]
        assert [offer for part in parts for offer in part.offers] == OFFERS[:count]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        b"\xff",
        link.INBOX_TO_OPENER.encode(link.Open(1, (Device("/dev/x", "ro"),)))[:9] + b"\0",
        link.INBOX_TO_OPENER.encode(link.Open(1, (Device("/dev/x", "ro"),)))[:9] + b"\x41" + b"\0" * 200,
        link.INBOX_TO_OPENER.encode(link.Open(1, (Device("/dev/x", "ro"),)))[:10] + b"\x03\0\x01x",
        link.INBOX_TO_OPENER.encode(link.Open(1, (Device("/dev/x", "ro"),)))[:10] + b"\0\xff\xffx",
        link.INBOX_TO_OPENER.encode(link.Open(1, (Device("/dev/x", "ro"),)))[:10] + b"\0\0\x02\xff\xfe",
        link.INBOX_TO_OPENER.encode(link.List(1, watch=True))[:-1] + b"\x02",
        link.INBOX_TO_OPENER.encode(link.Closed(1, 0))[:-1] + bytes([len(link.CLOSED_REASONS)]),
    ],
)
def test_what_a_taken_over_inbox_may_send_is_a_violation(data):
    with pytest.raises(LinkViolation):
        link.INBOX_TO_OPENER.decode(data)


@pytest.mark.parametrize(
    "data", [link.PONG, link.STOP_ASKED, link.OPENER_TO_LAUNCHER.encode(link.Applied(2)), link.PING]
)
def test_the_inbox_cannot_speak_to_the_launcher_for_the_opener(data):
    assert link.INBOX_TO_LAUNCHER.decode(link.READY) == link.Ready()
    with pytest.raises(LinkViolation):
        link.INBOX_TO_LAUNCHER.decode(data)


def test_a_message_of_the_other_direction_is_not_understood():
    with pytest.raises(LinkViolation):
        link.INBOX_TO_OPENER.decode(link.STOP)
    with pytest.raises(LinkViolation):
        link.LAUNCHER_TO_OPENER.decode(link.INBOX_TO_OPENER.encode(link.List(1, watch=False)))


def test_a_denied_topic_is_told_as_far_as_a_record_needs_it():
    for topic in ("nö\n", "x" * 255, ""):
        data = link.INBOX_TO_OPENER.encode(rights.DeniedUse(3, TopicUse("subscribe", topic)))
        assert link.INBOX_TO_OPENER.decode(data) == rights.DeniedUse(3, TopicUse("subscribe", topic))
    data = link.INBOX_TO_OPENER.encode(rights.DeniedUse(3, TopicUse("send", "x" * 65536)))
    assert link.INBOX_TO_OPENER.decode(data).use.topic == "x" * 255
    for wrong in (data + b"x", data[:9], data[:9] + b"\x02"):
        with pytest.raises(LinkViolation):
            link.INBOX_TO_OPENER.decode(wrong)
