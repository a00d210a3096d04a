"""The links' messages: each goes both ways, and nothing else is understood."""

from __future__ import annotations

import pytest
from fakes import came

from fdbroker import limits
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
from fdbroker.offers import Offer
from fdbroker.terms import Device, Topic, TopicUse
from fdbroker.wire import keeper, link, lists
from fdbroker.wire.connections import Use

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
        (link.INBOX_TO_OPENER, link.INBOX_TO_OPENER.encode(link.Closed(1, 2)), link.Closed(1, 2)),
        (link.INBOX_TO_OPENER, link.DRAINED, link.Drained()),
        (link.INBOX_TO_OPENER, link.INBOX_TO_OPENER.encode(link.Shutdown(BIG)), link.Shutdown(BIG)),
        (link.OPENER_TO_LAUNCHER, link.STOP_ASKED, link.StopAsked()),
        (link.INBOX_TO_OPENER, link.PONG, link.Pong()),
        (link.OPENER_TO_INBOX, link.OPENER_TO_INBOX.encode(came(7, 2**32 - 2, 6, 5)), came(7, 2**32 - 2, 6, 5)),
        (link.OPENER_TO_INBOX, link.OPENER_TO_INBOX.encode(Use(BIG >> 32, 3)), Use(BIG >> 32, 3)),
        (link.LAUNCHER_TO_INBOX, link.LAUNCHER_TO_INBOX.encode(link.Policy(3)), link.Policy(3)),
        (link.INBOX_TO_LAUNCHER, link.INBOX_TO_LAUNCHER.encode(link.Applied(3)), link.Applied(3)),
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
        parts = [lists.KEEPER_TO_INBOX.decode(part) for part in lists.split_offers(5, OFFERS[:count])]
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
        b"\2" + link.INBOX_TO_OPENER.encode(link.Shutdown(1))[1:] + b"\1",  # List, which is the keeper's now
        link.INBOX_TO_OPENER.encode(link.Closed(1, 0))[:-1] + bytes([len(link.CLOSED_REASONS)]),
    ],
)
def test_what_a_taken_over_inbox_may_send_is_a_violation(data):
    with pytest.raises(LinkViolation):
        link.INBOX_TO_OPENER.decode(data)


@pytest.mark.parametrize(
    "data", [link.PONG, link.STOP_ASKED, link.OPENER_TO_LAUNCHER.encode(link.admin.ReloadAsked(2)), link.PING]
)
def test_the_inbox_cannot_speak_to_the_launcher_for_the_opener(data):
    assert link.INBOX_TO_LAUNCHER.decode(link.READY) == link.Ready()
    with pytest.raises(LinkViolation):
        link.INBOX_TO_LAUNCHER.decode(data)


def test_a_message_of_the_other_direction_is_not_understood():
    with pytest.raises(LinkViolation):
        link.INBOX_TO_OPENER.decode(link.STOP)
    with pytest.raises(LinkViolation):
        link.LAUNCHER_TO_OPENER.decode(link.INBOX_TO_OPENER.encode(link.Closed(1, 0)))


def test_a_denied_topic_is_told_as_far_as_a_record_needs_it():
    for topic in ("nö\n", "x" * 255, ""):
        data = link.INBOX_TO_OPENER.encode(link.DeniedUse(3, TopicUse("subscribe", topic)))
        assert link.INBOX_TO_OPENER.decode(data) == link.DeniedUse(3, TopicUse("subscribe", topic))
    data = link.INBOX_TO_OPENER.encode(link.DeniedUse(3, TopicUse("send", "x" * 65536)))
    assert link.INBOX_TO_OPENER.decode(data).use.topic == "x" * 255
    for wrong in (data + b"x", data[:9], data[:9] + b"\x02"):
        with pytest.raises(LinkViolation):
            link.INBOX_TO_OPENER.decode(wrong)


# ---- the keeper's links

CAME = came(BIG, 2**32 - 2, 1000, 7, True, "a//b (enforce)", (4, 2**32 - 1))
KEEPERS = [
    (keeper.OPENER_TO_KEEPER, CAME),
    (keeper.OPENER_TO_KEEPER, came(1, 0, 0, 1, False, "", ())),
    (keeper.OPENER_TO_KEEPER, Use(3, 20_000)),
    (keeper.OPENER_TO_KEEPER, keeper.Ended(BIG)),
    (keeper.KEEPER_TO_OPENER, keeper.ListRefused(BIG, 10_000)),
    (keeper.LAUNCHER_TO_KEEPER, link.Policy(3)),
    (keeper.LAUNCHER_TO_KEEPER, link.Stop()),
    (keeper.LAUNCHER_TO_KEEPER, link.Ping()),
    (keeper.LAUNCHER_TO_KEEPER, keeper.Given(True, False, (5, 29))),
    (keeper.KEEPER_TO_LAUNCHER, link.Applied(3)),
    (keeper.KEEPER_TO_LAUNCHER, link.Ready()),
    (keeper.KEEPER_TO_LAUNCHER, link.Pong()),
    (lists.INBOX_TO_KEEPER, lists.List(BIG, True)),
    (lists.KEEPER_TO_INBOX, lists.Offered(7, True, OFFERS[:2])),
    (lists.KEEPER_TO_INBOX, lists.Offered(7, False, [])),
    (lists.KEEPER_TO_INBOX, keeper.ListRefused(7, 10_000)),
]


