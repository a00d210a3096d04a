"""The nouns of messages, as plain values: what a policy says about topics, and who may do what with them.

Runs in: every process but the opener and what it starts, which have nothing to do with messages. Imports nothing of
ours. An attacker controls what a TopicUse holds; all else comes from the policy and from the machine's databases.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

TOPIC_VERBS = ("send", "subscribe")


class TopicUse(NamedTuple):
    """What a client wants with a topic: `verb` is one of TOPIC_VERBS, `topic` what the client wrote."""

    verb: str
    topic: str

    @property
    def access(self) -> str:
        """As for a device: to send is to write."""
        return "wo" if self.verb == "send" else "ro"

    @property
    def text(self) -> str:
        """The verb and the topic."""
        return f"{self.verb}:{self.topic}"


class TopicRule(NamedTuple):
    """An allow rule for messages: `verb` is one of TOPIC_VERBS, `pattern` a glob of topic names."""

    verb: str
    pattern: str
    source: str
    where: str
    labels: tuple[str, ...] = ()


class Topic(NamedTuple):
    """A topic of the policy: `deliver` says by which handlers, `maximum_bytes` how long a message may be.

    `keep_s`: for how many seconds the queue keeps a message. `everyone`: a rule lets all users subscribe.
    """

    name: str
    deliver: tuple[str, ...]
    maximum_bytes: int
    keep_s: int = 0
    everyone: bool = False


class User(NamedTuple):
    """A user that the policy, or the machine's databases, name: the positions of the topics it may subscribe to."""

    uid: int
    name: str
    topics: frozenset[int]


class Messages(NamedTuple):
    """All that a policy says about messages. `by_uid` and `by_gid` give the rules of a user or group."""

    topics: tuple[Topic, ...] = ()
    users: tuple[User, ...] = ()
    by_uid: Mapping[int, tuple[TopicRule, ...]] = {}
    by_gid: Mapping[int, tuple[TopicRule, ...]] = {}
    everyone: tuple[TopicRule, ...] = ()
