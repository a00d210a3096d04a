"""The messages between the launcher and each process but the opener.

Runs in: all of them but the opener. Whichever is taken over controls what the launcher decodes here.
"""

from __future__ import annotations

from typing import NamedTuple

from fdbroker.wire import admin, codec, connections, link


class Given(NamedTuple):
    """Which nodes the opener can open: all for reading, all for writing, and what these groups may."""

    reads: bool
    writes: bool
    gids: tuple[int, ...]


class Look(NamedTuple):
    """Somebody waits at the socket: see whether the policy is still broken."""


class StillBroken(NamedTuple):
    """It is: refuse all who wait."""


class Restart(NamedTuple):
    """End the worker that is stuck, and start another. Launcher to who holds the worker."""


LAUNCHER_TO_KEEPER: codec.Table[link.Policy | link.Stop | link.Ping | Given] = codec.Table(
    (1, link.Policy, (codec.U32,)),
    (5, link.Stop, ()),
    (7, link.Ping, ()),
    (15, Given, (codec.FLAG, codec.FLAG, connections.GIDS)),
)
KEEPER_TO_LAUNCHER: codec.Table[link.Ready | link.Applied | link.Pong] = codec.Table(
    (4, link.Applied, (codec.U32,)), (6, link.Ready, ()), (8, link.Pong, ())
)
# While the policy is broken, the refuser asks before it refuses clients whether the policy still is.
REFUSER_TO_LAUNCHER: codec.Table[link.Ready | Look] = codec.Table((6, link.Ready, ()), (14, Look, ()))
LAUNCHER_TO_REFUSER: codec.Table[link.Stop | StillBroken] = codec.Table((5, link.Stop, ()), (14, StillBroken, ()))
LAUNCHER_TO_WORKER: codec.Table[link.Stop | Restart] = codec.Table((5, link.Stop, ()), (11, Restart, ()))
# They may say that they are there, and which policy they use, and nothing else: none speaks for the opener.
LAUNCHER_TO_INBOX: codec.Table[link.Policy] = codec.Table((1, link.Policy, (codec.U32,)))
INBOX_TO_LAUNCHER: codec.Table[link.Ready | link.Applied] = codec.Table(
    (4, link.Applied, (codec.U32,)), (6, link.Ready, ())
)
WORKER_TO_LAUNCHER: codec.Table[link.Ready] = codec.Table((6, link.Ready, ()))
LAUNCHER_TO_WITNESS: codec.Table[link.Stop | admin.Judge] = codec.Table(
    (5, link.Stop, ()), (12, admin.Judge, (codec.U64,))
)
WITNESS_TO_LAUNCHER: codec.Table[link.Ready | admin.Judged] = codec.Table(
    (6, link.Ready, ()), (12, admin.Judged, (codec.U64, codec.FLAG))
)

STOP, STOP_ASKED = link.LAUNCHER_TO_OPENER.encode(link.Stop()), link.OPENER_TO_LAUNCHER.encode(link.StopAsked())
DRAINED, RESTART = link.INBOX_TO_OPENER.encode(link.Drained()), LAUNCHER_TO_WORKER.encode(Restart())
LOOK, STILL_BROKEN = REFUSER_TO_LAUNCHER.encode(Look()), LAUNCHER_TO_REFUSER.encode(StillBroken())
