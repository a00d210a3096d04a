"""Warnings of `policy check`: parts of a valid policy that their author probably did not mean.

Runs in: command line. Only the admin writes policies. Nothing is looked up here: a `Machine` knows how to look.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from fdbroker.errors import Finding
from fdbroker.policy import names
from fdbroker.policy.compiled import Policy
from fdbroker.policy.fit import PTS_MAJORS, Facts, misfit
from fdbroker.policy.globs import within
from fdbroker.policy.messages import messages
from fdbroker.policy.paths import matcher
from fdbroker.policy.rules import all_rules, rule_text
from fdbroker.terms import NOBODY, DenyRule, DeviceRule, NamespaceRule, Rule, SocketRule, Uplink
from fdbroker.topics import TopicRule


class Look(NamedTuple):
    """The node that a path below /dev leads to now.

    `names` are the path itself, and each name that a symlink on its way leads to; `facts` are those of the node at the
    end. Without `facts` there is no such node, or `trouble` says why the opener would not follow the path.
    """

    names: tuple[str, ...]
    facts: Facts | None
    trouble: str = ""


class Machine(NamedTuple):
    """Functions that look at a machine: the paths that a glob matches, the node of a path, the names in /run/netns.

    `bridge` says whether there is a bridge of that name, None if that cannot be told.

    `look` returns None for a node that the program has no right to see.
    `connect` says of a uid with these gids why it cannot connect to the service, "" if it can, None if nobody knows.
    """

    paths: Callable[[str], list[str]]
    look: Callable[[str], Look | None]
    namespaces: Callable[[], list[str]]
    connect: Callable[[int, frozenset[int]], str | None]
    bridge: Callable[[str], bool | None]


def warnings(policy: Policy, machine: Machine, idle: Sequence[Rule] = ()) -> list[Finding]:
    """All warnings about a policy that has no error; `idle` are its rules by the group database that nobody has."""
    found: dict[Finding, None] = {}
    netns = machine.namespaces()
    topics = [topic.name for topic in messages(policy).topics]
    looks: dict[str, Look | None] = {}
    for rule in (*all_rules(policy), *idle):
        match rule:
            case DeviceRule():
                about = _device(rule, machine, looks)
            case NamespaceRule(uplink=uplink) if uplink:
                about = _uplink(uplink, machine)
            case NamespaceRule(name=pattern) if pattern:
                about = _names(pattern, netns, "in /run/netns")
            case SocketRule(namespace=pattern):
                about = _names(pattern, netns, "in /run/netns")
            case TopicRule(pattern=pattern):
                about = _names(pattern, topics, "among the topics")
            case _:
                continue
        found.update((_finding(rule.where, what, hint), None) for what, hint in about)
    for deny in policy.deny:
        found.update((_finding(deny.where, *one), None) for one in _denied(deny, machine, netns))
    found.update((_finding(rule.where, f"nobody is in {rule.source} now"), None) for rule in idle)
    found.update((one, None) for one in _shadowed(policy))
    found.update((one, None) for one in _unconnected(policy, machine))
    return list(found)


def _finding(where: str, what: str, hint: str = "") -> Finding:
    file, _, line = where.rpartition(":")
    return Finding(file, int(line), 0, what, hint=hint)


def _names(pattern: str, known: Iterable[str], where: str) -> Iterator[tuple[str, str]]:
    if not any(map(matcher(pattern).fullmatch, known)):
        yield f"nothing {where} matches {pattern} now", ""


def _uplink(uplink: Uplink, machine: Machine) -> Iterator[tuple[str, str]]:
    if machine.bridge(uplink.bridge) is False:
        yield f"there is no bridge {uplink.bridge} now", ""


def _denied(deny: DenyRule, machine: Machine, netns: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The warnings about what a deny rule names: a name that is written wrong would leave the right one allowed."""
    hint = "it denies nothing now"
    for pattern in deny.patterns:
        if not machine.paths(pattern):
            yield f"nothing here matches {pattern} now", hint
    for rule in deny.rules:
        pattern = rule.namespace if isinstance(rule, SocketRule) else rule.name
        for what, _ in _names(pattern, netns, "in /run/netns") if pattern else ():
            yield what, hint


