"""Stage open: open the very nodes that were found and judged.

Runs in: opener. An attacker controls which allowed path is asked for and when; every check here is on the descriptor
that was found (nodes/find.py), never on a name.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence

from fdbroker.kernel.capabilities import Bracket
from fdbroker.kernel.openat import reopen
from fdbroker.limits import opener as limits
from fdbroker.nodes.find import Devices, Finder, Node
from fdbroker.opener.views import Permit
from fdbroker.policy.decide import View
from fdbroker.policy.fit import Facts, misfit
from fdbroker.refusals import NotWhatItWas, OpenFailed
from fdbroker.terms import Device, DeviceRule, Grant

_AT_ONCE = limits.RESOURCES_AT_ONCE
_BEHIND_LINKS = 4  # so many others a node counts as: each name on the way is opened
# What a request waits for, while others are served: the namespaces worker, its next turn, a thread of its owner's.
WORKER, TURN, THREAD = range(3)

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

    def open_some(
        self,
        permits: Sequence[Permit],
        seen: View,
        found: dict[int, Node],
        grants: dict[int, Grant],
        descriptors: dict[int, int],
        *,
        sleep: bool = False,
    ) -> int | None:
        """Find and judge the next few devices that are not in `found`, by position; after the last, open a few.

        Returns TURN while some are left; THREAD when all are judged, and to open them may take its time: then a thread
        calls it with `sleep`, to open all, with the capability raised for that thread alone; None when all are open.

        Raises NoSuchResource, NotWhatItWas, OpenFailed or Denied with the resource's index; the caller closes the
        descriptors in `found` and `descriptors` either way.
        """
        devices: Devices = {}
        room = _AT_ONCE
        with self._bracket:
            for index, permit in enumerate(permits):
                if index in found or not isinstance(permit.resource, Device):
                    continue
                if room <= 0:
                    return TURN
                node = found[index] = self.look(permit.resource.path, devices, index)
                grants[index] = _judge(node, permit, seen, index)
                room -= _BEHIND_LINKS if node.names else 1
            left = [index for index in found if index not in descriptors]
            if not sleep and any(sleeps(found[index].status) for index in left):
                return THREAD
            few = left if sleep else left[:_AT_ONCE]
            for index in few:
                descriptors[index] = self._open(found[index], grants[index], index)
        return None if len(few) == len(left) else TURN

    def _open(self, node: Node, grant: Grant, index: int) -> int:
        """An owned descriptor of the very node that was judged."""
        try:
            descriptor = reopen(self._proc_self_fd, node.descriptor, grant.resource.access)
        except OSError as error:
            raise OpenFailed(error.errno or errno.EIO, index=index, rdev=grant.rdev) from None
        status = os.fstat(descriptor)
        trouble = ""
        if _identity(status) != _identity(node.status):
            trouble = "the opened node is not the one that was judged"
        elif not status.st_nlink:  # so its number may be another device's by now
            trouble = "the node was removed before it was opened"
        elif not node.facts.kernel_class and isinstance(grant.rule, DeviceRule):
            # no driver had that number, and the kernel has loaded one
            device = self.device(node.facts.kind, status.st_rdev, keep=False)
            trouble = misfit(grant.rule, Facts(node.facts.path, node.facts.kind, *device), opened=True)
        if trouble:
            os.close(descriptor)
            raise NotWhatItWas(trouble, index=index)
        return descriptor


def _judge(node: Node, permit: Permit, seen: View, index: int) -> Grant:
    """The grant that a node leads to, by the first rule that it fits. Raises Denied or NotWhatItWas."""
    judged = node.facts, node.names
    if permit.grant is None or permit.judged != judged:
        node.judge_way(seen, index)
        reasons = []
        for rule in [one for one in permit.rules if isinstance(one, DeviceRule)]:
            reason = misfit(rule, node.facts)
            if not reason:
                permit.judged, permit.grant = judged, Grant(permit.resource, rule, node.facts.number)
                return permit.grant
            reasons.append(reason)
        raise NotWhatItWas(reasons[0], index=index)
    return permit.grant


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return stat.S_IFMT(status.st_mode), status.st_rdev, status.st_dev, status.st_ino
