"""What the opener keeps of each view of the policy: what the inbox judges by, and what was decided by it lately.

Runs in: opener. An attacker controls which of its user's uids, groups and labels connect, and how many of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fdbroker.policy.compiled import Policy
from fdbroker.policy.decide import View, covers
from fdbroker.policy.paths import is_literal, literal
from fdbroker.policy.views import Views
from fdbroker.terms import TOPIC_VERBS, Resource, Rule, Topic, TopicUse
from fdbroker.wire.rights import Rights


class Seen(NamedTuple):
    """What a subject may do: all of it, what of that the inbox judges, and what was decided lately (`authorize.py`)."""

    view: View
    rights: Rights
    decided: dict[Resource, tuple[Rule, ...]]


def views(policy: Policy) -> Views[Seen]:
    """Those of one policy, as the opener judges by them."""
    return Views(policy, lambda made: Seen(made, message_rights(made, policy.topics), {}))


def message_rights(seen: View, topics: Sequence[Topic]) -> Rights:
    """What a connection may do with messages; the inbox judges by it, for it alone could break it."""
    positions = {topic.name: index for index, topic in enumerate(topics)}
    allowed: dict[str, set[int]] = {verb: set() for verb in TOPIC_VERBS}
    for rule in seen.topics:
        # most rules name one topic: to judge each topic by each of them took a fifth of a second for 256
        names = positions.keys() & {literal(rule.pattern)} if is_literal(rule.pattern) else positions
        allowed[rule.verb].update(positions[name] for name in names if covers(rule, TopicUse(rule.verb, name)))
    maxima = seen.limits
    return Rights(
        *(frozenset(allowed["send"]), frozenset(allowed["subscribe"])),
        *(maxima["requests_per_second"], maxima["burst"]),
        *(maxima["subscriptions"], maxima["stored_messages"], maxima["stored_bytes"]),
        *(maxima["records_per_second"], maxima["record_burst"]),
    )
