"""Allow or deny: the policy, a subject and an asked path, and nothing else.

Runs in: opener, command line. An attacker controls the path. Nothing is opened, looked up or remembered here.

Default deny, for root too. A deny rule that matches wins. Otherwise the union of the rules for everyone, for the
user and for all groups of the subject.
"""

from __future__ import annotations

from typing import NamedTuple

from fdbroker.policy.compiled import Policy
from fdbroker.policy.paths import is_device_path, matcher
from fdbroker.terms import ACCESS_COVERS, INVALID_ID, UNMAPPED_ID, DenyRule, Resource, Rule, Subject

# Ids that stand for "not known who": no rule is for them.
NOBODY = frozenset({UNMAPPED_ID, INVALID_ID})


class View(NamedTuple):
    """What the policy says about one subject; made once per connection and policy."""

    allow: tuple[Rule, ...]
    deny: tuple[DenyRule, ...]
    limits: dict[str, int]
    administrator: bool


class Decision(NamedTuple):
    """`rules` are those that allow the request, none when it is denied. `denied_by` is the deny rule, if one matched.

    With several rules the opened node must fit one of them.
    """

    rules: tuple[Rule, ...]
    denied_by: DenyRule | None


_NOTHING = View((), (), {}, administrator=False)


def view(policy: Policy, subject: Subject) -> View:
    """What the policy says about `subject`. A uid that is unmapped or unset gets nothing, not even everyone's."""
    if subject.uid in NOBODY:
        return _NOTHING._replace(limits=policy.limits)
    gids = subject.gids - NOBODY
    rules = list(policy.by_uid.get(subject.uid, ()))
    maxima = [policy.everyone_limits]
    for gid in sorted(gids):
        rules += policy.by_gid.get(gid, ())
        maxima.append(policy.gid_limits.get(gid, {}))
    rules += policy.everyone
    deny = tuple(
        rule for rule in policy.deny if rule.everyone or subject.uid in rule.uids or not gids.isdisjoint(rule.gids)
    )
    limits = dict(policy.limits)
    for name in limits:
        overrides = [maximum[name] for maximum in maxima if name in maximum]
        if overrides:
            limits[name] = max(overrides)
    limits |= policy.uid_limits.get(subject.uid, {})
    return View(tuple(dict.fromkeys(rules)), deny, limits, is_administrator(policy, subject))


def is_administrator(policy: Policy, subject: Subject) -> bool:
    """Uid 0 or one that `administrators:` names, and only from the broker's own user namespace."""
    if subject.foreign or subject.uid in NOBODY:
        return False
    return (
        subject.uid == 0
        or subject.uid in policy.administrator_uids
        or not (subject.gids - NOBODY).isdisjoint(policy.administrator_gids)
    )


def denying_rule(seen: View, path: str) -> DenyRule | None:
    """The first deny rule that names `path`."""
    for rule in seen.deny:
        for pattern in rule.patterns:
            if matcher(pattern).fullmatch(path):
                return rule
    return None


def decide(seen: View, resource: Resource) -> Decision:
    """Judge the asked path as text. No system call is made on a path that no rule names."""
    path = resource.path
    if not is_device_path(path):
        return Decision((), None)
    denied_by = denying_rule(seen, path)
    if denied_by is not None:
        return Decision((), denied_by)
    return Decision(
        tuple(
            rule
            for rule in seen.allow
            if resource.access in ACCESS_COVERS[rule.access] and matcher(rule.pattern).fullmatch(path)
        ),
        None,
    )