@pytest.mark.parametrize(("table", "message"), KEEPERS, ids=[type(message).__name__ for _, message in KEEPERS])
def test_each_message_of_the_keeper_goes_both_ways_and_cut_or_longer_is_a_violation(table, message):
    data = table.encode(message)
    assert table.decode(data) == message
    for wrong in (*(data[:size] for size in range(len(data))), data + b"\0", data + data):
        with pytest.raises(LinkViolation):
            table.decode(wrong)


def test_every_message_of_the_keeper_is_among_those():
    tables = {id(table): table for table, _ in KEEPERS}.values()
    assert len(tables) == 6
    for table in tables:
        assert {type(message) for one, message in KEEPERS if one is table} == set(table.kinds.values())


def test_what_the_opener_says_of_a_connection_are_the_same_bytes_to_keeper_and_inbox():
    """A session's name is cut."""
    for said in (CAME, Use(3, 2), CAME._replace(session="s" * 32)):
        assert keeper.OPENER_TO_KEEPER.encode(said) == link.OPENER_TO_INBOX.encode(said)
    longer = link.OPENER_TO_INBOX.encode(CAME._replace(session="s" * 33))
    assert link.OPENER_TO_INBOX.decode(longer) == CAME._replace(session="s" * 32)


@pytest.mark.parametrize("message", [link.PING, link.STOP, link.LAUNCHER_TO_OPENER.encode(link.Policy(3))])
def test_what_the_launcher_says_to_keeper_and_opener_alike_both_understand(message):
    assert keeper.LAUNCHER_TO_KEEPER.decode(message) == link.LAUNCHER_TO_OPENER.decode(message)


def test_what_the_opener_alone_may_hear_or_say_is_nothing_to_the_keeper():
    for table, data in (
        (keeper.LAUNCHER_TO_KEEPER, link.LAUNCHER_TO_OPENER.encode(link.admin.Judged(1, home=True))),
        (keeper.KEEPER_TO_LAUNCHER, link.STOP_ASKED),
        (keeper.KEEPER_TO_LAUNCHER, link.WORKER_STUCK),
        (keeper.KEEPER_TO_LAUNCHER, link.OPENER_TO_LAUNCHER.encode(link.admin.ReloadAsked(1))),
        (lists.INBOX_TO_KEEPER, keeper.OPENER_TO_KEEPER.encode(keeper.Ended(1))),
        (keeper.KEEPER_TO_OPENER, lists.KEEPER_TO_INBOX.encode(lists.Offered(1, True, []))),
    ):
        with pytest.raises(LinkViolation):
            table.decode(data)


def test_a_client_may_be_in_so_many_groups_of_the_policy_and_not_in_one_more():
    """POLICY_GROUPS, and still one message; with the longest label."""
    most = CAME._replace(gids=tuple(range(limits.POLICY_GROUPS)), label="x" * limits.LABEL_BYTES)
    data = keeper.OPENER_TO_KEEPER.encode(most)
    assert len(data) <= limits.LINK_BYTES
    assert keeper.OPENER_TO_KEEPER.decode(data) == most
    more = most._replace(gids=(*most.gids, 1))
    with pytest.raises(ValueError, match=f"at most {limits.POLICY_GROUPS}"):
        keeper.OPENER_TO_KEEPER.encode(more)
    at = len(data) - 4 * limits.POLICY_GROUPS - 2
    longer = data[:at] + (limits.POLICY_GROUPS + 1).to_bytes(2, "big") + data[at + 2 :] + bytes(4)
    with pytest.raises(LinkViolation, match=f"{limits.POLICY_GROUPS + 1} values"):
        keeper.OPENER_TO_KEEPER.decode(longer)


@pytest.mark.parametrize(
    ("table", "data"),
    [
        (lists.INBOX_TO_KEEPER, lists.INBOX_TO_KEEPER.encode(lists.List(1, watch=True))[:-1] + b"\x02"),
        (keeper.LAUNCHER_TO_KEEPER, b"\x0f\2\0\0\0"),
        (
            keeper.OPENER_TO_KEEPER,
            keeper.OPENER_TO_KEEPER.encode(came(1, 0, 0, 1, False, "xx", ())).replace(b"xx", b"\xff\xfe"),
        ),
        (lists.KEEPER_TO_INBOX, b"\1" + bytes(8) + b"\1\0\x09" + bytes(300)),
    ],
    ids=["flag", "given", "label", "offers"],
)
def test_a_value_that_its_field_cannot_have_is_a_violation(table, data):
    with pytest.raises(LinkViolation):
        table.decode(data)
