"""Stage open: open the very nodes that were found and judged.

Runs in: opener. An attacker controls which allowed path is asked for and when; every check here is on the descriptor
that was found (nodes/find.py), never on a name.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence

from fdbroker import limits
from fdbroker.kernel.capabilities import Bracket
from fdbroker.kernel.openat import reopen
from fdbroker.nodes.find import Finder, Found
from fdbroker.policy.decide import View
from fdbroker.policy.fit import misfit
from fdbroker.refusals import NotWhatItWas, OpenFailed
from fdbroker.terms import Device, DeviceRule, Resource, Rule

_AT_ONCE = limits.LOOKED_AT_ONCE

# drivers/char/mem.c: opening or closing one of its nodes does nothing that could sleep. Any other driver may wait for
# its device: the first opening of a USB mouse takes 55 ms, the last closing of an evdev node 36 ms.
_MEM_MAJOR = 1


def sleeps(status: os.stat_result) -> bool:
    """Whether opening or closing what has this status may take its time: all but nodes such as null and zero."""
    return not (stat.S_ISCHR(status.st_mode) and os.major(status.st_rdev) == _MEM_MAJOR)


class Nodes(Finder):
    """Opens nodes below /dev. Owns a few O_PATH descriptors until `close`.

    `bracket` raises what the policy's nodes need, from the first openat2 to the last open of a request.
    """

    def __init__(self, bracket: Bracket) -> None:
        super().__init__()
        self._bracket = bracket
        self._proc_self_fd = os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def close(self) -> None:
        """Nothing can be opened any more."""
        super().close()
        os.close(self._proc_self_fd)

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
            trouble = misfit(found.rule, self.facts(facts.path, status, keep=False), opened=True)
        if trouble:
            os.close(descriptor)
            raise NotWhatItWas(trouble, index=index)
        return descriptor


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return stat.S_IFMT(status.st_mode), status.st_rdev, status.st_dev, status.st_ino
