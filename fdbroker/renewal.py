"""Another policy in a process beside the opener: the launcher sends it, the opener says when it counts, and for whom.

Runs in: inbox, keeper. Whoever is connected comes again, for what is known of it depends on the policy; until all have,
nobody is answered by the one or the other.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from fdbroker.kernel import memfd
from fdbroker.kernel.link import Link
from fdbroker.limits import opener as limits
from fdbroker.policy.compiled import Policy, from_bytes
from fdbroker.refusals import LinkViolation
from fdbroker.wire import link
from fdbroker.wire.launcher import INBOX_TO_LAUNCHER


class Renewal:
    """Borrows the link to the launcher, to which it says when a policy is in force."""

    def __init__(self, launcher: Link) -> None:
        self._launcher = launcher
        self._policies: dict[int, Policy] = {}  # by number, those that the opener does not use yet
        self._number = 0  # of the policy in force
        self.to_come = 0  # connections that come again

    def put(self, number: int, descriptors: Sequence[int]) -> None:
        """A policy came from the launcher, in a memfd, which is taken."""
        (descriptor,) = descriptors
        try:
            self._policies[number] = from_bytes(memfd.read(descriptor, limits.POLICY_LINK_BYTES))
        finally:
            os.close(descriptor)

    def knows(self, number: int) -> bool:
        """Whether that policy came."""
        return number in self._policies

    def use(self, number: int, connections: int) -> Policy:
        """The policy of that number, for who comes again now. Raises LinkViolation when it did not come."""
        policy = self._policies.pop(number, None)
        if policy is None or self.to_come:
            raise LinkViolation(f"policy {number} is to be used, which did not come, or too soon")
        self._policies = {later: one for later, one in self._policies.items() if later > number}
        self._number, self.to_come = number, connections
        self._tell()
        return policy

    def came(self) -> None:
        """One has come, perhaps again."""
        if self.to_come:
            self.to_come -= 1
            self._tell()

    def _tell(self) -> None:
        if not self.to_come:
            self._launcher.send(INBOX_TO_LAUNCHER.encode(link.Applied(self._number)))  # and so does the keeper
