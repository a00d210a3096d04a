"""The messages between opener and namespaces worker: each has one size, but for the text of a refusal.

Runs in: opener, namespaces worker. Either of them, taken over, controls what the other decodes here.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from fdbroker import limits
from fdbroker.errors import LinkViolation
from fdbroker.terms import FAMILIES, NAMESPACE_TYPES, PID_MAX, SOCKET_TYPES, Namespace, Socket, Uplink
from fdbroker.wire import link
from fdbroker.wire.pack import exact, flag, word

KNOWN = limits.USER_LIMITS["namespaces"].most


class Ask(NamedTuple):
    """Open or make `resource` for a client of user `uid`; its pidfd comes along, if the kernel gives one.

    `request` is a number of the opener's. For a new namespace: `known` are the inode numbers of those that were made
    for this user, `maximum` how many of them may be living, `uplink` how it is connected.
    """

    request: int
    uid: int
    resource: Namespace | Socket
    known: tuple[int, ...] = ()
    maximum: int = 0
    uplink: Uplink | None = None


class Made(NamedTuple):
    """The answer: its descriptor comes along, then the pidfd of the process whose it is, where there is one.

    `inode` is the namespace's number, 0 for a socket. `unusable` is an index of UNUSABLE, UNKNOWN
    when nobody could tell. `living` says of each of `known` whether it is.
    """

    request: int
    inode: int
    unusable: int
    living: tuple[bool, ...]


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

# type, request, uid, kind, namespace type, pid, family, socket type, port, name;
# how many are known, their inodes, the maximum; whether there is an uplink, isolated, bridge, address
_ASK = struct.Struct(f"!BQIBBIBBH255sB{KNOWN}IBBB15s64s")
_MADE = struct.Struct(f"!BQIBB{KNOWN}B")
_LOST = struct.Struct("!B")
_BY_NAME, _BY_PID, _NEW, _SOCKET = range(4)


def _padded(values: tuple[int, ...]) -> list[int]:
    return [*values, *([0] * (KNOWN - len(values)))]


def _text(value: bytes) -> str:
    text, _, padding = value.partition(b"\0")
    if padding.strip(b"\0"):
        raise LinkViolation("a text with something behind its end")
    try:
        return text.decode()
    except UnicodeDecodeError:
        raise LinkViolation("text that is not UTF-8") from None


def encode_ask(ask: Ask) -> bytes:
    """The client's pidfd goes with it. Raises ValueError or struct.error for what does not fit."""
    kind, type_, pid, family, socket_type, port, name = _NEW, 0, 0, 0, 0, 0, ""
    match ask.resource:
        case Namespace(of, name, pid):
            kind = _BY_NAME if name else _BY_PID if pid else _NEW
            type_ = NAMESPACE_TYPES.index(of)
        case Socket(name, of_family, of_type, port):
            kind, family, socket_type = _SOCKET, FAMILIES.index(of_family), SOCKET_TYPES.index(of_type)
    uplink = ask.uplink
    texts = [name.encode()] + ([uplink.bridge.encode(), uplink.address.encode()] if uplink else [b"", b""])
    if any(len(text) > most for text, most in zip(texts, (255, 15, 64), strict=True)):
        raise ValueError("a text that is too long")
    return _ASK.pack(
        *(1, ask.request, ask.uid, kind, type_, pid, family, socket_type, port, texts[0]),
        *(len(ask.known), *_padded(ask.known), ask.maximum),
        *(uplink is not None, uplink is not None and uplink.isolated, texts[1], texts[2]),
    )


def _decode_ask(data: bytes) -> Ask:
    values = list(exact(_ASK, data))
    _, request, uid, kind, type_, pid, family, socket_type, port, name = values[:10]
    count, known, maximum = values[10], values[11 : 11 + KNOWN], values[11 + KNOWN]
    linked, isolated, bridge, address = values[12 + KNOWN :]
    if count > KNOWN or maximum > KNOWN or pid > PID_MAX:
        raise LinkViolation("a number that is too large")
    text = _text(name)
    if (kind in (_BY_NAME, _SOCKET)) != bool(text) or (kind == _BY_PID) != bool(pid):
        raise LinkViolation(f"kind {kind} with name {text!r} and pid {pid}")
    resource: Namespace | Socket
    if kind == _SOCKET:
        resource = Socket(text, word(FAMILIES, family), word(SOCKET_TYPES, socket_type), port)
    elif kind in (_BY_NAME, _BY_PID, _NEW):
        resource = Namespace(word(NAMESPACE_TYPES, type_), text, pid)
    else:
        raise LinkViolation(f"a kind of value {kind}")
    uplink = Uplink(_text(bridge), _text(address), flag(isolated)) if flag(linked) else None
    return Ask(request, uid, resource, tuple(known[:count]), maximum, uplink)


def encode_made(made: Made) -> bytes:
    """The descriptors go with it."""
    living = [int(one) for one in made.living]
    return _MADE.pack(1, made.request, made.inode, made.unusable, len(living), *living, *([0] * (KNOWN - len(living))))


def _decode_made(data: bytes) -> Made:
    _, request, inode, unusable, count, *living = exact(_MADE, data)
    if count > KNOWN:
        raise LinkViolation("a number that is too large")
    if unusable != UNKNOWN and unusable >= len(UNUSABLE):
        raise LinkViolation(f"a reason of value {unusable}")
    return Made(request, inode, unusable, tuple(flag(one) for one in living[:count]))


LOST = _LOST.pack(4)


def _decode_lost(data: bytes) -> Lost:
    exact(_LOST, data)
    return Lost()


Answer = Made | Lost | link.Outcome


def decode_ask(data: bytes) -> Ask:
    """Opener to worker. Raises LinkViolation for all but an Ask."""
    if data[:1] != b"\1":
        raise LinkViolation("a message that is no question")
    return _decode_ask(data)


def decode_answer(data: bytes) -> Answer:
    """Worker to opener; a refusal is an Outcome with the request's number. Raises LinkViolation."""
    match data[:1]:
        case b"\1":
            return _decode_made(data)
        case b"\2":
            return link.decode_outcome(data)
        case b"\4":
            return _decode_lost(data)
    raise LinkViolation("an answer of unknown type")


def request_of(answer: Answer) -> int:
    """The number of the question that is answered; 0, which none has, for Lost."""
    match answer:
        case Made(request):
            return request
        case link.Outcome(request):
            return request
        case Lost():
            return 0
