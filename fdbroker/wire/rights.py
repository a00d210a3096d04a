"""What the opener tells the inbox of the policy: the topics, and what each connection may do with them.

Runs in: opener (writes), inbox (reads).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from fdbroker import limits
from fdbroker.errors import LinkViolation
from fdbroker.terms import HANDLERS, TOPIC_VERBS, Topic, TopicUse, User
from fdbroker.wire.pack import Cursor, exact, word

_BITS = limits.TOPICS // 8
_TEXT_BYTES = limits.NAME_BYTES


class Sender(NamedTuple):
    """Who sends, as each message carries it. All of it is the kernel's word; `session` is logind's, "" if none."""

    uid: int
    gid: int
    pid: int
    session: str


class Rights(NamedTuple):
    """What one connection may do: the positions of topics in the list of all, and its user's maxima."""

    send: frozenset[int] = frozenset()
    subscribe: frozenset[int] = frozenset()
    messages_per_second: int = 1
    burst: int = 1
    subscriptions: int = 0
    stored_messages: int = 0
    stored_bytes: int = 0


class Connected(NamedTuple):
    """A new connection; a duplicate of its socket comes with the message."""

    connection: int
    sender: Sender
    rights: Rights


class RightsChanged(NamedTuple):
    """Another policy is in force; the topics come before."""

    connection: int
    rights: Rights


class Topics(NamedTuple):
    """All topics of the policy, in force at once with the `Users` that came before."""

    topics: tuple[Topic, ...]


class Users(NamedTuple):
    """Some of the users that may subscribe to the topics of the next `Topics`."""

    users: tuple[User, ...]


class DeniedUse(NamedTuple):
    """The client of `connection` was not allowed to use a topic: for the record. `use` may be cut."""

    connection: int
    use: TopicUse


_RIGHTS_KEPT = 256  # most connections have the rights of some other
_RIGHTS = struct.Struct(f"!{_BITS}s{_BITS}s5I")
_CONNECTED = struct.Struct(f"!BQIII32s{_RIGHTS.size}s")
_CHANGED = struct.Struct(f"!BQ{_RIGHTS.size}s")
_COUNT = struct.Struct("!BH")  # how many, then for each:
_TOPIC = struct.Struct("!B?IQB")  # handlers as bits, for everyone, maximum, keep, length of name; name
_USER = struct.Struct(f"!I{_BITS}sB")  # uid, topics, length of name; name
_USERS_PER_MESSAGE = 256
_DENIED_USE = struct.Struct("!BQB")  # verb; then the topic


@lru_cache(maxsize=_RIGHTS_KEPT)
def _bits(positions: frozenset[int]) -> bytes:
    return sum(1 << position for position in positions).to_bytes(_BITS, "big")


@lru_cache(maxsize=_RIGHTS_KEPT)
def _positions(bits: bytes) -> frozenset[int]:
    number = int.from_bytes(bits, "big")
    return frozenset(position for position in range(limits.TOPICS) if number >> position & 1)


def _pack(rights: Rights) -> bytes:
    return _RIGHTS.pack(_bits(rights.send), _bits(rights.subscribe), *rights[2:])


def _unpack(data: bytes) -> Rights:
    send, subscribe, *maxima = _RIGHTS.unpack(data)
    return Rights(_positions(send), _positions(subscribe), *maxima)


def encode_connected(connection: int, sender: Sender, rights: Rights) -> bytes:
    """The socket goes with it as the only descriptor. A session's name is cut at 32 bytes."""
    session = sender.session.encode()[:32]
    return _CONNECTED.pack(1, connection, sender.uid, sender.gid, sender.pid, session, _pack(rights))


def decode_connected(data: bytes) -> Connected:
    """Raises LinkViolation."""
    _, connection, uid, gid, pid, session, rights = exact(_CONNECTED, data)
    text = session.rstrip(b"\0").decode(errors="replace")
    return Connected(connection, Sender(uid, gid, pid, text), _unpack(rights))


def encode_changed(connection: int, rights: Rights) -> bytes:
    """Opener to inbox."""
    return _CHANGED.pack(5, connection, _pack(rights))


def decode_changed(data: bytes) -> RightsChanged:
    """Raises LinkViolation."""
    _, connection, rights = exact(_CHANGED, data)
    return RightsChanged(connection, _unpack(rights))


def encode_topics(topics: Sequence[Topic]) -> bytes:
    """Opener to inbox."""
    parts = [_COUNT.pack(6, len(topics))]
    for topic in topics:
        bits = sum(1 << HANDLERS.index(handler) for handler in topic.deliver)
        name = topic.name.encode()
        parts += (_TOPIC.pack(bits, topic.everyone, topic.maximum_bytes, topic.keep_s, len(name)), name)
    return b"".join(parts)


def decode_topics(data: bytes) -> Topics:
    """Raises LinkViolation."""
    cursor = Cursor(data)
    _, count = cursor.fields(_COUNT)
    topics = []
    for _ in range(count):
        bits, everyone, maximum, keep_s, length = cursor.fields(_TOPIC)
        deliver = tuple(handler for number, handler in enumerate(HANDLERS) if bits >> number & 1)
        topics.append(Topic(cursor.text(length), deliver, maximum, keep_s, bool(everyone)))
    cursor.end()
    return Topics(tuple(topics))


def encode_users(users: Sequence[User]) -> Iterator[bytes]:
    """Opener to inbox: as many messages as it takes."""
    for first in range(0, len(users), _USERS_PER_MESSAGE):
        some = users[first : first + _USERS_PER_MESSAGE]
        parts = [_COUNT.pack(8, len(some))]
        for user in some:
            name = user.name.encode(errors="replace")
            if len(name) > _TEXT_BYTES:
                name = b""  # then by number only: cut, it could be another's
            parts += (_USER.pack(user.uid, _bits(user.topics), len(name)), name)
        yield b"".join(parts)


def decode_users(data: bytes) -> Users:
    """Raises LinkViolation."""
    cursor = Cursor(data)
    _, count = cursor.fields(_COUNT)
    users = []
    for _ in range(count):
        uid, bits, length = cursor.fields(_USER)
        users.append(User(uid, cursor.text(length), _positions(bits)))
    cursor.end()
    return Users(tuple(users))


def encode_denied_use(connection: int, use: TopicUse) -> bytes:
    """Inbox to opener; a long topic is cut."""
    head = _DENIED_USE.pack(6, connection, TOPIC_VERBS.index(use.verb))
    return head + use.topic.encode(errors="replace")[:_TEXT_BYTES]


def decode_denied_use(data: bytes) -> DeniedUse:
    """Raises LinkViolation."""
    cursor = Cursor(data)
    _, connection, verb = cursor.fields(_DENIED_USE)
    if len(data) - _DENIED_USE.size > _TEXT_BYTES:
        raise LinkViolation("a topic that is too long")
    text = data[_DENIED_USE.size :].decode(errors="replace")
    return DeniedUse(connection, TopicUse(word(TOPIC_VERBS, verb), text))
