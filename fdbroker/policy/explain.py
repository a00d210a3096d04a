"""Why a request is allowed or denied, what came near, and the smallest change that would allow it.

Runs in: command line. Nothing is opened, and no service need run: it answers for any subject and any path.
"""

from __future__ import annotations

import difflib
from typing import NamedTuple

from fdbroker.policy.compiled import Policy
from fdbroker.policy.decide import NOBODY, Decision, decide, view
from fdbroker.policy.paths import is_device_path, matcher
from fdbroker.terms import ACCESS_COVERS, DenyRule, Resource, Rule, Subject

_NEAR_MOST = 3
_ALIKE_LEAST = 0.6  # difflib's own idea of close


class Near(NamedTuple):
    """A rule that almost allows it: what is missing, and the change that would do."""

    rule: Rule
    missing: str
    change: str


class Explanation(NamedTuple):
    """`rules` allow it, or `denied_by` forbids it, or neither. `change` is the smallest one that would allow it."""

    allowed: bool
    rules: tuple[Rule, ...]
    denied_by: DenyRule | None
    reason: str
    near: tuple[Near, ...]
    change: str


def explain(policy: Policy, subject: Subject, resource: Resource, user: str) -> Explanation:
    """Judge as the opener would, and say why. `user` is the subject's name for the text."""
    decision = decide(view(policy, subject), resource)
    if decision.rules:
        first = decision.rules[0]
        conditions = [f"class {first.kernel_class}"] if first.kernel_class else []
        conditions += [f"number {first.device}"] if first.device else []
        condition = f", if the node has {' and '.join(conditions)}" if conditions else ""
        return Explanation(True, decision.rules, None, f"{first.where} ({first.source}) allows it{condition}", (), "")
    return _denied(policy, subject, resource, user, decision)


def _denied(policy: Policy, subject: Subject, resource: Resource, user: str, decision: Decision) -> Explanation:
    near = tuple(_near(policy, subject, resource, user)[:_NEAR_MOST])
    if subject.uid in NOBODY:
        reason = f"uid {subject.uid} stands for users that the kernel cannot map: nothing is for it"
        change = "run the program as a user of this machine, or in a user namespace whose ids are mapped"
    elif not is_device_path(resource.path):
        reason = "no rule can name this path: it is not the plain spelling of a path below /dev"
        change = "ask for the path without .., ., // or a slash at its end"
    elif decision.denied_by is not None:
        rule = decision.denied_by
        reason = f"{rule.where} denies it to {rule.source}, and a deny rule wins"
        change = f"narrow or remove the deny rule at {rule.where}"
        if not decide(view(policy._replace(deny=()), subject), resource).rules:
            change += f", and {near[0].change if near else _new_rule(resource, user)}"
    elif near:
        reason = f"no rule allows {resource.access} of this path to {user}"
        change = near[0].change
    else:
        reason = f"no rule names this path for {user}"
        change = _new_rule(resource, user)
    return Explanation(False, (), decision.denied_by, reason, near, change)


def _new_rule(resource: Resource, user: str) -> str:
    access = f", access: {resource.access}" if resource.access != "ro" else ""
    return f"add under users: `{user}: {{devices: [{{path: {resource.path}{access}}}]}}`"


def _near(policy: Policy, subject: Subject, resource: Resource, user: str) -> list[Near]:
    """The rules that almost allow it, nearest first."""
    mine = set(view(policy, subject).allow)
    found: list[tuple[float, Near]] = []
    for rule in policy.all_rules():
        named = matcher(rule.pattern).fullmatch(resource.path) is not None
        enough = resource.access in ACCESS_COVERS[rule.access]
        if named and rule in mine and not enough:
            wanted = "rw" if {rule.access, resource.access} == {"ro", "wo"} else resource.access
            change = f"at {rule.where} set `access: {wanted}`"
            found.append((0, Near(rule, f"it gives {rule.access} only", change)))
        elif named and rule not in mine and enough:
            kind, _, name = rule.source.partition(" ")
            if kind == "group":
                change = f"make {user} a member: `usermod -aG {name} {user}`, and log in again"
            else:
                change = _new_rule(resource, user)
            found.append((1, Near(rule, f"it is for {rule.source}", change)))
        elif named and rule not in mine:
            missing = f"it is for {rule.source}, and gives {rule.access} only"
            found.append((2, Near(rule, missing, _new_rule(resource, user))))
        elif rule in mine and not named:
            alike = difflib.SequenceMatcher(None, rule.pattern, resource.path).ratio()
            if alike >= _ALIKE_LEAST:
                missing = f"its path {rule.pattern} does not match"
                if rule.pattern.count("/") != resource.path.count("/") and "*" in rule.pattern:
                    missing += ": * never matches a slash"
                change = f"at {rule.where} widen the path, or add `- path: {resource.path}` beside it"
                found.append((4 - alike, Near(rule, missing, change)))
    return [near for _, near in sorted(found, key=lambda one: one[0])]
