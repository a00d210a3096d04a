"""What inbox and keeper tell each other: what a client asks to have listed, and the listings.

Runs in: inbox, keeper. A taken-over process controls what the other one decodes here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fdbroker.offers import Offer
from fdbroker.wire import codec, resources
from fdbroker.wire.keeper import ListRefused


class List(NamedTuple):
    """The client of `connection` asks what it may open; with `watch` again after every change."""

    connection: int
    watch: bool


class Offered(NamedTuple):
    """A part of a listing; the last part has `last`."""

    connection: int
    last: bool
    offers: list[Offer]


_OFFERS_PER_MESSAGE = 8  # two names of at most 4 KiB an offer: far below LINK_BYTES
_OFFER = codec.Record(Offer, resources.RESOURCE, codec.Text(0xFFFF), codec.U64)
INBOX_TO_KEEPER: codec.Table[List] = codec.Table((1, List, (codec.U64, codec.FLAG)))
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
