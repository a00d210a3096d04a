"""Find a node below /dev and judge what was found, without opening it.

Runs in: opener, keeper. An attacker controls which allowed path is asked for and when; should it be able to change
names below /dev as well, every check here is on the descriptor that was found, never on a name.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from fdbroker.kernel.openat import RESOLVE_BENEATH, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, openat2
from fdbroker.policy.decide import View, denying_rule
from fdbroker.policy.fit import Facts, misfit
from fdbroker.refusals import Denied, NoSuchResource, NotWhatItWas, OpenFailed
from fdbroker.terms import Device, DeviceRule

_RESOLVE = RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_SYMLINKS
_LINKS = 40  # as many as the kernel follows: path_resolution(7)


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


class Finder:
    """Finds nodes. Owns two O_PATH descriptors until `close`."""

    def __init__(self) -> None:
        flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
        self._dev = os.open("/dev", flags)
        self._sys_dev = os.open("/sys/dev", flags)

    def close(self) -> None:
        """Nothing can be found any more."""
        os.close(self._dev)
        os.close(self._sys_dev)

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
            node = Node(descriptor, status, self.facts(names[-1], status), tuple(names[1:]))
            node.judge_way(seen, index)
            return node
        except BaseException:
            os.close(descriptor)
            raise

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

    def facts(self, name: str, status: os.stat_result) -> Facts:
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


def _plain(names: Iterable[str]) -> list[str]:
    """The components of a path without empty ones, `.` and `..`."""
    plain: list[str] = []
    for name in names:
        if name == "..":
            del plain[-1:]
        elif name not in ("", "."):
            plain.append(name)
    return plain
