"""Who is connected, and by which policy they count: what the opener tells inbox and keeper, both in the same words.

Runs in: opener (writes), inbox and keeper (read).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Self

from fdbroker.limits import opener as limits
from fdbroker.terms import Subject
from fdbroker.wire import codec


class Came(NamedTuple):
    """Who connected: to the keeper first, then to the inbox with a duplicate of the socket; again after each `Use`.

    `gids` are those of its groups that the policy names. The name of a session is cut at 32 bytes.
    `comm`, the name of its program, is for records alone.
    """

    connection: int
    uid: int
    gid: int
    pid: int
    owner: int
    foreign: bool
    label: str
    session: str
    gids: tuple[int, ...]
    comm: str = ""

    @classmethod
    def of(cls, connection: int, one: Subject, gids: Iterable[int]) -> Self:
        """What is said of a connection."""
        place = one.foreign, one.label, one.session
        return cls(connection, one.uid, one.gid, one.pid, one.owner, *place, tuple(gids), one.comm)

    @property
    def subject(self) -> Subject:
        """Who it is, with those groups alone that the policy names."""
        place = self.label, self.foreign, self.session
        return Subject(self.uid, frozenset(self.gids), self.gid, self.pid, self.comm, *place, self.owner)


class Use(NamedTuple):
    """The launcher's policy of that number counts from now on; who is there now comes again, `connections` of them."""

    number: int
    connections: int


GIDS = codec.Some(codec.U32, limits.POLICY_GROUPS)
_LABEL, _SESSION, _COMM = codec.Text(limits.LABEL_BYTES), codec.Text(32, cut=True), codec.Text(64, cut=True)
_CAME: tuple[codec.Field, ...] = (codec.U64, *[codec.U32] * 4, codec.FLAG, _LABEL, _SESSION, GIDS, _COMM)
# of a subject, without its groups
SUBJECT = codec.Mapped(
    codec.Record(Came, *_CAME), lambda one: Came.of(0, one, ()), lambda came: came._replace(gids=()).subject
)
# in both tables, by the same numbers: the same bytes go to both
ROWS: tuple[tuple[int, type[Any], tuple[codec.Field, ...]], ...] = (
    (1, Came, _CAME),
    (2, Use, (codec.U32, codec.U32)),
)
