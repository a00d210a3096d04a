"""How opener, keeper and inbox get a policy: each of them or none, and one policy at a time.

Runs in: launcher. A taken-over child can leave what it is sent unread.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Sequence

from fdbroker.kernel.link import Link
from fdbroker.kernel.sealed import sealed_memfd
from fdbroker.launcher.ends import ServiceFailed
from fdbroker.launcher.start import Child
from fdbroker.limits import launcher as limits
from fdbroker.policy.compiled import Policy, to_bytes
from fdbroker.wire import link

_JUDGES = ("keeper", "inbox", "opener")  # the opener, which says when it counts, is the last
_BUSY = "the service's processes are busy, try again"


class Handing:
    """The policies that were handed on."""

    def __init__(self) -> None:
        self._number = 0  # of the last one that any of them was sent, since the start
        self._failed = b""  # that one, where not all of them were
        self._missing: set[str] = set()  # who does not use it yet, and must by `_late_at_s`
        self._late_at_s = 0.0

    def can(self, children: Sequence[Child]) -> bool:
        """Whether a policy can be handed on now: all use the last one, and each link has room."""
        return not self._missing and all(map(has_room, _links(children)))

    def give(self, children: Sequence[Child], policy: Policy) -> str:
        """Hand on this policy; why that cannot be now, or "".

        A number stands for one policy: who was sent one that the opener was not, and has not read the next, would use
        it by the number of that one. What is tried again has its number again, so that nobody keeps many of it.
        """
        if not self.can(children):
            return _BUSY
        data = to_bytes(policy)
        if data != self._failed:
            self._number, self._failed = self._number + 1, data
        message = link.LAUNCHER_TO_OPENER.encode(link.Policy(self._number))
        try:
            descriptor = sealed_memfd("policy", data)
            try:
                sent = all(one.send_with_descriptors(message, [descriptor]) for one in _links(children))
            finally:
                os.close(descriptor)
        except OSError as error:  # no descriptors, or too many of root's in flight; or one has ended, as is read next
            return f"the service's processes cannot be told: {error}"
        if not sent:
            return _BUSY
        self._failed, self._missing = b"", {*_JUDGES}
        self._late_at_s = time.monotonic() + limits.POLICY_SECONDS
        return ""

    def taken(self, name: str, number: int) -> bool:
        """That child uses the policy of that number; whether it is the one by which all use the last policy."""
        if number != self._number or name not in self._missing:
            return False
        self._missing.discard(name)
        return not self._missing

    def look(self) -> None:
        """Raises ServiceFailed when somebody does not take the last one."""
        if self._missing and time.monotonic() >= self._late_at_s:
            raise ServiceFailed(f"the {' and the '.join(sorted(self._missing))} did not take the new policy")


def _links(children: Sequence[Child]) -> list[Link]:
    return [child.link for name in _JUDGES for child in children if child.name == name]


def has_room(one: Link) -> bool:
    """Whether it takes a small message for certain. Source: unix_writable in af_unix.c."""
    poll = select.poll()
    poll.register(one.fileno(), select.POLLOUT)
    return not one.waiting and bool(poll.poll(0))
