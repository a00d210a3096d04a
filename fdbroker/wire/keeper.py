"""What the opener tells the keeper, and whom the keeper lets in or turns away.

Runs in: opener, keeper. Either, taken over, controls what the other decodes here.
"""

from __future__ import annotations

from typing import NamedTuple

from fdbroker.limits import opener as limits
from fdbroker.terms import ACCESS_NAMES
from fdbroker.wire import codec, connections
from fdbroker.wire.audit import Record


class Knock(NamedTuple):
    """A connection has been accepted: when may it be let in? It has that number for ever."""

    connection: int
    uid: int
    gid: int
    pid: int
    owner: int


class Lingers(NamedTuple):
    """The inbox has closed that connection, but its client has not read all: it counts, and lists no more."""

    connection: int


class Ended(NamedTuple):
    """That connection is gone, or was turned away after it was let in."""

    connection: int


class Weighs(NamedTuple):
    """To identify the client of that connection was as much work as so many more connections."""

    connection: int
    connections: int


class Stalled(NamedTuple):
    """To say something to a client of that owner, or to hang up, took so long."""

    owner: int
    took_us: int


class Broke(NamedTuple):
    """That connection ends because its client broke a rule."""

    connection: int


class HungUp(NamedTuple):
    """The client of that connection has hung up; if it still waits, it is to be turned away."""

    connection: int


class Contested(NamedTuple):
    """Several owners have work now: who has had more than its part may have to wait."""


class LetIn(NamedTuple):
    """That connection may be let in, if its owner may have one more."""

    connection: int


class Waits(NamedTuple):
    """That connection is to wait: its owner is in debt, and others have work."""

    connection: int


class TurnAway(NamedTuple):
    """That connection may not be let in: its owner has, with those that wait, `maximum`. Or it has hung up."""

    connection: int
    maximum: int


# The kinds of records that the keeper writes, which the opener tells it of.
REFUSALS = ("refused", "turned-away", "disconnected", "slowed")
_KIND = codec.word(*REFUSALS)
_ONE = (codec.U64,)
_STAGE = codec.word("accept", "identify", "decode", "authorize", "open", "audit", "send")
# One character more than a record shows, of 4 bytes at most: so the record tells that something is missing.
_SHOWN = codec.Text(4 * (limits.AUDIT_VALUE_CHARACTERS + 1), cut=True)
_WHAT = (codec.Text(0x2000, cut=True), _SHOWN, codec.word("", *ACCESS_NAMES))  # the rule's path and line; what is asked
_RECORD = (_KIND, _STAGE, codec.U64, codec.Maybe(connections.SUBJECT), _SHOWN, _SHOWN, *_WHAT)

_OfConnection = Ended | Knock | Lingers | Weighs | Broke | HungUp
ToKeeper = connections.Came | connections.Use | _OfConnection | Record | Stalled | Contested
ToOpener = LetIn | Waits | TurnAway
OPENER_TO_KEEPER: codec.Table[ToKeeper] = codec.Table(
    *connections.ROWS,
    (3, Ended, _ONE),
    (4, Record, _RECORD),
    (8, Knock, (codec.U64, *[codec.U32] * 4)),
    (9, Lingers, _ONE),
    (10, Weighs, (codec.U64, codec.U32)),
    (11, Stalled, (codec.U32, codec.U32)),
    (12, Broke, _ONE),
    (13, Contested, ()),
    (14, HungUp, _ONE),
)
KEEPER_TO_OPENER: codec.Table[ToOpener] = codec.Table(
    (1, LetIn, _ONE), (2, TurnAway, (codec.U64, codec.U32)), (3, Waits, _ONE)
)
