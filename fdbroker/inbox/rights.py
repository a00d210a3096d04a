"""What a connection may do with messages, by the policy: decided here, for the inbox alone could break it.

Runs in: inbox. An attacker controls which of its user's uids, groups and labels connect.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fdbroker.policy.compiled import Policy
from fdbroker.policy.literals import is_literal
from fdbroker.policy.messages import MessageView, covers, message_view, messages
from fdbroker.policy.paths import literal
from fdbroker.policy.views import Views
from fdbroker.topics import TOPIC_VERBS, Topic, TopicUse


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
    """What one connection may do: the names of the topics, and its user's maxima."""

    send: frozenset[str] = frozenset()
    subscribe: frozenset[str] = frozenset()
    messages_per_second: int = 1
    burst: int = 1
    subscriptions: int = 0
    stored_messages: int = 0
    stored_bytes: int = 0
    records_per_second: int = 1
    record_burst: int = 1


def rights_by(policy: Policy) -> Views[Rights]:
    """The rights of each subject."""
    topics = messages(policy).topics
    return Views(policy, message_view, lambda seen: message_rights(seen, topics))


def message_rights(seen: MessageView, topics: Sequence[Topic]) -> Rights:
    """What the policy allows."""
    named = {topic.name: None for topic in topics}
    allowed: dict[str, set[str]] = {verb: set() for verb in TOPIC_VERBS}
    for rule in seen.rules:
        # most rules name one topic: to judge each topic by each of them took a fifth of a second for 256
        names = named.keys() & {literal(rule.pattern)} if is_literal(rule.pattern) else named
        allowed[rule.verb].update(name for name in names if covers(rule, TopicUse(rule.verb, name)))
    maxima = seen.limits
    return Rights(
        *(frozenset(allowed["send"]), frozenset(allowed["subscribe"])),
        *(maxima["requests_per_second"], maxima["burst"]),
        *(maxima["subscriptions"], maxima["stored_messages"], maxima["stored_bytes"]),
        *(maxima["records_per_second"], maxima["record_burst"]),
    )
