"""The messages between opener and namespaces worker: what a request asks of the worker, and one answer to all of it.

Runs in: opener, namespaces worker. Either of them, taken over, controls what the other decodes here.
"""

from __future__ import annotations

from typing import NamedTuple

from fdbroker.limits import opener as limits
from fdbroker.refusals import Refused
from fdbroker.terms import Namespace, Socket, Uplink
from fdbroker.wire import codec, link, resources

KNOWN = limits.LIVING_NAMESPACES
WANTED = limits.RESOURCES_PER_OPEN
DESCRIPTORS = 2 * WANTED  # of one answer; SCM_MAX_FD is 253
RANGES = 1024  # of uids of one owner; subuid(5) has one for a user, as useradd(8) makes it, and root alone adds more


class Wanted(NamedTuple):
    """One resource of a request; `uplink` says how a new net namespace is connected."""

    resource: Namespace | Socket
    uplink: Uplink | None = None


class Ask(NamedTuple):
    """Open or make all that is `wanted` for a client of user `uid`; its pidfd comes along, if the kernel gives one.

    `request` is a number of the opener's. The rest is for new namespaces: `known` are the inode numbers of those that
    were made for the client's `owner`, `maximum` how many of them may be living, `uids` what belongs to the owner, as
    (first, last).
    """

    request: int
    uid: int
    owner: int
    wanted: tuple[Wanted, ...]
    known: tuple[int, ...] = ()
    maximum: int = 0
    uids: tuple[tuple[int, int], ...] = ()


class Opened(NamedTuple):
    """What the answer says of a resource.

    `inode` is the namespace's number, 0 for a socket; `unusable` is an index of UNUSABLE.
    """

    inode: int
    unusable: int


class Made(NamedTuple):
    """The answer when all is open.

    The descriptors come along in order, then in order a pidfd for each of a process: that process.
    `known` replaces that of the question.
    """

    request: int
    opened: tuple[Opened, ...]
    known: tuple[int, ...] = ()


class Failed(NamedTuple):
    """The answer when one of the resources is not to be had: how to refuse. Its index is one of what was wanted.

    `known`, if a child of the worker's says it to the worker, replaces that of the question.
    """

    request: int
    refusal: Refused
    known: tuple[int, ...] = ()


class Lost(NamedTuple):
    """The worker ended and was started again: what it had not answered it will not."""


# Why setns(2) would fail for the program that asked; the index travels, 0 is "it would not", UNKNOWN nobody could tell.
UNUSABLE: tuple[str | None, ...] = (
    "",
    "setns(2) would fail with EPERM: the program has no CAP_SYS_ADMIN in its own user namespace",
    "setns(2) would fail with EPERM: the namespace is owned by a user namespace where the program has no CAP_SYS_ADMIN",
    "setns(2) would fail with EPERM: the program has no CAP_SYS_CHROOT in its own user namespace",
    "setns(2) would fail with EINVAL: the program is in that user namespace already",
    None,
)
UNKNOWN = len(UNUSABLE) - 1

_UPLINK = codec.Record(Uplink, codec.Text(15), codec.Text(64), codec.FLAG)
_RANGE = codec.Record(lambda first, last: (first, last), codec.U32, codec.U32)
_ASKED = codec.Choice({Namespace: resources.NAMESPACE, Socket: resources.SOCKET})
_WANTED = codec.Record(Wanted, _ASKED, codec.Maybe(_UPLINK))
_OPENED = codec.Record(Opened, codec.U32, codec.number(8, UNKNOWN))
_KNOWN = codec.Some(codec.U32, KNOWN)
TO_WORKER: codec.Table[Ask] = codec.Table(
    (
        *(1, Ask),
        (
            *(codec.U64, codec.U32, codec.U32, codec.Some(_WANTED, WANTED, 1)),
            *(_KNOWN, codec.number(8, KNOWN), codec.Some(_RANGE, RANGES)),
        ),
    ),
)
Answer = Made | Failed | Lost
FROM_WORKER: codec.Table[Answer] = codec.Table(
    (1, Made, (codec.U64, codec.Some(_OPENED, WANTED, 1), _KNOWN)),
    (2, Failed, (codec.U64, link.REFUSAL_AND_WHY, _KNOWN)),
    (4, Lost, ()),
)
LOST = FROM_WORKER.encode(Lost())
