"""Why a request is allowed or denied, what came near, and the smallest change that would allow it.

Runs in: command line. Nothing is opened, and no service need run: it answers for any subject and any path. The caller
may pass the node that is at the path now.

Suggested rules are YAML with globs, so their backslashes are doubled already.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from fdbroker.policy import names
from fdbroker.policy.compile import CLASS_ACCESS
from fdbroker.policy.compiled import Policy
from fdbroker.policy.decide import View, denying_rule, rules_of, view
from fdbroker.policy.fit import Facts, dangerous_node, is_device, misfit
from fdbroker.policy.globs import as_glob, dangerous_name
from fdbroker.policy.lint import Look, as_keys
from fdbroker.policy.load import Node
from fdbroker.policy.messages import AnyRule, Asked, Verdict, covers, judge, message_view, messages, topic_rules
from fdbroker.policy.messages import names as can_be_named
from fdbroker.policy.paths import matcher
from fdbroker.policy.rules import all_rules
from fdbroker.terms import (
    ACCESS_COVERS,
    NOBODY,
    OWN_TERMINAL,
    DenyRule,
    Device,
    DeviceRule,
    Namespace,
    NamespaceRule,
    Rule,
    Socket,
    SocketRule,
    Subject,
)
from fdbroker.topics import TopicUse

_KINDS = {Device: "path", Namespace: "namespace", Socket: "socket", TopicUse: "topic"}
_NEAR_MOST = 3
_ALIKE_LEAST = 0.6  # difflib's own idea of close
_MEANT_LEAST = 0.9  # of whole paths, whose beginning is always the same
_NO_PATH = 4  # as far as a rule whose path is another


class Near(NamedTuple):
    """A rule that almost allows it: what is missing, and the change that would do."""

    rule: AnyRule
    missing: str
    change: str


class Explanation(NamedTuple):
    """`rules` allow it, or `denied_by` forbids it, or neither. `change` is the smallest one that would allow it.

    `now` describes the node that is there now, "" when it is not known. `refused` is the reason for which the opener
    would refuse that node although a rule allows the path: "" for none, None without a known node.
    """

    allowed: bool
    rules: tuple[AnyRule, ...]
    denied_by: DenyRule | None
    reason: str
    near: tuple[Near, ...]
    change: str
    now: str = ""
    refused: str | None = None


def explain(
    policy: Policy,
    subject: Subject,
    resource: Asked,
    user: str,
    look: Look | None = None,
    *,
    documents: Sequence[Node] = (),
    idle: Sequence[Rule] = (),
    nodes: Collection[str] = (),
) -> Explanation:
    """Judge as the opener would, and say why. `user` is the subject's name, or its number, in the text.

    `look` describes the node that a device's path leads to now, None when it is not known. `documents` are the trees
    of the policy's files: what is to be added goes to what stands there. `idle` are rules that nobody has now. `nodes`
    are paths of nodes that are there now, for one that is not.
    """
    seen = view(policy, subject)
    decision = judge(policy, subject, resource)
    node = look.facts if look else None
    if isinstance(resource, TopicUse) and not _has_topic(policy, resource):
        return _denied(policy, subject, resource, user, Verdict(()), None, documents, idle)
    absent = _absent(resource, nodes) if look and not node and not look.trouble else ""
    if not decision.rules:
        said = _denied(policy, subject, resource, user, decision, node, documents, idle)
        return said._replace(now=said.now or absent)
    first = decision.rules[0]
    reason = f"{first.where} ({first.source}{_with_label(first)}) allows it{_condition(first)}"
    explained = Explanation(True, decision.rules, None, reason, (), "")
    if look is None:
        return explained
    refused = _refused(seen, decision, look)
    if node is None and not refused:
        return explained._replace(now=absent)
    now = f"now {_there(node)}: would be refused: {refused}" if refused else f"now {_there(node)}, as the rule says"
    return explained._replace(now=now, refused=refused)


def _has_topic(policy: Policy, use: TopicUse) -> bool:
    return any(topic.name == use.topic for topic in messages(policy).topics)


def _absent(resource: Asked, nodes: Collection[str]) -> str:
    """That there is no such node, and which one may have been meant."""
    meant = difflib.get_close_matches(resource.text, nodes, 1, _MEANT_LEAST)
    return "now it is not there" + (f": did you mean {meant[0]}?" if meant else "")


def _there(node: Facts | None) -> str:
    """A description of the node in a few words."""
    if node is None:
        return "it is a link"
    if not is_device(node):
        return "it is no device"
    return f"it is {node.number}, class {node.kernel_class or 'unknown'}"


def _refused(seen: View, decision: Verdict, look: Look) -> str:
    """The reason for which the opener would refuse the node that a path leads to now, or ""."""
    by = next((rule for name in look.names[1:] if (rule := denying_rule(seen, Device(name, "ro")))), None)
    if by is not None:
        return f"it leads to what {by.where} denies to {by.source}"
    if look.facts is None:
        return look.trouble
    reasons = [misfit(rule, look.facts) for rule in decision.rules if isinstance(rule, DeviceRule)]
    return "" if "" in reasons else reasons[0]


def _with_label(rule: AnyRule) -> str:
    return f" with the label {' or '.join(rule.labels)}" if rule.labels else ""


def _condition(rule: AnyRule) -> str:
    """What else must hold when it is opened."""
    match rule:
        case DeviceRule():
            conditions = [f"class {rule.kernel_class}"] if rule.kernel_class else []
            conditions += [f"number {rule.device}"] if rule.device else []
            return f", if the node has {' and '.join(conditions)}" if conditions else ""
        case NamespaceRule(of_caller=True):
            return ", if the process is the caller's own"
        case NamespaceRule(create=True, uplink=uplink):
            connected = f", connected to {uplink.bridge} with an address of {uplink.address}" if uplink else ""
            return f", and it is owned by the caller's user namespace{connected}"
    return ""


def _denied(
    policy: Policy,
    subject: Subject,
    resource: Asked,
    user: str,
    decision: Verdict,
    node: Facts | None,
    documents: Sequence[Node],
    idle: Sequence[Rule],
) -> Explanation:
    new_rule = _new_rule(subject, resource, user, node, documents)
    near = (
        ()
        if subject.uid in NOBODY
        else tuple(_near(policy, idle, subject, resource, user, node, new_rule)[:_NEAR_MOST])
    )
    if subject.uid in NOBODY:
        reason = f"uid {subject.uid} stands for users that the kernel cannot map: nothing is for it"
        change = "run the program as a user of this machine, or in a user namespace whose ids are mapped"
    elif not can_be_named(resource) and isinstance(resource, Device):
        reason = "no rule can name this path: it is not the plain spelling of a path below /dev"
        plain = resource.path.isprintable()
        change = f"ask for the path without {'.., ., // or a slash at its end' if plain else 'what cannot be printed'}"
    elif isinstance(resource, TopicUse) and not _has_topic(policy, resource):
        reason = "the policy has no such topic"
        change = "declare it under `topics:`, and allow it"
    elif not can_be_named(resource):
        reason = "no rule can name this: it is not the name that a file in /run/netns can have"
        change = "ask for a name that `ip netns list` shows"
    elif decision.denied_by is not None:
        rule = decision.denied_by
        unknown = ", which it could be, for its label is not known" if rule.labels and not subject.label else ""
        reason = f"{rule.where} denies it to {rule.source}{unknown}, and a deny rule wins"
        change = f"narrow or remove the deny rule at {rule.where}"
        if not judge(policy._replace(deny=()), subject, resource).rules:
            change += f", and {near[0].change if near else new_rule}"
    elif (never := _never(resource, node)) is not None:
        reason, change = never
        near = ()
    elif near:
        access = f"{resource.access} of " if isinstance(resource, Device) else ""
        reason = f"no rule allows {access}this {_KINDS[type(resource)]} to {user}"
        change = near[0].change
    else:
        reason = f"no rule names this {_KINDS[type(resource)]} for {user}"
        change = new_rule
    now = f"now {_there(node)}" if node else ""
    return Explanation(False, (), decision.denied_by, reason, near, change, now)


def _never(resource: Asked, node: Facts | None) -> tuple[str, str] | None:
    """The reason for which no rule can allow the node that is there now, and what to do instead."""
    if not isinstance(resource, Device) or node is None or not is_device(node):
        return None
    if node.number == OWN_TERMINAL:
        return f"it is {OWN_TERMINAL}, the terminal of the process that opens it", "the program opens its own by itself"
    most = CLASS_ACCESS.get(node.kernel_class, "rw")
    if resource.access in ACCESS_COVERS[most]:
        return None
    return f"a device of class {node.kernel_class} can be opened {most} only", f"ask for {most}"


def _new_rule(subject: Subject, resource: Asked, user: str, node: Facts | None, documents: Sequence[Node]) -> str:
    key, text = _as_rule(resource, node)
    entries = list(_entries(subject, documents))
    for place, entry in entries:
        if key in entry.value:
            rules = entry.value[key]
            return f"add to `{key}` of users.{place.value} at {rules.file}:{rules.line}: `- {text}`"
    for place, _ in entries:  # a second one would be the same key again
        return f"add to users.{place.value} at {place.file}:{place.line}: `{key}: [{text}]`"
    return f"add under users: `{_quoted(user)}: {{{key}: [{text}]}}`"


def _entries(subject: Subject, documents: Iterable[Node]) -> Iterable[tuple[Node, Node]]:
    """The entries of `users:` for the subject, by name or by number: the key of each and what stands there."""
    for document in documents:
        for name, (place, entry) in (document.get("users") or {}).items():
            if names.uid_of(name) == subject.uid:
                yield place, entry


def _as_rule(resource: Asked, node: Facts | None) -> tuple[str, str]:
    """The narrowest rule for the resource: its key, and its item of the list. `node` is the one that is there now."""
    match resource:
        case Device(path, access):
            glob = as_glob(path)
            keys = [f"path: {_quoted(glob)}"]
            keys += [f"access: {access}"] if access != "ro" else []
            known = node if node and is_device(node) else None
            keys += [as_keys(known)] if known else []
            if (known and dangerous_node(known)) or dangerous_name(glob):
                keys += ["dangerous: true"]
            return "devices", f"{{{', '.join(keys)}}}"
        case Namespace(kind, name, pid):
            which = f'name: "{name}"' if name else "of: caller" if pid else "create: true"
            return "namespaces", f"{{type: {kind}, {which}}}"
        case Socket(namespace, family, kind, port):
            bind = f", bind: [{port}]" if port else ""
            return "sockets", f'{{namespace: "{namespace}", families: [{family}], types: [{kind}]{bind}}}'
        case TopicUse(verb, topic):
            return verb, topic


def _quoted(text: str) -> str:
    """A YAML scalar for use inside brackets: single quotes where needed, for these keep backslashes."""
    plain = re.fullmatch(r"[A-Za-z0-9/_][A-Za-z0-9/._+\\:=@-]*", text) and not text.endswith(":")
    return text if plain else "'" + text.replace("'", "''") + "'"


def _near(
    policy: Policy,
    idle: Sequence[Rule],
    subject: Subject,
    resource: Asked,
    user: str,
    node: Facts | None,
    new_rule: str,
) -> list[Near]:
    """The rules that almost allow it, nearest first; `new_rule` is the change where none of them is one to change."""
    seen = view(policy, subject)
    mine: set[AnyRule] = {*seen.devices, *seen.others, *message_view(policy, subject).rules}
    every: tuple[AnyRule, ...] = (*rules_of(policy, subject), *topic_rules(policy, subject))
    but_for_label = {rule for rule in every if rule.labels} - mine
    found: list[tuple[float, Near]] = []
    for rule in (*all_rules(policy), *idle):
        if rule in but_for_label and covers(rule, resource):
            one: tuple[float, Near] | None = (0.5, _for_label(rule, subject))
        elif isinstance(resource, Device) and isinstance(rule, DeviceRule):
            one = _near_device(rule, resource, user, node, new_rule, is_mine=rule in mine)
        else:
            one = _near_other(rule, resource, user, new_rule, is_mine=rule in mine)
        if one is None:
            continue
        far, near = one
        if rule in idle:
            near = near._replace(missing=f"{near.missing}, in which nobody is now")
        if isinstance(rule, DeviceRule) and node and (unfit := misfit(rule, node)):
            far, near = far + _NO_PATH, Near(rule, f"{near.missing}; and of the node there now {unfit}", new_rule)
        found.append((far, near))
    return [near for _, near in sorted(found, key=lambda one: one[0])]


def _near_device(
    rule: DeviceRule, resource: Device, user: str, node: Facts | None, new_rule: str, *, is_mine: bool
) -> tuple[float, Near] | None:
    """How far a rule for devices is from allowing one, and what is missing; None for too far."""
    enough = resource.access in ACCESS_COVERS[rule.access]
    if matcher(rule.pattern).fullmatch(resource.path):
        if is_mine and not enough:
            wanted = "rw" if {rule.access, resource.access} == {"ro", "wo"} else resource.access
            return 0, Near(rule, f"it gives {rule.access} only", f"at {rule.where} set `access: {wanted}`")
        if is_mine:
            return None
        if enough:
            return 1, _for_others(rule, user, new_rule)
        return 2, Near(rule, f"it is for {rule.source}, and gives {rule.access} only", new_rule)
    if not is_mine or (node and misfit(rule, node)):  # with a wider path it would still be refused
        return None
    alike = difflib.SequenceMatcher(None, rule.pattern, resource.path).ratio()
    if alike < _ALIKE_LEAST:
        return None
    missing = f"its path {rule.pattern} does not match"
    if rule.pattern.count("/") != resource.path.count("/") and "*" in rule.pattern:
        missing += ": * never matches a slash"
    _, text = _as_rule(resource, node)
    return _NO_PATH - alike, Near(rule, missing, f"at {rule.where} widen the path, or add `- {text}` beside it")


def _for_label(rule: AnyRule, subject: Subject) -> Near:
    has = f"this one has {subject.label}" if subject.label else "that of this one is not known"
    missing = f"it is for programs with the label {' or '.join(rule.labels)}, enforced; {has}"
    return Near(rule, missing, f"have the program confined so, or remove `label` at {rule.where}")


def _for_others(rule: AnyRule, user: str, new_rule: str) -> Near:
    kind, _, group = rule.source.partition(" ")
    # usermod(8) takes an account by its name, and groups that the databases have
    account = names.name_of(int(user)) if user.isdecimal() else user
    if kind == "group" and not account.isdecimal() and names.has_group(group) and names.gid_of(group):
        change = f"make {account} a member: `usermod -aG {group} {account}`, and log in again"
    else:
        change = new_rule
    if rule.labels:
        change += f", and have the program confined with the label {' or '.join(rule.labels)}"
    return Near(rule, f"it is for {rule.source}{_with_label(rule)}", change)


def _near_other(
    rule: AnyRule, resource: Asked, user: str, new_rule: str, *, is_mine: bool
) -> tuple[float, Near] | None:
    """Whether a rule for namespaces or sockets almost allows one."""
    if covers(rule, resource):
        return None if is_mine else (1, _for_others(rule, user, new_rule))
    match rule, resource:
        case NamespaceRule(types), Namespace(kind) if kind not in types and covers(
            rule._replace(types=(kind,)), resource
        ):
            missing, change = f"it is for {', '.join(types)} only", f"at {rule.where} add {kind} to `type`"
        case SocketRule(), Socket(family=family, type=kind, port=port) if covers(
            rule._replace(families=(family,), types=(kind,), ports=(port,)), resource
        ):
            missing = f"it is for {', '.join((*rule.families, *rule.types, *map(str, rule.ports)))} only"
            change = f"at {rule.where} add what is missing to `families`, `types` or `bind`"
        case _:
            return None
    if is_mine:
        return 0, Near(rule, missing, change)
    missing = f"it is for {rule.source}, and {missing.removeprefix('it is ')}"
    return 2, Near(rule, missing, new_rule)
