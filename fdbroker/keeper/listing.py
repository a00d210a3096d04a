"""What a subject may open now: every rule's glob looked up, each match judged as if it were asked for.

Runs in: keeper. An attacker controls how often it asks, and nothing else here.

A List takes as long as there are nodes that its rules name, so it is made a few nodes at a time; of each owner one at a
time, of several owners in turn. Each node is looked at once, and charged, whether it may be opened or not. Connections
of one owner for which the policy says the same share one listing, which is handed on to one of them at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice

from fdbroker.keeper.connections import Connection
from fdbroker.kernel import inotify
from fdbroker.kernel.devices import nodes_matching
from fdbroker.limits import keeper as limits
from fdbroker.nodes.find import Finder
from fdbroker.offers import Offer
from fdbroker.policy.decide import View, decide
from fdbroker.policy.fit import misfit
from fdbroker.policy.paths import matcher
from fdbroker.refusals import Refused
from fdbroker.terms import (
    ACCESS_NAMES,
    Device,
    DeviceRule,
    Namespace,
    NamespaceRule,
    Resource,
    Socket,
    SocketRule,
)
from fdbroker.wire.launcher import Given
from fdbroker.wire.lists import split_offers

_OFFERS, _AT_ONCE = limits.OFFERS, limits.LOOKED_AT_ONCE
_GENERATION_MAX = (1 << 53) - 1
NETNS = "/run/netns"  # ip-netns(8)
_BITS = {"ro": 4, "wo": 2, "rw": 6}  # of a mode, for others; a group's are three higher


class _Job:
    """One listing in the making: `looks` gives an Offer, or None, for each thing that it has looked at."""

    __slots__ = ("connections", "folders", "found", "looks", "view")

    def __init__(self, connections: list[Connection], finder: Finder, given: Given) -> None:
        self.connections = connections  # those that get it
        self.view = connections[0].view
        self.folders: set[str] = set()
        self.found: list[Offer] = []
        self.looks = _looks(self.view, connections[0].subject.pid, finder, given, self.folders)


class Lister:
    """Makes the listings that were asked for, and those of watching connections again after a change.

    `notify` is an inotify descriptor, borrowed, which reports from then on when a listing may have changed. `given` is
    what the opener can open.
    """

    def __init__(self, finder: Finder, notify: int) -> None:
        self.given = Given(False, False, ())
        self._finder = finder
        self._notify = notify
        # by owner, each connection once; the first owner is next
        self._waiting: dict[int, dict[Connection, None]] = {}
        self._jobs: dict[int, _Job] = {}  # by owner
        # Complete listings that are to be handed on, by owner and connection, each with the view that it was made by.
        self._done: dict[int, dict[Connection, tuple[View, list[Offer]]]] = {}
        self._watching: dict[Connection, list[Offer]] = {}  # the listing that each was sent last
        self.news = False  # whether a watching connection was told something new since `list_again`

    @property
    def busy(self) -> bool:
        """Whether there is something to look at, or to hand on."""
        return bool(self._waiting or self._done)

    @property
    def watched(self) -> bool:
        """Whether a change would be told to anybody."""
        return bool(self._watching)

    def add(self, connection: Connection) -> None:
        """Make its listing, after those of the same owner that were asked for before.

        A connection waits once, however often it is added.
        """
        self._waiting.setdefault(connection.subject.owner, {})[connection] = None

    def drop(self, connection: Connection) -> None:
        """Make no more listing for it."""
        self._watching.pop(connection, None)
        owner = connection.subject.owner
        done = self._done.get(owner, {})
        if done.pop(connection, None) is not None and not done:
            del self._done[owner]
        waiting = self._waiting.get(owner, {})
        if connection in waiting:
            del waiting[connection]
            job = self._jobs.get(owner)
            if job is not None and connection in job.connections:
                job.connections.remove(connection)
                if not job.connections:
                    del self._jobs[owner]
            if not waiting:
                del self._waiting[owner]

    def list_again(self) -> None:
        """Something has changed: make the listing of every watching connection anew."""
        self.news = False
        for connection in self._watching:
            if connection in self._waiting.get(connection.subject.owner, ()):
                self._jobs.pop(connection.subject.owner, None)  # it may have looked there already
            else:
                self.add(connection)

    def step(self, now_s: float) -> Iterator[tuple[Connection, list[bytes]]]:
        """Look at a few things for the next owner; gives one listing that is complete, and new, as messages."""
        if self._waiting:
            self._look(now_s)
        if self._done:
            yield from self._hand_on()

    def _hand_on(self) -> Iterator[tuple[Connection, list[bytes]]]:
        """The next connection's listing of the next owner: as messages it takes long, and there can be many of them."""
        owner, done = next(iter(self._done.items()))
        del self._done[owner]
        connection = next(iter(done))
        seen, found = done.pop(connection)
        if done:
            self._done[owner] = done  # behind the other owners
        before = self._watching.get(connection)
        if seen is not connection.view:  # there is another policy since
            self.add(connection)
        elif found != before:
            if connection.state == "watching":
                self._watching[connection] = found
                self.news |= before is not None
            yield connection, split_offers(connection.number, found)

    def _look(self, now_s: float) -> None:
        owner, waiting = next(iter(self._waiting.items()))
        del self._waiting[owner]
        job = self._jobs.get(owner)
        if job is None or job.view is not job.connections[0].view:
            first = next(iter(waiting))
            job = self._jobs[owner] = _Job([one for one in waiting if _alike(one, first)], self._finder, self.given)
        looked = list(islice(job.looks, _AT_ONCE))
        job.found += [offer for offer in looked if offer is not None]
        # a change is nothing that the client does: only who asks now pays
        asking = next((one for one in job.connections if one not in self._watching), None)
        if asking is not None:
            asking.charge(now_s, len(looked))
        if len(looked) == _AT_ONCE and len(job.found) < _OFFERS:
            self._waiting[owner] = waiting  # behind the other owners
            return
        del self._jobs[owner]
        for one in job.connections:
            del waiting[one]
        if waiting:
            self._waiting[owner] = waiting
        for folder in job.folders:
            inotify.watch_directory(self._notify, folder)
        found = job.found[:_OFFERS]
        self._done.setdefault(owner, {}).update(dict.fromkeys(job.connections, (job.view, found)))


