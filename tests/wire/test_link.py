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
            link.encode_open(BIG, [Device("/dev/ä", "rw")]),
            link.Open(BIG, [Device("/dev/ä", "rw")]),
        ),
        (link.INBOX_TO_OPENER, link.encode_list(1, watch=True), link.List(1, True)),
        (link.INBOX_TO_OPENER, link.encode_closed(1, 2), link.Closed(1, 2)),
        (link.INBOX_TO_OPENER, link.DRAINED, link.Drained()),
        (link.INBOX_TO_OPENER, link.encode_shutdown(BIG), link.Shutdown(BIG)),
        (link.OPENER_TO_LAUNCHER, link.STOP_ASKED, link.StopAsked()),
        (link.INBOX_TO_OPENER, link.PONG, link.Pong()),
        (
            link.OPENER_TO_INBOX,
            rights.encode_connected(
                7, Sender(2**32 - 2, 5, 6, "c1"), Rights(frozenset({0, 255}), frozenset({7}), 1, 2, 3)
            ),
            rights.Connected(7, Sender(2**32 - 2, 5, 6, "c1"), Rights(frozenset({0, 255}), frozenset({7}), 1, 2, 3)),
        ),
        (
            link.OPENER_TO_INBOX,
            rights.encode_changed(BIG, Rights(frozenset({9}))),
            rights.RightsChanged(BIG, Rights(frozenset({9}))),
        ),
        (link.OPENER_TO_INBOX, rights.encode_topics(TOPICS), rights.Topics(TOPICS)),
        (link.OPENER_TO_INBOX, link.encode_offered(7, OFFERS[:2], last=True), link.Offered(7, True, OFFERS[:2])),
        (link.OPENER_TO_INBOX, link.DRAIN, link.Drain()),
        (link.OPENER_TO_INBOX, link.PING, link.Ping()),
        (link.LAUNCHER_TO_OPENER, link.encode_policy(3), link.Policy(3)),
        (link.LAUNCHER_TO_OPENER, link.STOP, link.Stop()),
        (link.LAUNCHER_TO_OPENER, link.PING, link.Ping()),
        (link.OPENER_TO_LAUNCHER, link.encode_applied(3), link.Applied(3)),
        (link.OPENER_TO_LAUNCHER, link.READY, link.Ready()),
        (link.OPENER_TO_LAUNCHER, link.PONG, link.Pong()),
    ],
)
def test_each_message_goes_both_ways_and_one_byte_more_or_less_is_a_violation(table, data, message):
    assert link.decode(table, data) == message
    for wrong in (data[:-1], data + b"\0", data[:1]):
        if wrong != data:
            with pytest.raises(LinkViolation):
                link.decode(table, wrong)


@pytest.mark.parametrize(
    "refusal",
    [
        Denied("no rule allows it", index=3),
        NoSuchResource("it is not there now", index=0),
        NotWhatItWas("it is a FIFO", index=63),
        OpenFailed(16, index=None),
        QuotaExceeded("burst", 1_000_000),
        RateLimited(10_000),
        ClientNotReading(),
    ],
    ids=lambda refusal: refusal.wire_name,
)
def test_every_refusal_goes_both_ways(refusal):
    got = link.decode(link.OPENER_TO_INBOX, link.encode_outcome(9, refusal)).refusal
    assert type(got) is type(refusal)
    assert (str(got), got.index) == (str(refusal), refusal.index)


def test_a_grant_is_an_outcome_without_refusal():
    assert link.decode(link.OPENER_TO_INBOX, link.encode_outcome(9, None)) == link.Outcome(9, None)


def test_a_listing_of_any_length_comes_whole():
    for count in (0, 1, 8, 9, 20):
        parts = [link.decode(link.OPENER_TO_INBOX, part) for part in link.split_offers(5, OFFERS[:count])]
        assert [part.last for part in parts] == [False] * (len(parts) - 1) + [True]
        assert [offer for part in parts for offer in part.offers] == OFFERS[:count]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        b"\xff",
        link.encode_open(1, [Device("/dev/x", "ro")])[:9] + b"\0",
        link.encode_open(1, [Device("/dev/x", "ro")])[:9] + b"\x41" + b"\0" * 200,
        link.encode_open(1, [Device("/dev/x", "ro")])[:10] + b"\x03\0\x01x",
        link.encode_open(1, [Device("/dev/x", "ro")])[:10] + b"\0\xff\xffx",
        link.encode_open(1, [Device("/dev/x", "ro")])[:10] + b"\0\0\x02\xff\xfe",
        link.encode_list(1, watch=True)[:-1] + b"\x02",
        link.encode_closed(1, 0)[:-1] + bytes([len(link.CLOSED_REASONS)]),
    ],
)
def test_what_a_taken_over_inbox_may_send_is_a_violation(data):
    with pytest.raises(LinkViolation):
        link.decode(link.INBOX_TO_OPENER, data)


@pytest.mark.parametrize("data", [link.PONG, link.STOP_ASKED, link.encode_applied(2), link.PING])
def test_the_inbox_cannot_speak_to_the_launcher_for_the_opener(data):
    assert link.decode(link.INBOX_TO_LAUNCHER, link.READY) == link.Ready()
    with pytest.raises(LinkViolation):
        link.decode(link.INBOX_TO_LAUNCHER, data)


def test_a_message_of_the_other_direction_is_not_understood():
    with pytest.raises(LinkViolation):
        link.decode(link.INBOX_TO_OPENER, link.STOP)
    with pytest.raises(LinkViolation):
        link.decode(link.LAUNCHER_TO_OPENER, link.encode_list(1, watch=False))


def test_a_denied_topic_is_told_as_far_as_a_record_needs_it():
    for topic in ("nö\n", "x" * 255, ""):
        data = rights.encode_denied_use(3, TopicUse("subscribe", topic))
        assert link.decode(link.INBOX_TO_OPENER, data) == rights.DeniedUse(3, TopicUse("subscribe", topic))
    data = rights.encode_denied_use(3, TopicUse("send", "x" * 65536))
    assert link.decode(link.INBOX_TO_OPENER, data).use.topic == "x" * 255
    for wrong in (data + b"x", data[:9], data[:9] + b"\x02"):
        with pytest.raises(LinkViolation):
            link.decode(link.INBOX_TO_OPENER, wrong)
