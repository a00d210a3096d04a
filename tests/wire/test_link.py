"""The links' messages: each goes both ways, and nothing else is understood."""

from __future__ import annotations

import pytest
from fakes import came

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
from fdbroker.limits import every as limits
from fdbroker.offers import Offer
from fdbroker.terms import Device
from fdbroker.topics import Topic, TopicUse
from fdbroker.wire import keeper, link, lists
from fdbroker.wire.audit import Record, fields
from fdbroker.wire.connections import Use
from fdbroker.wire.launcher import (
    DRAINED,
    INBOX_TO_LAUNCHER,
    KEEPER_TO_LAUNCHER,
    LAUNCHER_TO_INBOX,
    LAUNCHER_TO_KEEPER,
    STOP,
    STOP_ASKED,
    Given,
)

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
        (link.INBOX_TO_OPENER, DRAINED, link.Drained()),
        (link.INBOX_TO_OPENER, link.INBOX_TO_OPENER.encode(link.Shutdown(BIG)), link.Shutdown(BIG)),
        (link.OPENER_TO_LAUNCHER, STOP_ASKED, link.StopAsked()),
        (link.INBOX_TO_OPENER, link.PONG, link.Pong()),
        (link.OPENER_TO_INBOX, link.OPENER_TO_INBOX.encode(came(7, 2**32 - 2, 6, 5)), came(7, 2**32 - 2, 6, 5)),
        (link.OPENER_TO_INBOX, link.OPENER_TO_INBOX.encode(Use(BIG >> 32, 3)), Use(BIG >> 32, 3)),
        (LAUNCHER_TO_INBOX, LAUNCHER_TO_INBOX.encode(link.Policy(3)), link.Policy(3)),
        (INBOX_TO_LAUNCHER, INBOX_TO_LAUNCHER.encode(link.Applied(3)), link.Applied(3)),
        (link.OPENER_TO_INBOX, link.DRAIN, link.Drain()),
        (link.OPENER_TO_INBOX, link.PING, link.Ping()),
        (link.LAUNCHER_TO_OPENER, link.LAUNCHER_TO_OPENER.encode(link.Policy(3)), link.Policy(3)),
        (link.LAUNCHER_TO_OPENER, STOP, link.Stop()),
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
    "data", [link.PONG, STOP_ASKED, link.OPENER_TO_LAUNCHER.encode(link.admin.ReloadAsked(2)), link.PING]
)
def test_the_inbox_cannot_speak_to_the_launcher_for_the_opener(data):
    assert INBOX_TO_LAUNCHER.decode(link.READY) == link.Ready()
    with pytest.raises(LinkViolation):
        INBOX_TO_LAUNCHER.decode(data)


def test_a_message_of_the_other_direction_is_not_understood():
    with pytest.raises(LinkViolation):
        link.INBOX_TO_OPENER.decode(STOP)
    with pytest.raises(LinkViolation):
        link.LAUNCHER_TO_OPENER.decode(link.INBOX_TO_OPENER.encode(link.Closed(1, 0)))


def test_a_denied_topic_is_told_as_far_as_a_record_needs_it():
    for topic in ("nö\n", "x" * 255, ""):
        data = lists.INBOX_TO_KEEPER.encode(lists.DeniedUse(3, TopicUse("subscribe", topic)))
        assert lists.INBOX_TO_KEEPER.decode(data) == lists.DeniedUse(3, TopicUse("subscribe", topic))
    data = lists.INBOX_TO_KEEPER.encode(lists.DeniedUse(3, TopicUse("send", "x" * 65536)))
    assert lists.INBOX_TO_KEEPER.decode(data).use.topic == "x" * 255
    for wrong in (data + b"x", data[:9], data[:9] + b"\x02"):
        with pytest.raises(LinkViolation):
            lists.INBOX_TO_KEEPER.decode(wrong)


# ---- the keeper's links

