"""Allow or deny: the policy, a subject and what it asks for, and nothing else.

Runs in: opener, keeper, inbox, launcher, command line. An attacker controls what is asked. Nothing is opened, looked up
or remembered here.

Default deny, for root too. A deny rule that matches wins. Otherwise the union of the rules for everyone, for the
user and for all groups of the subject, as far as they are for its label.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple, TypeVar

from fdbroker.policy import labels
from fdbroker.policy.compiled import Policy
from fdbroker.policy.paths import Globs, is_device_path, is_namespace_name, matcher
from fdbroker.terms import (
    ACCESS_COVERS,
    NOBODY,
    OTHERS,
    DenyRule,
    Device,
    DeviceRule,
    Namespace,
    NamespaceRule,
    Resource,
    Rule,
    Socket,
    SocketRule,
    Subject,
)

_R = TypeVar("_R")


class _Said(NamedTuple):
    devices: tuple[DeviceRule, ...]
    others: tuple[NamespaceRule | SocketRule, ...]
    deny: tuple[DenyRule, ...]
    limits: dict[str, int]
    administrator: bool


class View(_Said):
    """What the policy says about one subject; made once for all about whom it says the same."""

    @cached_property
    def by_path(self) -> Globs[DeviceRule]:
        """The rules for devices."""
        return Globs((rule.pattern, rule) for rule in self.devices)

    @cached_property
    def denied_paths(self) -> Globs[DenyRule]:
        """The deny rules for devices."""
        return Globs((pattern, rule) for rule in self.deny for pattern in rule.patterns)


class Decision(NamedTuple):
    """`rules` are those that allow the request, none when it is denied. `denied_by` is the deny rule, if one matched.

    With several rules an opened node must fit one of them; of what has no node, the first one counts.
    """

    rules: tuple[Rule, ...]
    denied_by: DenyRule | None


_NOTHING = View((), (), (), {}, administrator=False)


def view(policy: Policy, subject: Subject) -> View:
    """What the policy says about `subject`. A uid that is unmapped or unset gets nothing, not even everyone's."""
    if subject.uid in NOBODY:
        return _NOTHING._replace(limits=policy.limits)
    deny = tuple(rule for rule in policy.deny if rule.names(subject) and labels.denying(rule.labels, subject.label))
    each = [rule for rule in rules_of(policy, subject) if labels.allowing(rule.labels, subject.label)]
    devices = tuple(rule for rule in each if isinstance(rule, DeviceRule))
    others = tuple(rule for rule in each if not isinstance(rule, DeviceRule))
    return View(devices, others, deny, limits_of(policy, subject), is_administrator(policy, subject))


def limits_of(policy: Policy, subject: Subject) -> dict[str, int]:
    """The limits of a subject: the user's own, else the greatest of its groups' and everyone's, else the policy's."""
    maxima = [policy.everyone_limits, *(policy.gid_limits[gid] for gid in _named(policy.gid_limits, subject))]
    limits = dict(policy.limits)
    for name in limits:
        overrides = [maximum[name] for maximum in maxima if name in maximum]
        if overrides:
            limits[name] = max(overrides)
    # the owner's: with other limits for its subordinate uids, a user could choose
    return limits | policy.uid_limits.get(subject.uid if subject.owner == OTHERS else subject.owner, {})


def rules_of(policy: Policy, subject: Subject) -> tuple[Rule, ...]:
    """The rules for a subject's user and groups, and everyone's, each once, whatever the label or the uid."""
    return rules_for(subject, policy.by_uid, policy.by_gid, policy.everyone)


def rules_for(
    subject: Subject, by_uid: Mapping[int, Sequence[_R]], by_gid: Mapping[int, Sequence[_R]], everyone: Sequence[_R]
) -> tuple[_R, ...]:
    """Of these rules, those for a subject's user and groups, and everyone's, each once."""
    rules = list(by_uid.get(subject.uid, ()))
    for gid in _named(by_gid, subject):
        rules += by_gid[gid]
    return tuple(dict.fromkeys((*rules, *everyone)))


def is_administrator(policy: Policy, subject: Subject) -> bool:
    """Uid 0 or one that `administrators:` names, and only from the broker's own user namespace."""
    if subject.foreign or subject.uid in NOBODY:
        return False
    return (
        subject.uid == 0 or subject.uid in policy.administrator_uids or bool(_named(policy.administrator_gids, subject))
    )


def _named(by: Iterable[int], subject: Subject) -> list[int]:
    """Which of these groups the subject is in. Walks the policy's groups: a subject can be in 65,536."""
    return sorted(gid for gid in by if gid in subject.gids and gid not in NOBODY)


def well_formed(resource: Resource) -> bool:
    """Whether a rule can name this at all: the plain spelling of a path, or a name that a file can have."""
    match resource:
        case Device(path):
            return is_device_path(path)
        case Namespace(type_, name):
            return not name or (type_ == "net" and is_namespace_name(name))
        case Socket(namespace):
            return is_namespace_name(namespace)


def covers(rule: Rule, resource: Resource) -> bool:
    """Whether an allow rule names this, with that access."""
    match rule, resource:
        case DeviceRule(), Device(path, access):
            return access in ACCESS_COVERS[rule.access] and matcher(rule.pattern).fullmatch(path) is not None
        case NamespaceRule(), Namespace(type_, name, process):
            if type_ not in rule.types:
                return False
            if name:
                return matcher(rule.name).fullmatch(name) is not None
            return rule.of_caller if process else rule.create
        case SocketRule(), Socket(namespace, family, type_, port):
            return (
                family in rule.families
                and type_ in rule.types
                and (not port or port in rule.ports)
                and matcher(rule.namespace).fullmatch(namespace) is not None
            )
    return False


def denying_rule(seen: View, resource: Resource) -> DenyRule | None:
    """The first deny rule that names this, with whatever access."""
    if isinstance(resource, Device):
        return next(iter(seen.denied_paths.matching(resource.path)), None)
    for rule in seen.deny:
        for one in rule.rules:
            asked = resource
            if isinstance(one, SocketRule) and isinstance(resource, Socket):
                if one.ports and resource.port not in one.ports:
                    continue
                asked = resource._replace(port=0)  # without ports it is for all sockets, bound or not
            if covers(one, asked):
                return rule
    return None


def decide(seen: View, resource: Resource) -> Decision:
    """Judge what is asked as text. No system call is made on a path that no rule names."""
    if not well_formed(resource):
        return Decision((), None)
    denied_by = denying_rule(seen, resource)
    if denied_by is not None:
        return Decision((), denied_by)
    rules: Iterable[Rule] = seen.by_path.matching(resource.path) if isinstance(resource, Device) else seen.others
    return Decision(tuple([rule for rule in rules if covers(rule, resource)]), None)
