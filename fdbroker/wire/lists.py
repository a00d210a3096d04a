"""What inbox and keeper tell each other: what a client asks to have listed, the listings, and what is to be recorded.

Runs in: inbox, keeper. A taken-over process controls what the other one decodes here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

from fdbroker.limits import opener as limits
from fdbroker.offers import Offer
from fdbroker.topics import TOPIC_VERBS, TopicUse
from fdbroker.wire import codec, link, resources

# What may happen on one connection, and what state it is in afterwards. Opener and keeper judge the inbox by it, and it
# judges them: anything that has no row here is out of turn. docs/protocol.md prints it.
STATES = ("idle", "opening", "listing", "watching", "stopping", "reloading", "subscribed")
TURNS: Mapping[tuple[str, str], str] = {
    **link.TURNS,
    ("idle", "List"): "listing",
    ("listing", "Offered"): "idle",
    ("listing", "Outcome"): "idle",
    ("idle", "Watch"): "watching",
    ("watching", "Offered"): "watching",
    ("watching", "Outcome"): "idle",
    ("idle", "DeniedUse"): "idle",
    ("idle", "Subscribe"): "subscribed",
    ("subscribed", "Unsubscribe"): "idle",
    **{(state, "Slowed"): state for state in STATES},
    **{(state, "Closed"): "gone" for state in STATES},
}
turned = partial(link.turned, turns=TURNS)


class List(NamedTuple):
    """The client of `connection` asks what it may open; with `watch` again after every change."""

    connection: int
    watch: bool


class DeniedUse(NamedTuple):
    """The client of `connection` was not allowed to use a topic: for the record. `use` may be cut."""

    connection: int
    use: TopicUse


class Slowed(NamedTuple):
    """The inbox has begun to read the user of `connection` more slowly than it sends: for the record."""

    connection: int


class ListRefused(NamedTuple):
    """A List of that connection is refused, for so many milliseconds."""

    connection: int
    wait_ms: int


class Offered(NamedTuple):
    """A part of a listing; the last part has `last`."""

    connection: int
    last: bool
    offers: list[Offer]


_OFFERS_PER_MESSAGE = 8  # two names of at most 4 KiB an offer: far below LINK_BYTES
_OFFER = codec.Record(Offer, resources.RESOURCE, codec.Text(0xFFFF), codec.U64)
_USE = codec.Record(TopicUse, codec.word(*TOPIC_VERBS), codec.Text(limits.NAME_BYTES, cut=True))
FromInbox = List | DeniedUse | Slowed
INBOX_TO_KEEPER: codec.Table[FromInbox] = codec.Table(
    (1, List, (codec.U64, codec.FLAG)),
    (6, DeniedUse, (codec.U64, _USE)),
    (7, Slowed, (codec.U64,)),
)
FromKeeper = Offered | ListRefused
KEEPER_TO_INBOX: codec.Table[FromKeeper] = codec.Table(
    (1, Offered, (codec.U64, codec.FLAG, codec.Some(_OFFER, _OFFERS_PER_MESSAGE, 0, list))),
    (2, ListRefused, (codec.U64, codec.U32)),
)


def split_offers(connection: int, offers: Sequence[Offer]) -> list[bytes]:
    """A whole listing as messages, at least one."""
    starts = range(0, max(1, len(offers)), _OFFERS_PER_MESSAGE)
    parts = [(start == starts[-1], list(offers[start : start + _OFFERS_PER_MESSAGE])) for start in starts]
    return [KEEPER_TO_INBOX.encode(Offered(connection, last, some)) for last, some in parts]
