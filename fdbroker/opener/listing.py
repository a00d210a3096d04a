"""What a subject may open now: every rule's glob looked up, each match judged as if it were asked for.

Runs in: opener, without any capability raised. An attacker controls nothing here but how often.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice

from fdbroker import limits
from fdbroker.errors import Refused
from fdbroker.kernel import inotify
from fdbroker.kernel.devices import nodes_matching
from fdbroker.opener.authorize import Connection
from fdbroker.opener.open import Nodes
from fdbroker.policy.decide import View, decide
from fdbroker.policy.paths import matcher
from fdbroker.terms import (
    ACCESS_NAMES,
    DenyRule,
    Device,
    DeviceRule,
    Namespace,
    NamespaceRule,
    Offer,
    Resource,
    Rule,
    Socket,
    SocketRule,
)
from fdbroker.wire import link

_OFFERS = limits.OFFERS
NETNS = "/run/netns"  # ip-netns(8)

# What was found, by what it depends on: rules, deny rules, and a pid, if a rule is for the caller's processes.
Listed = dict[tuple[tuple[Rule, ...], tuple[Rule, ...], tuple[DenyRule, ...], int], list[Offer]]


def listing(connection: Connection, nodes: Nodes, notify: int, listed: Listed | None = None) -> list[bytes]:
    """The messages of a listing; `listed` keeps what was found for subjects that the policy sees alike.

    The inotify descriptor `notify`, borrowed, reports from now on when it may have changed.
    """
    seen, pid = connection.view, connection.subject.pid
    if not any(isinstance(rule, NamespaceRule) and rule.of_caller for rule in seen.others):
        pid = 0  # then the list is the same for every process
    key = (seen.devices, seen.others, seen.deny, pid)
    found = None if listed is None else listed.get(key)
    if found is None:
        folders: set[str] = set()
        found = offers(seen, pid, nodes, folders)
        for folder in folders:
            inotify.watch_directory(notify, folder)
        if listed is not None:
            listed[key] = found
    return link.split_offers(connection.number, found)


def offers(seen: View, pid: int, nodes: Nodes, folders: set[str]) -> list[Offer]:
    """All that `seen` allows and that exists, devices first, each with the most access that may be asked for.

    Namespaces of the caller's processes are listed as those of `pid`. The folders that were looked into are added to
    `folders`: a change in one of them may change the list.
    """
    listed = list(islice(_devices(seen, nodes, folders), _OFFERS))
    judged: set[Resource] = set()
    for resource in islice(_others(seen, pid, folders), _OFFERS):  # names times ports are many
        if len(listed) >= _OFFERS:
            break
        if resource in judged:
            continue
        judged.add(resource)
        rules = decide(seen, resource).rules
        if rules:
            listed.append(Offer(resource, rules[0].where))
    return listed[:_OFFERS]


def _devices(seen: View, nodes: Nodes, folders: set[str]) -> Iterator[Offer]:
    paths: set[str] = set()
    for pattern in dict.fromkeys(rule.pattern for rule in seen.devices):
        paths.update(nodes_matching(pattern, folders))
    for path in sorted(paths):
        for access in reversed(ACCESS_NAMES):  # rw, wo, ro
            device = Device(path, access)
            rules = [rule for rule in decide(seen, device).rules if isinstance(rule, DeviceRule)]
            if rules:
                try:
                    found = nodes.find(path, rules, seen)
                except Refused:
                    continue
                os.close(found.descriptor)
                yield Offer(device, found.rule.where)
                break


def _others(seen: View, pid: int, folders: set[str]) -> Iterator[Resource]:
    names = _names(folders) if seen.others else []
    for rule in seen.others:
        match rule:
            case NamespaceRule(name=pattern) if pattern:
                yield from (Namespace("net", name) for name in names if matcher(pattern).fullmatch(name))
            case NamespaceRule(types):
                yield from (Namespace(kind, pid=0 if rule.create else pid) for kind in types)
            case SocketRule(pattern, families, types, ports):
                for name in (name for name in names if matcher(pattern).fullmatch(name)):
                    for family in families:
                        for kind in types:
                            yield from (Socket(name, family, kind, port) for port in (0, *ports))


def _names(folders: set[str]) -> list[str]:
    """The names in /run/netns; whether they are what they should be, the worker sees when one is asked for."""
    try:
        names = sorted(os.listdir(NETNS))
        folders.add(NETNS)
    except OSError:
        folders.add(os.path.dirname(NETNS))  # where the folder comes
        return []
    return names
