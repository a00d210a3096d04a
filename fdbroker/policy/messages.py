"""What a policy says about messages, and what it allows a subject to do with a topic.

Runs in: inbox, launcher, command line. An attacker controls what is asked, and which of its user's uids, groups and
labels connect. The opener leaves this part of a policy as it travels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from fdbroker.policy import compiled, decide, labels
from fdbroker.policy.compiled import Policy
from fdbroker.policy.paths import is_namespace_name, matcher
from fdbroker.terms import NOBODY, DenyRule, Resource, Rule, Subject
from fdbroker.topics import Messages, Topic, TopicRule, TopicUse, User

Asked = Resource | TopicUse
AnyRule = Rule | TopicRule


class Verdict(NamedTuple):
    """As decide.Decision, of topics too."""

    rules: tuple[AnyRule, ...]
    denied_by: DenyRule | None = None


class MessageView(NamedTuple):
    """What the policy says about one subject's messages."""

    rules: tuple[TopicRule, ...]
    limits: dict[str, int]


def messages(policy: Policy) -> Messages:
    """What a policy says about messages, be it as it was compiled or as it travelled. Raises as `from_bytes` does."""
    return policy.messages if isinstance(policy.messages, Messages) else _messages(*policy.messages)


def from_bytes(data: bytes) -> Policy:
    """A whole policy, the part about messages too. Raises ValueError, TypeError or LookupError."""
    policy = compiled.from_bytes(data)
    return policy._replace(messages=messages(policy))


def _messages(topics: Any, users: Any, by_uid: Any, by_gid: Any, everyone: Any) -> Messages:
    def rules(items: Any) -> tuple[TopicRule, ...]:
        return tuple(TopicRule(verb, pattern, source, where, tuple(of)) for verb, pattern, source, where, of in items)

    return Messages(
        tuple(Topic(name, tuple(deliver), *rest) for name, deliver, *rest in topics),
        tuple(User(uid, name, frozenset(positions)) for uid, name, positions in users),
        {int(uid): rules(items) for uid, items in by_uid.items()},
        {int(gid): rules(items) for gid, items in by_gid.items()},
        rules(everyone),
    )


def topic_rules(policy: Policy, subject: Subject) -> tuple[TopicRule, ...]:
    """The rules for a subject's user and groups, and everyone's, each once, whatever the label or the uid."""
    said = messages(policy)
    return decide.rules_for(subject, said.by_uid, said.by_gid, said.everyone)


def message_view(policy: Policy, subject: Subject) -> MessageView:
    """What the policy says about a subject's messages. A uid that is unmapped or unset gets nothing."""
    if subject.uid in NOBODY:
        return MessageView((), policy.limits)
    rules = [rule for rule in topic_rules(policy, subject) if labels.allowing(rule.labels, subject.label)]
    return MessageView(tuple(rules), decide.limits_of(policy, subject))


def names(asked: Asked) -> bool:
    """Whether a rule can name this at all."""
    return is_namespace_name(asked.topic) if isinstance(asked, TopicUse) else decide.well_formed(asked)


def covers(rule: AnyRule, asked: Asked) -> bool:
    """Whether an allow rule names this, with that access."""
    if isinstance(rule, TopicRule):
        return isinstance(asked, TopicUse) and _covers(rule, asked)
    return not isinstance(asked, TopicUse) and decide.covers(rule, asked)


def _covers(rule: TopicRule, use: TopicUse) -> bool:
    return use.verb == rule.verb and matcher(rule.pattern).fullmatch(use.topic) is not None


def judge(policy: Policy, subject: Subject, asked: Asked) -> Verdict:
    """Judge what is asked as text, as the opener does, or the inbox if it is a topic."""
    if not isinstance(asked, TopicUse):
        return Verdict(*decide.decide(decide.view(policy, subject), asked))
    rules = message_view(policy, subject).rules if names(asked) else ()
    return Verdict(tuple([rule for rule in rules if _covers(rule, asked)]))
