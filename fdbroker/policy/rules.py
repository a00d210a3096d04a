"""The rules of a whole policy, for whoever looks at it as a whole.

Runs in: launcher, command line. No attacker controls anything here.
"""

from __future__ import annotations

from collections.abc import Iterable

from fdbroker.policy.compiled import Policy
from fdbroker.terms import DeviceRule, NamespaceRule, Rule, SocketRule, TopicRule


def all_rules(policy: Policy) -> Iterable[Rule]:
    """Every allow rule of a policy, each once."""
    seen = set()
    for rules in (policy.everyone, *policy.by_uid.values(), *policy.by_gid.values()):
        for rule in rules:
            if rule not in seen:
                seen.add(rule)
                yield rule


def rule_text(rule: Rule) -> str:
    """What an allow rule names, in a few words."""
    match rule:
        case DeviceRule(pattern):
            return pattern
        case NamespaceRule(types, name):
            return f"{','.join(types)}:{name or ('new' if rule.create else 'pid:*')}"
        case SocketRule(namespace):
            return f"socket:net:{namespace}"
        case TopicRule(verb, pattern):
            return f"{verb}:{pattern}"