CAME = came(BIG, 2**32 - 2, 1000, 7, True, "a//b (enforce)", (4, 2**32 - 1))._replace(comm="program")
REFUSED = Record("refused", "send", BIG, None, "why", "policy", "/etc/fdbroker/policy.yaml:7", "/dev/x", "rw")
KEEPERS = [
    (keeper.OPENER_TO_KEEPER, CAME),
    (keeper.OPENER_TO_KEEPER, came(1, 0, 0, 1, False, "", ())),
    (keeper.OPENER_TO_KEEPER, Use(3, 20_000)),
    (keeper.OPENER_TO_KEEPER, keeper.Ended(BIG)),
    (keeper.OPENER_TO_KEEPER, Record("slowed", "accept", 0, CAME.subject._replace(gids=frozenset()), "why")),
    (keeper.OPENER_TO_KEEPER, REFUSED),
    (keeper.OPENER_TO_KEEPER, keeper.Knock(BIG, 0, 2**32 - 2, 7, 1000)),
    (keeper.OPENER_TO_KEEPER, keeper.Lingers(BIG)),
    (keeper.OPENER_TO_KEEPER, keeper.Weighs(BIG, 64)),
    (keeper.OPENER_TO_KEEPER, keeper.Stalled(2**32 - 1, 10_000)),
    (keeper.OPENER_TO_KEEPER, keeper.Broke(BIG)),
    (keeper.OPENER_TO_KEEPER, keeper.Contested()),
    (keeper.KEEPER_TO_OPENER, keeper.LetIn(BIG)),
    (keeper.KEEPER_TO_OPENER, keeper.TurnAway(BIG, 20_000)),
    (keeper.OPENER_TO_KEEPER, keeper.HungUp(BIG)),
    (keeper.KEEPER_TO_OPENER, keeper.Waits(BIG)),
    (LAUNCHER_TO_KEEPER, link.Policy(3)),
    (LAUNCHER_TO_KEEPER, link.Stop()),
    (LAUNCHER_TO_KEEPER, link.Ping()),
    (LAUNCHER_TO_KEEPER, Given(True, False, (5, 29))),
    (KEEPER_TO_LAUNCHER, link.Applied(3)),
    (KEEPER_TO_LAUNCHER, link.Ready()),
    (KEEPER_TO_LAUNCHER, link.Pong()),
    (lists.INBOX_TO_KEEPER, lists.List(BIG, True)),
    (lists.INBOX_TO_KEEPER, lists.DeniedUse(BIG, TopicUse("subscribe", "nö"))),
    (lists.INBOX_TO_KEEPER, lists.Slowed(BIG)),
    (lists.KEEPER_TO_INBOX, lists.Offered(7, True, OFFERS[:2])),
    (lists.KEEPER_TO_INBOX, lists.Offered(7, False, [])),
    (lists.KEEPER_TO_INBOX, lists.ListRefused(7, 10_000)),
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


@pytest.mark.parametrize("kind", ["granted", "undone", "stopping", "reloading", "violation"])
def test_what_the_opener_must_write_itself_is_nothing_to_the_keeper(kind):
    with pytest.raises(ValueError, match="not in tuple"):
        keeper.OPENER_TO_KEEPER.encode(REFUSED._replace(kind=kind))


@pytest.mark.parametrize("character", ["x", "€", "\U0001f600", "\n", "\x7f"])
@pytest.mark.parametrize("more", [-1, 0, 1, 60_000])
def test_a_long_text_of_a_refusal_is_cut_on_the_link_and_the_record_is_the_same(character, more):
    """A record shows so many characters, and tells whether there were more."""
    text = character * (limits.AUDIT_VALUE_CHARACTERS + more)
    record = REFUSED._replace(resource=text, reason=text)
    data = keeper.OPENER_TO_KEEPER.encode(record)
    assert len(data) < 5000
    assert fields(keeper.OPENER_TO_KEEPER.decode(data)) == fields(record)


@pytest.mark.parametrize("message", [link.PING, STOP, link.LAUNCHER_TO_OPENER.encode(link.Policy(3))])
def test_what_the_launcher_says_to_keeper_and_opener_alike_both_understand(message):
    assert LAUNCHER_TO_KEEPER.decode(message) == link.LAUNCHER_TO_OPENER.decode(message)


def test_what_the_opener_alone_may_hear_or_say_is_nothing_to_the_keeper():
    for table, data in (
        (LAUNCHER_TO_KEEPER, link.LAUNCHER_TO_OPENER.encode(link.admin.Judged(1, home=True))),
        (KEEPER_TO_LAUNCHER, STOP_ASKED),
        (KEEPER_TO_LAUNCHER, link.WORKER_STUCK),
        (KEEPER_TO_LAUNCHER, link.OPENER_TO_LAUNCHER.encode(link.admin.ReloadAsked(1))),
        (lists.INBOX_TO_KEEPER, keeper.OPENER_TO_KEEPER.encode(keeper.Ended(1))),
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
    at = data.index(limits.POLICY_GROUPS.to_bytes(2, "big") + bytes(4))
    longer = data[:at] + (limits.POLICY_GROUPS + 1).to_bytes(2, "big") + bytes(4) + data[at + 2 :]
    with pytest.raises(LinkViolation, match=f"{limits.POLICY_GROUPS + 1} values"):
        keeper.OPENER_TO_KEEPER.decode(longer)


@pytest.mark.parametrize(
    ("table", "data"),
    [
        (lists.INBOX_TO_KEEPER, lists.INBOX_TO_KEEPER.encode(lists.List(1, watch=True))[:-1] + b"\x02"),
        (LAUNCHER_TO_KEEPER, b"\x0f\2\0\0\0"),
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
