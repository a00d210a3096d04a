"""What launcher and opener tell the keeper, and what they hear of it.

Runs in: launcher, opener, keeper. A taken-over keeper controls what the other two decode here.
"""

from __future__ import annotations

from typing import NamedTuple

from fdbroker import limits
from fdbroker.wire import codec, link


class Given(NamedTuple):
    """Which nodes the opener can open: all for reading, all for writing, and what these groups may."""

    reads: bool
    writes: bool
    gids: tuple[int, ...]


class Came(NamedTuple):
    """Who connected. Said before the inbox hears of the connection, and again after a `Use`.

    `gids` are those of its groups that the policy names.
    """

    connection: int
    uid: int
    owner: int
    pid: int
    foreign: bool
    label: str
    gids: tuple[int, ...]


class Use(NamedTuple):
    """The launcher's policy of that number counts from now on; who is there now comes again, `connections` of them."""

    number: int
    connections: int


class Ended(NamedTuple):
    """That connection has ended."""

    connection: int


class ListRefused(NamedTuple):
    """A List of that connection was refused, for so many milliseconds. To inbox and opener, which records it."""

    connection: int
    wait_ms: int


ToKeeper = Came | Use | Ended
_GIDS = codec.Some(codec.U32, limits.POLICY_GROUPS)
OPENER_TO_KEEPER: codec.Table[ToKeeper] = codec.Table(
    (1, Came, (codec.U64, codec.U32, codec.U32, codec.U32, codec.FLAG, codec.Text(limits.LABEL_BYTES), _GIDS)),
    (2, Use, (codec.U32, codec.U32)),
    (3, Ended, (codec.U64,)),
)
KEEPER_TO_OPENER: codec.Table[ListRefused] = codec.Table((1, ListRefused, (codec.U64, codec.U32)))
LAUNCHER_TO_KEEPER: codec.Table[link.Policy | link.Stop | link.Ping | Given] = codec.Table(
    (1, link.Policy, (codec.U32,)),
    (5, link.Stop, ()),
    (7, link.Ping, ()),
    (15, Given, (codec.FLAG, codec.FLAG, _GIDS)),
)
KEEPER_TO_LAUNCHER: codec.Table[link.Ready | link.Applied | link.Pong] = codec.Table(
    (4, link.Applied, (codec.U32,)), (6, link.Ready, ()), (8, link.Pong, ())
)
