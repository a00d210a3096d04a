"""The messages between opener and launcher, and opener and inbox: each length is checked, one message a datagram.

Runs in: all three. A taken-over inbox controls what the opener decodes here, so a message that is unknown, mis-sized
or out of its turn is a LinkViolation, which ends the service.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

from fdbroker.limits import opener as limits
from fdbroker.refusals import (
    RETRY_CAUSES,
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
from fdbroker.terms import Resource
from fdbroker.wire import admin, codec, connections, resources

_RESOURCES = limits.RESOURCES_PER_OPEN

# ---- inbox to opener


class Open(NamedTuple):
    """The client of `connection` asks for `resources`."""

    connection: int
    resources: tuple[Resource, ...]


class Shutdown(NamedTuple):
    """The client of `connection` asks the service to stop. Only a refusal is answered, by an Outcome."""

    connection: int


# Why the inbox closed a connection, as an index; all but the first are recorded.
CLOSED_REASONS = (
    "the client closed it",
    "the client broke the protocol",
    "a message came from another uid than the connection",
    "a message was not complete in time",
    "the client does not read its answers",
    "the inbox has no descriptor left for it",
)
NOT_TAKEN = len(CLOSED_REASONS) - 1  # of these: the inbox never had it


class Closed(NamedTuple):
    """The inbox has closed its copy of the connection and will not name it again; `reason`: see CLOSED_REASONS."""

    connection: int
    reason: int


class Drained(NamedTuple):
    """The inbox answered all that was in flight and holds no connection any more."""


# ---- opener to inbox


class Outcome(NamedTuple):
    """How a request ended. `refusal` is None when the opener itself has written the reply to the client.

    `sent_us`: how long that write took, which wakes all who wait for the client's socket.
    """

    connection: int
    refusal: Refused | None
    sent_us: int = 0


class Drain(NamedTuple):
    """Answer what is in flight, take nothing more, close all."""


# ---- launcher to opener and back


class Policy(NamedTuple):
    """Use the policy in the sealed memfd that comes along; `number` counts those that were handed on."""

    number: int


class Applied(NamedTuple):
    """The policy of that number is in force."""

    number: int


class Stop(NamedTuple):
    """Accept no more, drain, end."""


class StopAsked(NamedTuple):
    """An administrator asks the service to stop."""


class WorkerStuck(NamedTuple):
    """The namespaces worker does not answer any more."""


class Ready(NamedTuple):
    """The process is confined and serves."""


class Ping(NamedTuple):
    """Are you alive? Launcher to opener to inbox."""


class Pong(NamedTuple):
    """The answer, the same way back: so one answer speaks for both children."""


FromInbox = Open | Shutdown | admin.Reload | Closed | Drained | Pong
ToInbox = connections.Came | connections.Use | Outcome | admin.Reloaded | Drain | Ping
ToLauncher = Applied | Ready | Pong | StopAsked | admin.ReloadAsked | admin.Judge | WorkerStuck
FromLauncher = Policy | Stop | Ping | admin.Judged | admin.Reloaded

# What may happen on one connection, as far as the opener hears of it, and what state it is in afterwards. Anything that
# has no row is out of turn. The whole table is in lists.py.
_STATES = ("idle", "opening", "stopping", "reloading")
TURNS: Mapping[tuple[str, str], str] = {
    ("idle", "Open"): "opening",
    ("opening", "Outcome"): "idle",
    ("idle", "Shutdown"): "stopping",
    ("stopping", "Outcome"): "idle",
    ("idle", "Reload"): "reloading",
    ("reloading", "Outcome"): "idle",
    ("reloading", "Reloaded"): "idle",
    **{(state, "Closed"): "gone" for state in _STATES},
}


def turned(number: int, state: str, event: str, turns: Mapping[tuple[str, str], str] = TURNS) -> str:
    """The state of connection `number` after `event`. Raises LinkViolation when that is out of turn."""
    after = turns.get((state, event))
    if after is None:
        raise LinkViolation(f"{event} on connection {number}, which is {state}")
    return after


# ---- formats

_REASON_BYTES = 8192
# by their codes
_REFUSALS = (Denied, NoSuchResource, NotWhatItWas, OpenFailed, QuotaExceeded, RateLimited, ClientNotReading)


def _told(refusal: Refused, *, why: bool = False) -> tuple[int, int | None, int, str]:
    """Code, index of the resource, number, text; with `why` also that of a denial, which only a record may say."""
    told: dict[type[int | str], Any] = {kind: getattr(refusal, attribute) for attribute, _, kind in refusal.said}
    text = str(refusal) if why and isinstance(refusal, Denied) else told.get(str, "")
    return _REFUSALS.index(type(refusal)), refusal.index, told.get(int, 0), text


def _refusal(told: tuple[int, int | None, int, str]) -> Refused:
    code, index, number, text = told
    kind: type[Any] = _REFUSALS[code]
    arguments: list[int | str] = [number if one is int else text for _, _, one in kind.said]
    if kind is Denied and text:
        arguments = [text]
    if kind is RateLimited and text not in RETRY_CAUSES:
        raise LinkViolation(f"no refusal: {told}")
    made: Refused = kind(*arguments)
    made.index = index
    return made


_TOLD = codec.Record(
    lambda *told: told,
    *(codec.number(8, len(_REFUSALS) - 1), codec.Maybe(codec.U8), codec.U32, codec.Text(_REASON_BYTES, cut=True)),
)
_REFUSAL = codec.Mapped(_TOLD, _told, _refusal)
REFUSAL_AND_WHY = codec.Mapped(_TOLD, partial(_told, why=True), _refusal)
_REASON = codec.number(8, len(CLOSED_REASONS) - 1)
_ONE = (codec.U64,)  # just the connection's number

INBOX_TO_OPENER: codec.Table[FromInbox] = codec.Table(
    (1, Open, (codec.U64, codec.Kept(codec.Some(resources.RESOURCE, _RESOURCES, 1)))),
    (3, Closed, (codec.U64, _REASON)),
    (4, Drained, ()),
    (5, Shutdown, _ONE),
    (8, Pong, ()),
    (9, admin.Reload, _ONE),
)
OPENER_TO_INBOX: codec.Table[ToInbox] = codec.Table(
    *connections.ROWS,
    (3, Outcome, (codec.U64, codec.Maybe(_REFUSAL), codec.U32)),
    (4, Drain, ()),
    (7, Ping, ()),
    (13, admin.Reloaded, (codec.U64, codec.Bytes())),
)
LAUNCHER_TO_OPENER: codec.Table[FromLauncher] = codec.Table(
    (1, Policy, (codec.U32,)),
    (5, Stop, ()),
    (7, Ping, ()),
    (12, admin.Judged, (codec.U64, codec.FLAG)),
    (13, admin.Reloaded, (codec.U64, codec.Bytes())),
)
OPENER_TO_LAUNCHER: codec.Table[ToLauncher] = codec.Table(
    (4, Applied, (codec.U32,)),
    (6, Ready, ()),
    (8, Pong, ()),
    (9, StopAsked, ()),
    (10, WorkerStuck, ()),
    (12, admin.Judge, _ONE),
    (13, admin.ReloadAsked, _ONE),
)
READY = OPENER_TO_LAUNCHER.encode(Ready())  # whoever says it
PING, PONG = LAUNCHER_TO_OPENER.encode(Ping()), INBOX_TO_OPENER.encode(Pong())
DRAIN, WORKER_STUCK = OPENER_TO_INBOX.encode(Drain()), OPENER_TO_LAUNCHER.encode(WorkerStuck())
