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
from collections.abc import Sequence
from typing import NamedTuple

from fdbroker.errors import Denied, NoSuchResource, NotWhatItWas, OpenFailed
from fdbroker.kernel.capabilities import Bracket
from fdbroker.kernel.openat import RESOLVE_BENEATH, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, openat2, reopen
from fdbroker.policy.decide import View, denying_rule
from fdbroker.policy.paths import is_dangerous
from fdbroker.terms import Device, DeviceRule, Grant, Resource, Rule

_RESOLVE = RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_SYMLINKS
_LINKS = 40  # as many as the kernel follows: path_resolution(7)
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFREG: "a regular file",
    stat.S_IFDIR: "a folder",
    stat.S_IFSOCK: "a socket",
    stat.S_IFLNK: "a link",
}


class Found(NamedTuple):
    """A node judged fit: `descriptor` (O_PATH, owned by who called), the rule that it fits, and its "MAJOR:MINOR"."""

    descriptor: int
    rule: DeviceRule
    rdev: str
    status: os.stat_result


class Nodes:
    """Opens nodes below /dev. Owns a few O_PATH descriptors for as long as the process lives.

    `bracket` raises what the policy's nodes need, from the first openat2 to the last open of a request.
    """

    def __init__(self, bracket: Bracket) -> None:
        flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
        self._bracket = bracket
        self._dev = os.open("/dev", flags)
        self._proc_self_fd = os.open("/proc/self/fd", flags)
        self._sys_dev = os.open("/sys/dev", flags)

    def open_all(
        self,
        resources: Sequence[Resource],
        allowed: Sequence[tuple[Rule, ...]],
        seen: View,
        grants: dict[int, Grant],
        descriptors: dict[int, int],
    ) -> None:
        """Open every device by one of its rules; grants and owned descriptors are added as they come, by position.

        Raises NoSuchResource, NotWhatItWas, OpenFailed or Denied with the resource's index; the caller closes what
        is in `descriptors` already.
        """
        with self._bracket:
            for index, (resource, rules) in enumerate(zip(resources, allowed, strict=True)):
                if not isinstance(resource, Device):
                    continue
                found = self.find(resource.path, [one for one in rules if isinstance(one, DeviceRule)], seen, index)
                try:
                    descriptors[index] = self._open(found, resource.access, index)
                finally:
                    os.close(found.descriptor)
                grants[index] = Grant(resource, found.rule, found.rdev)

    def find(self, path: str, rules: Sequence[DeviceRule], seen: View, index: int | None = None) -> Found:
        """The node at `path`, if it is what one of `rules` says and no deny rule names where links lead."""
        try:
            node, name = self._walk(path)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                raise NoSuchResource("there is no such node now", index=index) from None
            raise OpenFailed(error.errno or errno.EIO, index=index) from None
        except NotWhatItWas as refusal:
            refusal.index = index
            raise
        try:
            by = denying_rule(seen, Device(name, "ro")) if name != path else None
            if by is not None:
                raise Denied(f"it leads to {name}, denied to {by.source}", index=index, rule=by.where)
            status = os.fstat(node)
            kind = stat.S_IFMT(status.st_mode)
            number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
            reasons = []
            for rule in rules:
                reason = self._misfit(rule, name, kind, number)
                if not reason:
                    return Found(node, rule, number, status)
                reasons.append(reason)
            raise NotWhatItWas(reasons[0], index=index)
        except BaseException:
            os.close(node)
            raise

    def _walk(self, path: str) -> tuple[int, str]:
        """An owned O_PATH descriptor of what `path` leads to, and that node's own name."""
        try:
            return openat2(self._dev, path[len("/dev/") :], os.O_PATH, _RESOLVE), path
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
        return self._follow(path)

    def _follow(self, path: str) -> tuple[int, str]:
        """Like `_walk`, name by name: a link counts only when root owns it and it stays below /dev."""
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
                    return found, "/dev/" + "/".join([*way, name])
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
        raise NotWhatItWas("a link leads to a folder")

    def _misfit(self, rule: DeviceRule, name: str, kind: int, number: str) -> str:
        """Why the node `name` of that type and device number is not what `rule` says, or ""."""
        if kind not in (stat.S_IFCHR, stat.S_IFBLK):
            return f"it is {_KINDS.get(kind, 'no device')}, not a device node"
        if not rule.dangerous:
            if kind == stat.S_IFBLK:
                return "it is a block device, and the rule is not marked dangerous"
            if is_dangerous(name):
                return f"it leads to {name}, and the rule is not marked dangerous"
        if rule.device and not _number_fits(rule.device, number):
            return f"its device number is {number}, not {rule.device}"
        if rule.kernel_class:
            found = self._kernel_class(kind, number)
            if found != rule.kernel_class:
                return f"its class is {found or 'unknown'}, not {rule.kernel_class}"
        return ""

    def _kernel_class(self, kind: int, number: str) -> str:
        """The kernel subsystem of a device number, "" for one that no device has. Source: sysfs(5), /sys/dev."""
        folder = "block" if kind == stat.S_IFBLK else "char"
        try:
            return os.readlink(f"{folder}/{number}/subsystem", dir_fd=self._sys_dev).rpartition("/")[2]
        except OSError:
            return ""

    def _open(self, found: Found, access: str, index: int) -> int:
        try:
            descriptor = reopen(self._proc_self_fd, found.descriptor, access)
        except OSError as error:
            raise OpenFailed(error.errno or errno.EIO, index=index) from None
        status = os.fstat(descriptor)
        if _identity(status) != _identity(found.status):
            os.close(descriptor)
            raise NotWhatItWas("the opened node is not the one that was judged", index=index)
        return descriptor


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return stat.S_IFMT(status.st_mode), status.st_rdev, status.st_dev, status.st_ino


def _number_fits(pattern: str, number: str) -> bool:
    return pattern == number or all(
        want in ("*", have) for want, have in zip(pattern.split(":"), number.split(":"), strict=True)
    )
