"""What the policy says about each subject, made once for all connections about which it says the same.

Runs in: opener. An attacker controls which of its user's uids, groups and labels connect, and how many of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fdbroker.policy.compiled import Policy
from fdbroker.policy.decide import View, covers, view
from fdbroker.policy.paths import is_literal, literal
from fdbroker.terms import TOPIC_VERBS, Resource, Rule, Subject, Topic, TopicUse
from fdbroker.wire.rights import Rights

# When there are more, all are made anew. A guess: as many as there are accounts.
_KEPT = 1024


class Seen(NamedTuple):
    """What a subject may do: all of it, what of that the inbox judges, and what was decided lately (`authorize.py`)."""

    view: View
    rights: Rights
    decided: dict[Resource, tuple[Rule, ...]]


class Views:
    """Those of one policy. Of a subject's groups only those that the policy names make a difference."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        named = {*policy.by_gid, *policy.gid_limits, *policy.administrator_gids}
        self._gids = tuple(sorted(named.union(*(rule.gids for rule in policy.deny))))
        self._by_subject: dict[tuple[object, ...], Seen] = {}
        self._by_view: dict[tuple[object, ...], Seen] = {}

    def of(self, subject: Subject) -> Seen:
        """For a subject; the same object for all about whom the policy says the same."""
        groups = tuple([gid for gid in self._gids if gid in subject.gids])
        who = (subject.uid, subject.owner, subject.foreign, subject.label, groups)
        seen = self._by_subject.get(who)
        if seen is None:
            if len(self._by_subject) >= _KEPT:
                self._by_subject.clear()
                self._by_view.clear()
            made = view(self.policy, subject)
            # every field of it: two that differ in one that comes later must not be one either
            what = tuple([tuple(one.items()) if isinstance(one, dict) else one for one in made])
            seen = self._by_view.get(what)
            if seen is None:
                seen = self._by_view[what] = Seen(made, message_rights(made, self.policy.topics), {})
            self._by_subject[who] = seen
        return seen


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
