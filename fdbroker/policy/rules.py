"""The rules of a whole policy, for whoever looks at it as a whole.

Runs in: launcher, command line. No attacker controls anything here.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

from fdbroker.policy.compiled import Policy
from fdbroker.policy.messages import AnyRule, messages
from fdbroker.terms import DeviceRule, NamespaceRule, Rule, SocketRule
from fdbroker.topics import TopicRule


def resource_rules(policy: Policy) -> Iterable[Rule]:
    """Every allow rule of a policy but those for topics, each once."""
    return dict.fromkeys(chain(policy.everyone, *policy.by_uid.values(), *policy.by_gid.values()))


def all_rules(policy: Policy) -> Iterable[AnyRule]:
    """Every allow rule of a policy, each once."""
    said = messages(policy)
    return dict.fromkeys(chain(resource_rules(policy), said.everyone, *said.by_uid.values(), *said.by_gid.values()))


def rule_text(rule: AnyRule) -> str:
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
