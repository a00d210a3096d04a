"""The messages between opener and namespaces worker: one question at a time, and its answer.

Runs in: opener, namespaces worker. Either of them, taken over, controls what the other decodes here.
"""

from __future__ import annotations

from typing import NamedTuple

from fdbroker import limits
from fdbroker.refusals import LinkViolation, Refused
from fdbroker.terms import Namespace, Socket, Uplink
from fdbroker.wire import codec, link, resources

KNOWN = limits.USER_LIMITS["namespaces"].most
RANGES = 1024  # of uids of one owner; subuid(5) has one for a user, as useradd(8) makes it, and root alone adds more


class Ask(NamedTuple):
    """Open or make `resource` for a client of user `uid`; its pidfd comes along, if the kernel gives one.

    `request` is a number of the opener's. For a new namespace: `known` are the inode numbers of those that were made
    for the client's `owner`, `maximum` how many of them may be living, `uplink` how it is connected, `uids` what
    belongs to the owner, as (first, last).
    """

    request: int
    uid: int
    resource: Namespace | Socket
    owner: int
    known: tuple[int, ...] = ()
    maximum: int = 0
    uplink: Uplink | None = None
    uids: tuple[tuple[int, int], ...] = ()

    def belongs(self, uid: int) -> bool:
        """Whether a uid is one of the owner's."""
        return any(first <= uid <= last for first, last in self.uids)


class Made(NamedTuple):
    """The answer: its descriptor comes along, then the pidfd of the process whose it is, where there is one.

    `inode` is the namespace's number, 0 for a socket. `unusable` is an index of UNUSABLE, UNKNOWN
    when nobody could tell. `living` says of each of `known` whether it is.
    """

    request: int
    inode: int
    unusable: int
    living: tuple[bool, ...]


class Failed(NamedTuple):
    """The answer when there is nothing: how to refuse."""

    request: int
    refusal: Refused


class Lost(NamedTuple):
    """The worker ended and was started again: what it had not answered it will not."""


UNKNOWN = 255
# Why setns(2) would fail for the program that asked; the index travels, 0 is "it would not".
UNUSABLE = (
    "",
    "setns(2) would fail with EPERM: the program has no CAP_SYS_ADMIN in its own user namespace",
    "setns(2) would fail with EPERM: the namespace is owned by a user namespace where the program has no CAP_SYS_ADMIN",
    "setns(2) would fail with EPERM: the program has no CAP_SYS_CHROOT in its own user namespace",
    "setns(2) would fail with EINVAL: the program is in that user namespace already",
)


def _known(reason: int) -> int:
    if reason != UNKNOWN and reason >= len(UNUSABLE):
        raise LinkViolation(f"a reason of value {reason}")
    return reason


_UPLINK = codec.Record(Uplink, codec.Text(15), codec.Text(64), codec.FLAG)
_RANGE = codec.Record(lambda first, last: (first, last), codec.U32, codec.U32)
_ASKED = codec.Choice({Namespace: resources.NAMESPACE, Socket: resources.SOCKET})
TO_WORKER: codec.Table[Ask] = codec.Table(
    (
        *(1, Ask),
        (
            *(codec.U64, codec.U32, _ASKED, codec.U32, codec.Some(codec.U32, KNOWN), codec.number(8, KNOWN)),
            *(codec.Maybe(_UPLINK), codec.Some(_RANGE, RANGES)),
        ),
    ),
)
Answer = Made | Failed | Lost
FROM_WORKER: codec.Table[Answer] = codec.Table(
    (1, Made, (codec.U64, codec.U32, codec.Mapped(codec.U8, int, _known), codec.Some(codec.FLAG, KNOWN))),
    (2, Failed, (codec.U64, link.REFUSAL_AND_WHY)),
    (4, Lost, ()),
)
LOST = FROM_WORKER.encode(Lost())


def request_of(answer: Answer) -> int:
    """The number of the question that is answered; 0, which none has, for Lost."""
    return 0 if isinstance(answer, Lost) else answer.request
