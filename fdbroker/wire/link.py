"""The messages between launcher, opener and inbox: fixed formats, each length checked, one message a datagram.

Runs in: all three. A taken-over inbox controls what the opener decodes here, so a message that is unknown, mis-sized
or out of its turn is a LinkViolation, which ends the service.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from fdbroker import limits
from fdbroker.errors import (
    ClientNotReading,
    Denied,
    LinkViolation,
    NoSuchResource,
    NotWhatItWas,
    OpenFailed,
    QuotaExceeded,
    RateLimited,
    Refused,
)
from fdbroker.terms import Offer, Resource
from fdbroker.wire import resources, rights
from fdbroker.wire.pack import Cursor, exact, flag

_RESOURCES = limits.RESOURCES_PER_OPEN

# ---- inbox to opener


class Open(NamedTuple):
    """The client of `connection` asks for `resources`."""

    connection: int
    resources: list[Resource]


class List(NamedTuple):
    """The client of `connection` asks what it may open; with `watch` again after every change."""

    connection: int
    watch: bool


class Shutdown(NamedTuple):
    """The client of `connection` asks the service to stop. Only a refusal is answered, by an Outcome."""

    connection: int


# Why the inbox closed a connection, as an index; all but the first go into the audit.
CLOSED_REASONS = (
    "the client closed it",
    "the client broke the protocol",
    "a message came from another uid than the connection",
    "a message was not complete in time",
    "the client does not read its answers",
)


class Closed(NamedTuple):
    """The inbox has closed its copy of the connection and will not name it again; `reason`: see CLOSED_REASONS."""

    connection: int
    reason: int


class Slowed(NamedTuple):
    """The inbox has begun to read the user of `connection` more slowly than it sends."""

    connection: int


class Drained(NamedTuple):
    """The inbox answered all that was in flight and holds no connection any more."""


# ---- opener to inbox


class Outcome(NamedTuple):
    """How a request ended. `refusal` is None when the opener itself has written the reply to the client."""

    connection: int
    refusal: Refused | None


class Offered(NamedTuple):
    """A part of a listing; the last part has `last`."""

    connection: int
    last: bool
    offers: list[Offer]


class Drain(NamedTuple):
    """Answer what is in flight, take nothing more, close all."""


# ---- launcher to opener and back


class Policy(NamedTuple):
    """Use the policy in the sealed memfd that comes along; `generation` counts from 1."""

    generation: int


class Applied(NamedTuple):
    """The policy of that generation is in force."""

    generation: int


class Stop(NamedTuple):
    """Accept no more, drain, end."""


class StopAsked(NamedTuple):
    """An administrator asks the service to stop."""


class WorkerStuck(NamedTuple):
    """The namespaces worker does not answer any more."""


class Restart(NamedTuple):
    """End the worker that is stuck, and start another. Launcher to who holds the worker."""


class Ready(NamedTuple):
    """The process is confined and serves."""


class Ping(NamedTuple):
    """Are you alive? Launcher to opener to inbox."""


class Pong(NamedTuple):
    """The answer, the same way back: so one answer speaks for both children."""


ToOpener = Open | List | Shutdown | Closed | Slowed | Drained | rights.DeniedUse | Policy | Stop
ToInbox = rights.Connected | Outcome | Offered | Drain | rights.RightsChanged | rights.Topics | rights.Users
Message = ToOpener | ToInbox | Applied | StopAsked | WorkerStuck | Restart | Ready | Ping | Pong

# What may happen on one connection, and what state it is in afterwards. The opener judges the inbox by it: anything
# that has no row here is out of turn. docs/protocol.md prints it.
TURNS: Mapping[tuple[str, str], str] = {
    ("idle", "Open"): "opening",
    ("opening", "Outcome"): "idle",
    ("idle", "List"): "listing",
    ("listing", "Offered"): "idle",
    ("listing", "Outcome"): "idle",
    ("idle", "Watch"): "watching",
    ("watching", "Offered"): "watching",
    ("watching", "Outcome"): "idle",
    ("idle", "Shutdown"): "stopping",
    ("stopping", "Outcome"): "idle",
    ("idle", "DeniedUse"): "idle",
    ("idle", "Slowed"): "idle",
    ("opening", "Slowed"): "opening",
    ("listing", "Slowed"): "listing",
    ("watching", "Slowed"): "watching",
    ("stopping", "Slowed"): "stopping",
    ("idle", "Closed"): "gone",
    ("opening", "Closed"): "gone",
    ("listing", "Closed"): "gone",
    ("watching", "Closed"): "gone",
    ("stopping", "Closed"): "gone",
}

# ---- formats. First byte: the type. All numbers in network byte order.
_TYPE = struct.Struct("!B")
_CLOSED = struct.Struct("!BQB")
_SHUTDOWN = struct.Struct("!BQ")
_SLOWED = struct.Struct("!BQ")
_OPEN = struct.Struct("!BQB")  # then `count` resources
_LIST = struct.Struct("!BQB")
_OUTCOME = struct.Struct("!BQBBI")  # code, index of the resource (255: none), number; then text
_OFFERED = struct.Struct("!BQBH")  # last, count; then `count` times a resource and its rule:
_WHERE = struct.Struct("!H")  # length of where; where
_GENERATION = struct.Struct("!BI")

_OFFERS_PER_MESSAGE = 8  # two names of at most 4 KiB an offer: far below LINK_BYTES
_NO_INDEX = 255
_GRANTED = 0
_REFUSAL_CODES: dict[type[Refused], int] = {
    Denied: 1,
    NoSuchResource: 2,
    NotWhatItWas: 3,
    OpenFailed: 4,
    QuotaExceeded: 5,
    RateLimited: 6,
    ClientNotReading: 7,
}


def encode_open(connection: int, asked: Sequence[Resource]) -> bytes:
    """Raises ValueError when a path is over 65535 bytes or there are over RESOURCES_PER_OPEN resources."""
    if not 1 <= len(asked) <= _RESOURCES:
        raise ValueError(f"{len(asked)} resources")
    return b"".join([_OPEN.pack(1, connection, len(asked)), *map(resources.pack, asked)])


def _decode_open(data: bytes) -> Open:
    cursor = Cursor(data)
    _, connection, count = cursor.fields(_OPEN)
    if not 1 <= count <= _RESOURCES:
        raise LinkViolation(f"{count} resources")
    asked = [resources.take(cursor) for _ in range(count)]
    cursor.end()
    return Open(connection, asked)


def encode_list(connection: int, *, watch: bool) -> bytes:
    """With `watch` the listing comes again after each change."""
    return _LIST.pack(2, connection, watch)


def _decode_list(data: bytes) -> List:
    _, connection, watch = exact(_LIST, data)
    return List(connection, flag(watch))


def encode_closed(connection: int, reason: int) -> bytes:
    """The last word on a connection; `reason` is an index of CLOSED_REASONS."""
    return _CLOSED.pack(3, connection, reason)


def _decode_closed(data: bytes) -> Closed:
    _, connection, reason = exact(_CLOSED, data)
    if reason >= len(CLOSED_REASONS):
        raise LinkViolation(f"a reason of value {reason}")
    return Closed(connection, reason)


def encode_shutdown(connection: int) -> bytes:
    """Inbox to opener, which alone knows who is an administrator."""
    return _SHUTDOWN.pack(5, connection)


def _decode_shutdown(data: bytes) -> Shutdown:
    return Shutdown(exact(_SHUTDOWN, data)[1])


def encode_slowed(connection: int) -> bytes:
    """For the record; it says nothing of what is asked or answered."""
    return _SLOWED.pack(7, connection)


def _decode_slowed(data: bytes) -> Slowed:
    return Slowed(exact(_SLOWED, data)[1])


def encode_outcome(connection: int, refusal: Refused | None, *, why: bool = False) -> bytes:
    """`refusal` None: the descriptors and the reply have left. `why`: say of a denial what only the record may say."""
    if refusal is None:
        return _OUTCOME.pack(2, connection, _GRANTED, _NO_INDEX, 0)
    number, text = 0, ""
    match refusal:
        case Denied() if why:
            text = str(refusal)
        case NotWhatItWas():
            text = refusal.reason
        case OpenFailed():
            number = refusal.number
        case QuotaExceeded():
            number, text = refusal.maximum, refusal.limit
        case RateLimited():
            number = refusal.retry_after_ms
    index = _NO_INDEX if refusal.index is None else refusal.index
    return _OUTCOME.pack(2, connection, _REFUSAL_CODES[type(refusal)], index, number) + text.encode()


def decode_outcome(data: bytes) -> Outcome:
    """Also what the namespaces worker refuses. Raises LinkViolation."""
    cursor = Cursor(data)
    _, connection, code, position, number = cursor.fields(_OUTCOME)
    text = cursor.rest()
    index = None if position == _NO_INDEX else position
    refusal: Refused | None
    match code:
        case 0:
            refusal = None
        case 1:
            refusal = Denied(text or "no rule allows it", index=index)
        case 2:
            refusal = NoSuchResource("it is not there now", index=index)
        case 3:
            refusal = NotWhatItWas(text, index=index)
        case 4:
            refusal = OpenFailed(number, index=index)
        case 5:
            refusal = QuotaExceeded(text, number)
        case 6:
            refusal = RateLimited(number)
        case 7:
            refusal = ClientNotReading()
        case _:
            raise LinkViolation(f"outcome {code}")
    return Outcome(connection, refusal)


def encode_offered(connection: int, offers: Sequence[Offer], *, last: bool) -> bytes:
    """One part of a listing; `split_offers` makes them of the right size."""
    parts = [_OFFERED.pack(3, connection, last, len(offers))]
    for offer in offers:
        where = offer.where.encode()
        parts += (resources.pack(offer.resource), _WHERE.pack(len(where)), where)
    return b"".join(parts)


def split_offers(connection: int, offers: Sequence[Offer]) -> list[bytes]:
    """A whole listing as messages, at least one."""
    starts = range(0, max(1, len(offers)), _OFFERS_PER_MESSAGE)
    return [
        encode_offered(connection, offers[start : start + _OFFERS_PER_MESSAGE], last=start == starts[-1])
        for start in starts
    ]


def _decode_offered(data: bytes) -> Offered:
    cursor = Cursor(data)
    _, connection, last, count = cursor.fields(_OFFERED)
    offers = []
    for _ in range(count):
        resource = resources.take(cursor)
        (length,) = cursor.fields(_WHERE)
        offers.append(Offer(resource, cursor.text(length)))
    cursor.end()
    return Offered(connection, flag(last), offers)


def encode_policy(generation: int) -> bytes:
    """The memfd goes with it as the only descriptor."""
    return _GENERATION.pack(1, generation)


def _decode_policy(data: bytes) -> Policy:
    return Policy(exact(_GENERATION, data)[1])


def encode_applied(generation: int) -> bytes:
    """Opener to launcher."""
    return _GENERATION.pack(4, generation)


def _decode_applied(data: bytes) -> Applied:
    return Applied(exact(_GENERATION, data)[1])


def _plain(message: Message) -> Callable[[bytes], Message]:
    def decode(data: bytes) -> Message:
        exact(_TYPE, data)
        return message

    return decode


DRAINED, DRAIN, STOP, READY, PING, PONG, STOP_ASKED = (_TYPE.pack(number) for number in (4, 4, 5, 6, 7, 8, 9))
WORKER_STUCK, RESTART = (_TYPE.pack(number) for number in (10, 11))

Decoders = Mapping[int, Callable[[bytes], Message]]
INBOX_TO_OPENER: Decoders = {
    1: _decode_open,
    2: _decode_list,
    3: _decode_closed,
    4: _plain(Drained()),
    5: _decode_shutdown,
    6: rights.decode_denied_use,
    7: _decode_slowed,
    8: _plain(Pong()),
}
OPENER_TO_INBOX: Decoders = {
    1: rights.decode_connected,
    2: decode_outcome,
    3: _decode_offered,
    4: _plain(Drain()),
    5: rights.decode_changed,
    6: rights.decode_topics,
    8: rights.decode_users,
    7: _plain(Ping()),
}
LAUNCHER_TO_OPENER: Decoders = {1: _decode_policy, 5: _plain(Stop()), 7: _plain(Ping())}
OPENER_TO_LAUNCHER: Decoders = {
    4: _decode_applied,
    6: _plain(Ready()),
    8: _plain(Pong()),
    9: _plain(StopAsked()),
    10: _plain(WorkerStuck()),
}
LAUNCHER_TO_WORKER: Decoders = {5: _plain(Stop()), 11: _plain(Restart())}
# They may say that they are there, and nothing else: a taken-over inbox must not speak for the opener.
INBOX_TO_LAUNCHER: Decoders = {6: _plain(Ready())}
WORKER_TO_LAUNCHER: Decoders = {6: _plain(Ready())}


def decode(decoders: Decoders, data: bytes) -> Message:
    """One message, by the table of the direction that it came from. Raises LinkViolation."""
    if not data:
        raise LinkViolation("an empty message")
    decoder = decoders.get(data[0])
    if decoder is None:
        raise LinkViolation(f"unknown message type {data[0]}")
    return decoder(data)