def _device(rule: DeviceRule, machine: Machine, looks: dict[str, Look | None]) -> Iterator[tuple[str, str]]:
    """The warnings about a device rule, each with a hint."""
    seen, hidden = [], False
    for path in machine.paths(rule.pattern):
        if path not in looks:
            looks[path] = machine.look(path)
        look = looks[path]
        if look is None:
            hidden = True
        else:
            seen.append(look)
    nodes = [look.facts for look in seen if look.facts]
    if set(rule.pattern.split("/")[2:]) == {"*"}:
        yield f"{rule.pattern} is every name there", "write a rule for each kind of node"
    if not rule.kernel_class and not rule.device:
        devices = [node for node in nodes if stat.S_ISCHR(node.kind)]
        hint = "add `class` or `device`" + (f": here {as_keys(devices[0])}" if devices else "")
        yield f"{rule.pattern} without `class` and `device` is whatever character device has that name", hint
    if rule.kernel_class and rule.pattern.startswith("/dev/pts/"):
        hint = f'write `device: "{PTS_MAJORS[0]}:*"` in its place'
        yield f"{rule.pattern} with a class is never granted: the kernel names none for /dev/pts", hint
    elif hidden:
        return
    elif not nodes:
        yield f"nothing here matches {rule.pattern} now", next((look.trouble for look in seen if look.trouble), "")
    elif all(stat.S_ISDIR(node.kind) for node in nodes):
        yield f"{rule.pattern} is a folder, which grants nothing", f"write {rule.pattern}/*"
    elif all(reasons := [misfit(rule, node) for node in nodes]):
        yield f"nothing here is what the rule says: {nodes[0].path}: {reasons[0]}", ""


def as_keys(node: Facts) -> str:
    """The keys of a rule for just this node."""
    keys = [f"class: {node.kernel_class}"] if node.kernel_class else []
    return ", ".join([*keys, f'device: "{node.number}"'])


def _shadowed(policy: Policy) -> Iterator[Finding]:
    """Warnings about rules without any effect: a deny rule for the same subjects covers all that the rule names."""
    subjects: list[tuple[tuple[Rule, ...], list[DenyRule]]] = []
    whole = [deny for deny in policy.deny if not deny.labels]
    for uid, rules in policy.by_uid.items():
        subjects.append((rules, [deny for deny in whole if deny.everyone or uid in deny.uids]))
    for gid, rules in policy.by_gid.items():
        subjects.append((rules, [deny for deny in whole if deny.everyone or gid in deny.gids]))
    subjects.append((policy.everyone, [deny for deny in whole if deny.everyone]))
    for rules, denies in subjects:
        for rule in rules:
            by = next((deny for deny in denies if _covers(deny, rule)), None)
            if by:
                yield _finding(rule.where, f"{rule_text(rule)} for {rule.source} is denied whole at {by.where}")


def _covers(deny: DenyRule, rule: Rule) -> bool:
    match rule:
        case DeviceRule(pattern):
            return any(within(pattern, outer) for outer in deny.patterns)
        case NamespaceRule(types):
            return any(
                set(types) <= set(outer.types)
                and (outer.of_caller, outer.create) == (rule.of_caller, rule.create)
                and within(rule.name, outer.name)
                for outer in deny.rules
                if isinstance(outer, NamespaceRule)
            )
        case SocketRule(pattern, families, kinds):
            return any(
                set(families) <= set(outer.families)
                and set(kinds) <= set(outer.types)
                and not outer.ports
                and within(pattern, outer.namespace)
                for outer in deny.rules
                if isinstance(outer, SocketRule)
            )


def _unconnected(policy: Policy, machine: Machine) -> Iterator[Finding]:
    """Warnings about users with rules, of their own or of a group by the databases, and without a way to connect."""
    first: dict[int, str] = {}
    said, listed = messages(policy), names.Listed()
    for uid, rules in (*policy.by_uid.items(), *said.by_uid.items()):
        if rules:
            first.setdefault(uid, rules[0].where)
    for gid, rules in (*policy.by_gid.items(), *said.by_gid.items()):
        for uid in listed.members_of(gid) if rules else ():
            first.setdefault(uid, rules[0].where)
    for uid, where in first.items():
        why = None if uid in NOBODY else machine.connect(uid, names.groups_of(uid)[1])
        if why:
            yield _finding(where, f"user {names.name_of(uid)} has rules and cannot connect: {why}")
