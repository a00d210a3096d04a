"""What the opener tells the inbox of the policy: the topics, and what each connection may do with them.

Runs in: opener (writes), inbox (reads).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from fdbroker import limits
from fdbroker.terms import HANDLERS, TOPIC_VERBS, Topic, TopicUse, User
from fdbroker.wire import codec


class Sender(NamedTuple):
    """The identity that each message carries, by the kernel's word; `session` is logind's name for it, "" if none.

    `owner` is the user behind the uid, for whom all that is sent counts.
    """

    uid: int
    gid: int
    pid: int
    session: str
    owner: int


class Rights(NamedTuple):
    """What one connection may do: the positions of topics in the list of all, and its user's maxima."""

    send: frozenset[int] = frozenset()
    subscribe: frozenset[int] = frozenset()
    messages_per_second: int = 1
    burst: int = 1
    subscriptions: int = 0
    stored_messages: int = 0
    stored_bytes: int = 0
    records_per_second: int = 1
    record_burst: int = 1


class Connected(NamedTuple):
    """A new connection; a duplicate of its socket comes with the message. A session's name is cut at 32 bytes."""

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


@lru_cache(maxsize=_RIGHTS_KEPT)
def _bits(positions: frozenset[int]) -> bytes:
    return sum(1 << position for position in positions).to_bytes(limits.TOPICS // 8, "big")


@lru_cache(maxsize=_RIGHTS_KEPT)
def _positions(bits: bytes) -> frozenset[int]:
    number = int.from_bytes(bits, "big")
    return frozenset(position for position in range(limits.TOPICS) if number >> position & 1)


_TOPICS = codec.Mapped(codec.Bytes(limits.TOPICS // 8), _bits, _positions)  # which of them, as bits
_NAME = codec.Text(limits.NAME_BYTES)
_HANDLERS = codec.Some(codec.word(*HANDLERS), len(HANDLERS))
SENDER = codec.Record(Sender, codec.U32, codec.U32, codec.U32, codec.Text(32, cut=True), codec.U32)
RIGHTS = codec.Kept(codec.Record(Rights, _TOPICS, _TOPICS, *[codec.U32] * 7))
TOPIC = codec.Record(Topic, _NAME, _HANDLERS, codec.U32, codec.U64, codec.FLAG)
USER = codec.Record(User, codec.U32, _NAME, _TOPICS)
USE = codec.Record(TopicUse, codec.word(*TOPIC_VERBS), codec.Text(limits.NAME_BYTES, cut=True))
USERS_AT_ONCE = 256


def split_users(users: Sequence[User]) -> Iterator[Users]:
    """As many messages as it takes."""
    for first in range(0, len(users), USERS_AT_ONCE):
        yield Users(tuple(map(_by_number, users[first : first + USERS_AT_ONCE])))


def _by_number(user: User) -> User:
    """Without a name that is too long, or no text: cut, it could be another's."""
    name = user.name.encode(errors="replace").decode()
    return user._replace(name=name if len(name.encode()) <= limits.NAME_BYTES else "")