def _alike(one: Connection, other: Connection) -> bool:
    """Whether two connections of an owner get the same listing, which may name their processes."""
    return one.view is other.view and (not one.view.others or one.subject.pid == other.subject.pid)


def _looks(seen: View, pid: int, finder: Finder, given: Given, folders: set[str]) -> Iterator[Offer | None]:
    """All that `seen` allows and that exists, devices first, each with the most access that may be asked for.

    Namespaces of the caller's processes are listed as those of `pid`. The folders that were looked into are added to
    `folders`: a change in one of them may change the list.
    """
    paths: set[str] = set()
    for pattern in dict.fromkeys(rule.pattern for rule in seen.devices):
        paths.update(nodes_matching(pattern, folders))
        yield None  # all names of a folder were looked at
    for path in sorted(paths):
        yield _device(path, seen, finder, given)
    judged: set[Resource] = set()
    for resource in _others(seen, pid, folders):
        if resource not in judged:
            judged.add(resource)
            rules = decide(seen, resource).rules
            yield Offer(resource, rules[0].where) if rules else None


def _device(path: str, seen: View, finder: Finder, given: Given) -> Offer | None:
    """The node at `path` with the most access that a rule gives which the node fits."""
    allowed = {access: decide(seen, Device(path, access)).rules for access in reversed(ACCESS_NAMES)}  # rw, wo, ro
    rules = dict.fromkeys(rule for each in allowed.values() for rule in each if isinstance(rule, DeviceRule))
    if not rules:
        return None
    try:
        node = finder.look(path, {})
    except Refused:
        return None
    try:
        node.judge_way(seen, None)
        fitting = {rule for rule in rules if not misfit(rule, node.facts)}
        for access, covering in allowed.items():
            for rule in covering:
                if rule in fitting and _can_open(given, node.status, access):
                    return Offer(Device(path, access), rule.where, _generation(node.status))
    except Refused:
        return None
    finally:
        os.close(node.descriptor)
    return None


def _can_open(given: Given, status: os.stat_result, access: str) -> bool:
    """Whether the kernel lets the opener, which owns no node, open one of that status so.

    A mode's bits for the group are the most that any entry of its ACL gives but the owner's. Source: acl(5).
    """
    if given.writes or (given.reads and access == "ro"):
        return True
    bits = _BITS[access] << 3 * (status.st_gid in given.gids)
    return status.st_mode & bits == bits


def _generation(status: os.stat_result) -> int:
    """A number that differs for another node, mode or owner: the hash of integers, as far as JSON's numbers go.

    Times are no part of it, for every user with write access to a node can change them.
    """
    what = (status.st_dev, status.st_ino, status.st_rdev, status.st_mode, status.st_uid, status.st_gid)
    return hash(what) & _GENERATION_MAX


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
    """The names in /run/netns on which a namespace is mounted, by their file system: nothing is opened.

    A name that cannot be said on the command line, where it means something else, is left out.
    """
    try:
        found = sorted(os.listdir(NETNS))
        folders.add(NETNS)
    except OSError:
        folders.add(os.path.dirname(NETNS))  # where the folder comes
        return []
    nsfs = os.stat("/proc/self/ns/net").st_dev
    names = [name for name in found if name != "new" and "," not in name and not name.startswith("pid:")]
    return [name for name in names if _file_system(f"{NETNS}/{name}") == nsfs]


def _file_system(path: str) -> int:
    try:
        return os.lstat(path).st_dev
    except OSError:  # it has gone meanwhile
        return -1
