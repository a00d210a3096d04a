"""The links between our processes: what a decoder takes is one message, which its encoder writes and it reads again.

Where the less trusted end speaks, it is written byte for byte as it came: nothing in it was overlooked.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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
from fdbroker.terms import Device, Namespace, Socket, Uplink
from fdbroker.topics import TopicUse
from fdbroker.wire import admin, keeper, link, lists, worker
from fdbroker.wire.audit import Record, fields
from fdbroker.wire.connections import Came, Use
from fdbroker.wire.launcher import (
    DRAINED,
    INBOX_TO_LAUNCHER,
    KEEPER_TO_LAUNCHER,
    LAUNCHER_TO_INBOX,
    LAUNCHER_TO_KEEPER,
    LAUNCHER_TO_WORKER,
    RESTART,
    STOP,
    STOP_ASKED,
    WORKER_TO_LAUNCHER,
    Given,
)

TABLES = (
    link.INBOX_TO_OPENER,
    link.OPENER_TO_INBOX,
    link.LAUNCHER_TO_OPENER,
    link.OPENER_TO_LAUNCHER,
    LAUNCHER_TO_WORKER,
    INBOX_TO_LAUNCHER,
    WORKER_TO_LAUNCHER,
    worker.TO_WORKER,
    worker.FROM_WORKER,
    lists.INBOX_TO_KEEPER,
    lists.KEEPER_TO_INBOX,
    keeper.OPENER_TO_KEEPER,
    keeper.KEEPER_TO_OPENER,
    LAUNCHER_TO_KEEPER,
    KEEPER_TO_LAUNCHER,
    LAUNCHER_TO_INBOX,
)
CAME = Came(1, 100_000, 100, 7, 1000, True, "a//b (enforce)", "c1", (29, 44))
ASK, ANSWER = TABLES.index(worker.TO_WORKER), TABLES.index(worker.FROM_WORKER)
WORDS = (b"\0\0\0\0\0\0\0\1", b"\xff" * 8, b"\0\x08/dev/snd", b"\0\xff", b"\xff\xfe", b"\xef\xbf\xbd")
FROM_INBOX = (link.INBOX_TO_OPENER, lists.INBOX_TO_KEEPER)


def seeds() -> Iterator[bytes]:
    asked = [Device("/dev/snd/ä", "rw"), Namespace("net", "vpn"), Namespace("mnt", pid=7), Namespace("uts")]
    asked += [Socket("vpn", "inet6", "dgram", 443)]
    yield b"\0" + link.INBOX_TO_OPENER.encode(link.Open(2**64 - 1, tuple(asked)))
    for one in (
        link.INBOX_TO_OPENER.encode(link.Closed(1, 4)),
        link.INBOX_TO_OPENER.encode(link.Shutdown(1)),
        DRAINED,
    ):
        yield b"\0" + one
    for refusal in (
        *(None, Denied("x", index=3), NoSuchResource("x", index=0), NotWhatItWas("a FIFO", index=63)),
        *(OpenFailed(16), QuotaExceeded("burst", 9), RateLimited(10), ClientNotReading()),
    ):
        yield b"\1" + link.OPENER_TO_INBOX.encode(link.Outcome(9, refusal))
    yield from (b"\2" + one for one in (link.LAUNCHER_TO_OPENER.encode(link.Policy(3)), STOP, link.PING))
    yield from (b"\3" + one for one in (link.OPENER_TO_LAUNCHER.encode(link.Applied(3)), STOP_ASKED, link.WORKER_STUCK))
    yield from (b"\4" + RESTART, b"\5" + link.READY, b"\6" + link.READY)
    uplink = Uplink("br0", "10.0.0.0/24", isolated=True)
    yield bytes([ASK]) + worker.TO_WORKER.encode(
        worker.Ask(1, 1000, 7, (worker.Wanted(Namespace("net"), uplink),), (4, 5), 16, ((7, 7), (9, 1000)))
    )
    wanted = tuple(worker.Wanted(one) for one in asked[1:])
    yield bytes([ASK]) + worker.TO_WORKER.encode(worker.Ask(1, 1000, 1000, wanted))
    opened = (worker.Opened(4026531840, 2), worker.Opened(0, worker.UNKNOWN))
    yield bytes([ANSWER]) + worker.FROM_WORKER.encode(worker.Made(1, opened, (4026531840,)))
    yield bytes([ANSWER]) + worker.FROM_WORKER.encode(worker.Failed(1, OpenFailed(110)))
    yield bytes([ANSWER]) + worker.LOST
    for table, *messages in (
        (
            lists.INBOX_TO_KEEPER,
            *(lists.List(1, watch=True), lists.DeniedUse(1, TopicUse("subscribe", "nö")), lists.Slowed(2)),
        ),
        (
            lists.KEEPER_TO_INBOX,
            lists.Offered(1, True, [Offer(one, "/etc/p.yaml:7") for one in asked]),
            lists.ListRefused(1, 10),
        ),
        (
            keeper.OPENER_TO_KEEPER,
            *(CAME, Use(2, 1), keeper.Ended(1), keeper.Knock(1, 2, 3, 4, 5), keeper.Lingers(1), keeper.Weighs(1, 64)),
            *(keeper.Stalled(5, 9), keeper.Broke(1), keeper.Contested()),
            Record("disconnected", "decode", 1, None, "why", "policy", "p.yaml:7", "/dev/ä", "rw"),
            Record("turned-away", "accept", 0, CAME.subject._replace(gids=frozenset()), "why"),
        ),
        (link.OPENER_TO_INBOX, CAME, Use(2, 1)),
        (LAUNCHER_TO_INBOX, link.Policy(2)),
        (INBOX_TO_LAUNCHER, link.Applied(2)),
        (keeper.KEEPER_TO_OPENER, keeper.LetIn(1), keeper.TurnAway(1, 64), keeper.Waits(1)),
        (LAUNCHER_TO_KEEPER, link.Policy(2), link.Stop(), link.Ping(), Given(True, False, (29,))),
        (KEEPER_TO_LAUNCHER, link.Applied(2), link.Ready(), link.Pong()),
    ):
        yield from (bytes([TABLES.index(table)]) + table.encode(message) for message in messages)


def plain(message: Any) -> Any:
    """Exceptions have no equality of their own; why something is denied is told by the worker alone."""
    if isinstance(message, link.Outcome | worker.Failed) and message.refusal is not None:
        refusal = message.refusal
        text = "" if isinstance(message, link.Outcome) and isinstance(refusal, Denied) else str(refusal)
        return message._replace(refusal=(type(refusal), text, refusal.index))
    return message


def target(data: bytes) -> None:
    direction, data = data[0] % len(TABLES) if data else 0, data[1:]
    try:
        message = TABLES[direction].decode(data)
    except LinkViolation:
        return
    again = TABLES[direction].encode(message)
    assert len(again) <= limits.LINK_BYTES
    may_be_cut = lists.DeniedUse | Record | Came | link.Outcome | worker.Failed | admin.Reloaded
    cut_text = isinstance(message, may_be_cut) and "\N{REPLACEMENT CHARACTER}" in str(message)
    if not cut_text:  # which could not be read anyway
        assert plain(TABLES[direction].decode(again)) == plain(message)
        assert TABLES[direction] not in FROM_INBOX or again == data
    judge(message)


def judge(message: Any) -> None:
    """What other code takes for granted of a message."""
    match message:
        case link.Open(_, asked):
            assert 1 <= len(asked) <= limits.RESOURCES_PER_OPEN
        case link.Closed(_, reason):
            assert 0 <= reason < len(link.CLOSED_REASONS)
        case lists.DeniedUse(_, use):
            assert len(use.topic) <= limits.NAME_BYTES
        case Came(session=session, gids=gids):
            assert len(session) <= 32
            assert len(gids) <= limits.POLICY_GROUPS
        case Record(kind=kind, resource=asked):
            assert kind in keeper.REFUSALS
            assert len(asked) <= 4 * (limits.AUDIT_VALUE_CHARACTERS + 1)
            assert fields(message)
        case Given(gids=gids):
            assert len(gids) <= limits.POLICY_GROUPS
        case lists.Offered(_, _, offers):
            assert len(lists.split_offers(1, offers)) == 1
        case worker.Ask():
            assert len(message.known) <= worker.KNOWN
            assert message.maximum <= worker.KNOWN
            assert 1 <= len(message.wanted) <= limits.RESOURCES_PER_OPEN
        case worker.Made():
            assert len(message.known) <= worker.KNOWN
            for one in message.opened:
                assert one.unusable == worker.UNKNOWN or worker.UNUSABLE[one.unusable] is not None
