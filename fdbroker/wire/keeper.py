"""What launcher and opener tell the keeper, and what they hear of it.

Runs in: launcher, opener, keeper. A taken-over keeper controls what the other two decode here.
"""

from __future__ import annotations

from typing import NamedTuple

from fdbroker.wire import codec, connections, link


class Given(NamedTuple):
    """Which nodes the opener can open: all for reading, all for writing, and what these groups may."""

    reads: bool
    writes: bool
    gids: tuple[int, ...]


class Ended(NamedTuple):
    """That connection has ended."""

    connection: int


class ListRefused(NamedTuple):
    """A List of that connection was refused, for so many milliseconds. To inbox and opener, which records it."""

    connection: int
    wait_ms: int


ToKeeper = connections.Came | connections.Use | Ended
OPENER_TO_KEEPER: codec.Table[ToKeeper] = codec.Table(*connections.ROWS, (3, Ended, (codec.U64,)))
KEEPER_TO_OPENER: codec.Table[ListRefused] = codec.Table((1, ListRefused, (codec.U64, codec.U32)))
LAUNCHER_TO_KEEPER: codec.Table[link.Policy | link.Stop | link.Ping | Given] = codec.Table(
    (1, link.Policy, (codec.U32,)),
    (5, link.Stop, ()),
    (7, link.Ping, ()),
    (15, Given, (codec.FLAG, codec.FLAG, connections.GIDS)),
)
KEEPER_TO_LAUNCHER: codec.Table[link.Ready | link.Applied | link.Pong] = codec.Table(
    (4, link.Applied, (codec.U32,)), (6, link.Ready, ()), (8, link.Pong, ())
)
