"""Stage open: find the node, judge what was found, open that very node.

Runs in: opener. An attacker controls which allowed path is asked for and when; should it be able to change names
below /dev as well, every check here is on the descriptor that was found, never on a name.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from fdbroker import limits
from fdbroker.kernel.capabilities import Bracket
from fdbroker.kernel.openat import RESOLVE_BENEATH, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, openat2, reopen
from fdbroker.policy.decide import View, denying_rule
from fdbroker.policy.fit import Facts, misfit
from fdbroker.refusals import Denied, NoSuchResource, NotWhatItWas, OpenFailed
from fdbroker.terms import Device, DeviceRule, Resource, Rule

_AT_ONCE = limits.LOOKED_AT_ONCE
_RESOLVE = RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_SYMLINKS
_LINKS = 40  # as many as the kernel follows: path_resolution(7)


# drivers/char/mem.c: opening or closing one of its nodes does nothing that could sleep. Any other driver may wait for
# its device: the first opening of a USB mouse takes 55 ms, the last closing of an evdev node 36 ms.
_MEM_MAJOR = 1


def sleeps(status: os.stat_result) -> bool:
    """Whether opening or closing what has this status may take its time: all but nodes such as null and zero."""
    return not (stat.S_ISCHR(status.st_mode) and os.major(status.st_rdev) == _MEM_MAJOR)


class Node(NamedTuple):
    """A node that was found: `descriptor` (O_PATH, owned by the caller), and the facts about it.

    `names` are where links led on the way, and its own name, without the path that was asked for.
    """

    descriptor: int
    status: os.stat_result
    facts: Facts
    names: tuple[str, ...] = ()

    def judge_way(self, seen: View, index: int | None) -> None:
        """Raise Denied when a deny rule names where links led."""
        for name in self.names:
            by = denying_rule(seen, Device(name, "ro"))
            if by is not None:
                raise Denied(f"it leads to {name}, denied to {by.source}", index=index, rule=by.where)

    def misfit(self, rule: DeviceRule) -> str:
        """The reason for which it does not fit a rule, or ""."""
        return misfit(rule, self.facts)


class Found(NamedTuple):
    """A node that was judged, and the rule that it fits."""

    node: Node
    rule: DeviceRule


class Nodes:
    """Opens nodes below /dev. Owns a few O_PATH descriptors until `close`.

    `bracket` raises what the policy's nodes need, from the first openat2 to the last open of a request.
    """

    def __init__(self, bracket: Bracket) -> None:
        flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
        self._bracket = bracket
        self._dev = os.open("/dev", flags)
        self._proc_self_fd = os.open("/proc/self/fd", flags)
        self._sys_dev = os.open("/sys/dev", flags)

    def close(self) -> None:
        """Nothing can be opened any more."""
        for descriptor in (self._dev, self._proc_self_fd, self._sys_dev):
            os.close(descriptor)

    def judge_some(
        self, resources: Sequence[Resource], allowed: Sequence[tuple[Rule, ...]], seen: View, found: dict[int, Found]
    ) -> bool:
        """Find the next few devices that are not in `found`, by position, and judge them; returns whether none is left.

        Nothing is opened. Raises NoSuchResource, NotWhatItWas, OpenFailed or Denied with the resource's index; the
        caller closes the descriptors in `found` either way.
        """
        each = ((index, one.path) for index, one in enumerate(resources) if isinstance(one, Device))
        devices = [(index, path) for index, path in each if index not in found]
        with self._bracket:
            for index, path in devices[:_AT_ONCE]:
                rules = [one for one in allowed[index] if isinstance(one, DeviceRule)]
                found[index] = self.find(path, rules, seen, index)
        return len(devices) <= _AT_ONCE

    def open_all(self, resources: Sequence[Resource], found: dict[int, Found], descriptors: dict[int, int]) -> None:
        """Open every node in `found`, which was judged; owned descriptors are added to `descriptors` as they come.

        May run in a thread: the capability is raised for that thread alone. Raises OpenFailed or NotWhatItWas with the
        resource's index; the caller closes what is in `descriptors` already.
        """
        with self._bracket:
            for index, one in found.items():
                descriptors[index] = self._open(one, resources[index].access, index)

    def find(self, path: str, rules: Sequence[DeviceRule], seen: View, index: int | None = None) -> Found:
        """The node at `path`, if it is what one of `rules` says and no deny rule names where links lead."""
        node = self.look(path, seen, index)
        reasons = []
        for rule in rules:
            reason = node.misfit(rule)
            if not reason:
                return Found(node, rule)
            reasons.append(reason)
        os.close(node.descriptor)
        raise NotWhatItWas(reasons[0], index=index)

    def look(self, path: str, seen: View, index: int | None = None) -> Node:
        """The node that `path` leads to. Raises NoSuchResource, NotWhatItWas, OpenFailed, and Denied for its links."""
        try:
            descriptor, names = self._walk(path)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                raise NoSuchResource("there is no such node now", index=index) from None
            raise OpenFailed(error.errno or errno.EIO, index=index) from None
        except NotWhatItWas as refusal:
            refusal.index = index
            raise
        try:
            status = os.fstat(descriptor)
            node = Node(descriptor, status, self._facts(names[-1], status), tuple(names[1:]))
            node.judge_way(seen, index)
            return node
        except BaseException:
            os.close(descriptor)
            raise

    def may_open(self, node: Node, access: str) -> bool:
        """Whether the kernel will let this process open a node so, as far as modes, owners and ACLs say."""
        if self._bracket.opens(access):
            return True
        wanted = {"ro": os.R_OK, "wo": os.W_OK, "rw": os.R_OK | os.W_OK}[access]
        return os.access(str(node.descriptor), wanted, dir_fd=self._proc_self_fd, effective_ids=True)

    def _walk(self, path: str) -> tuple[int, list[str]]:
        try:
            return openat2(self._dev, path[len("/dev/") :], os.O_PATH, _RESOLVE), [path]
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
        return self._follow(path)

    def _follow(self, path: str) -> tuple[int, list[str]]:
        """Like `_walk`, name by name: a link counts only when root owns it and it stays below /dev.

        The names are the path, where each link leads, and the node's own one.
        """
        passed = [path]
        names = deque(path.split("/")[2:])
        folders = [self._dev]
        way: list[str] = []
        links = 0
        with contextlib.ExitStack() as owned:
            while names:
                name = names.popleft()
                if name in ("", "."):
                    continue
                if name == "..":
                    if not way:
                        raise NotWhatItWas("a link leads out of /dev")
                    folders.pop()
                    way.pop()
                    continue
                found = openat2(folders[-1], name, os.O_PATH | os.O_NOFOLLOW, _RESOLVE)
                status = os.fstat(found)
                is_link = stat.S_ISLNK(status.st_mode)
                if not names and not is_link:
                    return found, [*passed, "/dev/" + "/".join([*way, name])]
                owned.callback(os.close, found)
                if not is_link:
                    folders.append(found)
                    way.append(name)
                    continue
                links += 1
                if links > _LINKS:
                    raise NotWhatItWas("too many links")
                if status.st_uid != 0:
                    raise NotWhatItWas(f"the link {name} does not belong to root")
                target = os.readlink("", dir_fd=found)
                if target.startswith("/"):
                    if not target.startswith("/dev/"):
                        raise NotWhatItWas("a link leads out of /dev")
                    target = target[len("/dev/") :]
                    folders, way = [self._dev], []
                names.extendleft(reversed(target.split("/")))
                passed.append("/dev/" + "/".join(_plain([*way, *names])))
        raise NotWhatItWas("a link leads to a folder")

    def _facts(self, name: str, status: os.stat_result) -> Facts:
        """What is known of the node `name` without opening it."""
        kind = stat.S_IFMT(status.st_mode)
        number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
        return Facts(name, kind, number, *self._device(kind, number))

    def _device(self, kind: int, number: str) -> tuple[str, str]:
        """Class and name of the device with that number, "" where there is none. Source: sysfs(5), /sys/dev.

        Two links are read and nothing is opened, which Landlock would forbid.
        """
        place = f"{'block' if kind == stat.S_IFBLK else 'char'}/{number}"
        try:
            name = os.readlink(place, dir_fd=self._sys_dev).rpartition("/")[2]
            return os.readlink(f"{place}/subsystem", dir_fd=self._sys_dev).rpartition("/")[2], name
        except OSError:
            return "", ""

    def _open(self, found: Found, access: str, index: int) -> int:
        node, facts = found.node, found.node.facts
        try:
            descriptor = reopen(self._proc_self_fd, node.descriptor, access)
        except OSError as error:
            raise OpenFailed(error.errno or errno.EIO, index=index, rdev=facts.number) from None
        status = os.fstat(descriptor)
        trouble = ""
        if _identity(status) != _identity(node.status):
            trouble = "the opened node is not the one that was judged"
        elif not status.st_nlink:  # so its number may be another device's by now
            trouble = "the node was removed before it was opened"
        elif found.rule.kernel_class and not facts.kernel_class:
            # no driver had that number, and the kernel has loaded one
            trouble = misfit(found.rule, self._facts(facts.path, status), opened=True)
        if trouble:
            os.close(descriptor)
            raise NotWhatItWas(trouble, index=index)
        return descriptor


def _plain(names: Iterable[str]) -> list[str]:
    """The components of a path without empty ones, `.` and `..`."""
    plain: list[str] = []
    for name in names:
        if name == "..":
            del plain[-1:]
        elif name not in ("", "."):
            plain.append(name)
    return plain


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return stat.S_IFMT(status.st_mode), status.st_rdev, status.st_dev, status.st_ino
