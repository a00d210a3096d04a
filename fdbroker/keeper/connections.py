"""Who is connected, as the opener says, what the policy lets each list, and what each owner had looked at.

Runs in: keeper. An attacker controls how often it asks, and with how many of its user's uids and connections.
"""

from __future__ import annotations

from fdbroker.bucket import Bucket
from fdbroker.policy.decide import View
from fdbroker.terms import Subject
from fdbroker.wire.lists import turned


class Connection:
    """One client: its number, who it is, and the listing that it waits for. Compared by identity."""

    __slots__ = ("number", "state", "subject", "view", "work")

    def __init__(self, number: int, subject: Subject, seen: View, work: Bucket) -> None:
        self.number = number
        self.subject = subject
        self.view = seen
        self.work = work  # of its owner
        self.state = "idle"  # one of lists.STATES

    def turn(self, event: str) -> None:
        """Something happens on it. Raises LinkViolation when that is out of turn."""
        self.state = turned(self.number, self.state, event)

    def take(self, now_s: float) -> int:
        """One List more: 0, or in how many milliseconds there may be one, when the nodes of those before are owed."""
        return self.work.take(self.view.limits["requests_per_second"], self.view.limits["burst"], now_s)

    def charge(self, now_s: float, nodes: int) -> None:
        """So many nodes were looked at for it."""
        self.work.charge(self.view.limits["requests_per_second"], self.view.limits["burst"], now_s, nodes)
