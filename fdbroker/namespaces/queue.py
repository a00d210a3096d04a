"""Whose question is next: of each owner one at a time, and the owners in turn.

Runs in: namespaces worker. An attacker controls how many requests there are, how much each wants, and how long the
answer to a question of its own takes.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Container, Sequence

from fdbroker.limits import namespaces as limits
from fdbroker.terms import Namespace
from fdbroker.wire.worker import Ask, Opened, Wanted

_AT_ONCE = limits.NAMESPACE_REQUESTS
_FOR_OTHERS = 4  # of these, for what no client can stop


class Request:
    """What a request wants of the worker. It is done by one question after the other, each for one resource.

    Owns `caller`, the pidfd of who asks, and what is open already: `descriptors`, and of processes the `pidfds`.
    """

    __slots__ = ("ask", "caller", "descriptors", "opened", "pidfds", "until_s")

    def __init__(self, ask: Ask, caller: int | None, until_s: float) -> None:
        self.ask = ask
        self.caller = caller
        self.until_s = until_s  # by the clock that the caller of all this goes by
        self.opened: list[Opened] = []
        self.descriptors: list[int] = []
        self.pidfds: list[int] = []

    @property
    def complete(self) -> bool:
        """Whether all is open."""
        return len(self.opened) == len(self.ask.wanted)

    @property
    def makes(self) -> bool:
        """Whether the next question, or the one that is being answered, is for a new namespace."""
        resource = self.ask.wanted[len(self.opened)].resource
        return isinstance(resource, Namespace) and not resource.name and not resource.pid

    @property
    def of_process(self) -> bool:
        """Whether that is for a namespace of a process, whose pidfd comes with it."""
        resource = self.ask.wanted[len(self.opened)].resource
        return isinstance(resource, Namespace) and bool(resource.pid)

    @property
    def mounts(self) -> bool:
        """Whether that is for a mount namespace, whose last descriptor may take long to close."""
        return _is_mounts(self.ask.wanted[len(self.opened)])

    @property
    def held(self) -> int:
        """How many descriptors are open for it."""
        return len(self.descriptors) + len(self.pidfds)

    def take(self, opened: Opened, descriptors: Sequence[int]) -> None:
        """The answer to the question; the descriptors are taken."""
        self.opened.append(opened)
        self.descriptors += descriptors[:1]
        self.pidfds += descriptors[1:]

    def give_mounts(self) -> list[int]:
        """The descriptors of mount namespaces, which it owns no more; then it can only be closed."""
        pairs = list(zip(self.descriptors, map(_is_mounts, self.ask.wanted), strict=False))
        self.descriptors = [descriptor for descriptor, slow in pairs if not slow]
        return [descriptor for descriptor, slow in pairs if slow]

    def close(self) -> None:
        """Close all that it owns, once."""
        for descriptor in (*self.descriptors, *self.pidfds, *(() if self.caller is None else (self.caller,))):
            os.close(descriptor)
        self.descriptors, self.pidfds, self.caller = [], [], None


def _is_mounts(wanted: Wanted) -> bool:
    return isinstance(wanted.resource, Namespace) and wanted.resource.type == "mnt"


class Queue:
    """The requests that wait for their next question to be put, and those whose question is being answered."""

    def __init__(self) -> None:
        self._waiting: dict[int, deque[Request]] = {}  # by owner; the owners in turn
        self._begun: dict[int, Request] = {}  # by owner

    def put(self, request: Request) -> None:
        """Behind the owner's others: nobody holds up a program that asks for one by asking for many."""
        self._waiting.setdefault(request.ask.owner, deque()).append(request)

    def remove(self, request: Request) -> None:
        """It need not wait any more; one whose question is being answered has its place until `over`."""
        queue = self._waiting.get(request.ask.owner, ())
        if request in queue:
            self._waiting[request.ask.owner].remove(request)
            if not queue:
                del self._waiting[request.ask.owner]

    def next(self, resting: Container[int] = ()) -> Request | None:
        """Whose next question may be put now, which counts as begun until it is `over`; None for nobody's.

        Owners that rest get no new namespace.
        """
        if len(self._begun) >= _AT_ONCE:
            return None
        # who asks for a new one can stop the child that makes it: so never all places for those
        full = sum(request.makes for request in self._begun.values()) >= _AT_ONCE - _FOR_OTHERS
        for owner, queue in self._waiting.items():
            if owner not in self._begun and not (queue[0].makes and (full or owner in resting)):
                request = self._begun[owner] = queue.popleft()
                del self._waiting[owner]
                if queue:
                    self._waiting[owner] = queue  # behind the others
                return request
        return None

    def over(self, request: Request) -> None:
        """Its question is done with."""
        del self._begun[request.ask.owner]

    def held(self, owner: int) -> int:
        """How many descriptors are open for those of the owner's requests that wait."""
        return sum(request.held for request in self._waiting.get(owner, ()))
