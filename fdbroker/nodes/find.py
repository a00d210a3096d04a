"""Find a node below /dev and judge what was found, without opening it.

Runs in: opener, keeper. An attacker controls which allowed path is asked for and when; should it be able to change
names below /dev as well, every check here is on the descriptor that was found, never on a name.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import NamedTuple

from fdbroker.kernel.openat import RESOLVE_BENEATH, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, openat2
from fdbroker.limits import opener as limits
from fdbroker.policy.decide import View, denying_rule
from fdbroker.policy.fit import Facts
from fdbroker.refusals import Denied, NoSuchResource, NotWhatItWas, OpenFailed
from fdbroker.terms import Device

_RESOLVE = RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_SYMLINKS
_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_LINKS = 40  # as many as the kernel follows: path_resolution(7)


class Node(NamedTuple):
    """A node that was found: `descriptor` (O_PATH, owned by the caller), and the facts about it.

    `names` are the paths where links led, the last of them its own; none if there was no link on the way.
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


# What the kernel says of the devices that were looked at together, by kind and number.
Devices = dict[tuple[int, int], tuple[str, str, str]]


class Finder:
    """Finds nodes. Owns a few O_PATH descriptors until `close`, DEVICES_KEPT of them for devices found lately."""

    def __init__(self) -> None:
        self._dev = os.open("/dev", _FOLDER)
        self._sys_dev = os.open("/sys/dev", _FOLDER)
        # by kind and number: that very device's folder in /sys/dev, its number as text, and its name
        self._kept: dict[tuple[int, int], tuple[int, str, str]] = {}

    def close(self) -> None:
        """Nothing can be found any more."""
        self._forget()
        os.close(self._dev)
        os.close(self._sys_dev)

    def _forget(self) -> None:
        while self._kept:
            os.close(self._kept.popitem()[1][0])

    def look(self, path: str, devices: Devices, index: int | None = None) -> Node:
        """The node that `path` leads to. Raises NoSuchResource, NotWhatItWas or OpenFailed.

        The kernel is asked for each device that is not in `devices`, which is for those that are looked at together.
        """
        try:
            try:
                descriptor, names = openat2(self._dev, path[len("/dev/") :], os.O_PATH, _RESOLVE), [path]
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
                descriptor, names = self._follow(path)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                raise NoSuchResource("there is no such node now", index=index) from None
            raise OpenFailed(error.errno or errno.EIO, index=index) from None
        except NotWhatItWas as refusal:
            refusal.index = index
            raise
        status = os.fstat(descriptor)
        kind, rdev = stat.S_IFMT(status.st_mode), status.st_rdev
        device = devices.get((kind, rdev))
        if device is None:
            device = devices[kind, rdev] = self.device(kind, rdev)
        return Node(descriptor, status, Facts(names[-1], kind, *device), tuple(names[1:]))

    def _follow(self, path: str) -> tuple[int, list[str]]:
        """The node at `path`, found name by name; at each link the walk begins anew at the path where that leads.

        A link counts only when root owns it and it stays below /dev. The paths are all that were walked: the one asked
        for first, the node's own one last.
        """
        walked = [path]
        while len(walked) <= _LINKS + 1:
            names, folder = walked[-1].split("/")[2:], self._dev
            with contextlib.ExitStack() as owned:
                for place, name in enumerate(names):
                    found = openat2(folder, name, os.O_PATH | os.O_NOFOLLOW, _RESOLVE)
                    status = os.fstat(found)
                    is_link = stat.S_ISLNK(status.st_mode)
                    if place == len(names) - 1 and not is_link:
                        return found, walked
                    folder = found
                    owned.callback(os.close, folder)
                    if is_link:
                        if status.st_uid != 0:
                            raise NotWhatItWas(f"the link {name} does not belong to root")
                        walked.append(_led(names[:place], os.readlink("", dir_fd=found), names[place + 1 :]))
                        break
        raise NotWhatItWas("too many links")

    def device(self, kind: int, rdev: int, *, keep: bool = True) -> tuple[str, str, str]:
        """Number, class and name of a device, as Facts has them; a thread beside others must not `keep` anything.

        A folder of sysfs that was opened is that of one device: while a link can be read in it, that device lives, and
        has this number. So what is kept is asked again each time, by one name in place of a way of four folders.
        """
        kept = self._kept.get((kind, rdev)) if keep else None
        if kept is not None:
            try:
                return kept[1], _class(kept[0]), kept[2]
            except OSError:  # it is gone, and its number may be another one's
                os.close(self._kept.pop((kind, rdev))[0])
        number = f"{os.major(rdev)}:{os.minor(rdev)}"
        place = f"{'block' if kind == stat.S_IFBLK else 'char'}/{number}"
        try:
            folder = os.open(place, _FOLDER, dir_fd=self._sys_dev)
        except OSError:
            return number, "", ""
        try:
            name = os.readlink(place, dir_fd=self._sys_dev).rpartition("/")[2]
            found = number, _class(folder), name  # it still lives: that name is its own
        except OSError:
            keep, found = False, (number, "", "")
        if not keep:
            os.close(folder)
            return found
        if len(self._kept) >= limits.DEVICES_KEPT:
            self._forget()
        self._kept[kind, rdev] = folder, number, name
        return found


def _class(folder: int) -> str:
    """The class of the device whose folder that is. Source: sysfs(5), /sys/dev."""
    return os.readlink("subsystem", dir_fd=folder).rpartition("/")[2]


def _led(way: list[str], target: str, rest: list[str]) -> str:
    """The path that a link to `target` stands for: it is in the folder `way` below /dev, and `rest` is asked for in it.

    Raises NotWhatItWas when that is not below /dev.
    """
    if target.startswith("/"):
        if not target.startswith("/dev/"):
            raise NotWhatItWas("a link leads out of /dev")
        way, target = [], target[len("/dev/") :]
    names = [*way]
    for name in (*target.split("/"), *rest):
        if name == "..":
            if not names:
                raise NotWhatItWas("a link leads out of /dev")
            names.pop()
        elif name not in ("", "."):
            names.append(name)
    if not names:
        raise NotWhatItWas("a link leads to a folder")
    return f"/dev/{'/'.join(names)}"
