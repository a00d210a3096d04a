"""What only the namespaces worker can open: ask it once for each request, and never wait.

Runs in: opener. The worker sees to the turns of the owners, and to the time: namespaces/queue.py. A taken-over worker
controls what it answers, or that it answers nothing: another descriptor than was asked for, but no other client, and
nothing of the opener's own.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import time
from collections import deque
from collections.abc import Callable

from fdbroker.kernel import sockets
from fdbroker.kernel.link import Link
from fdbroker.limits import opener as limits
from fdbroker.opener.request import Opening
from fdbroker.policy.owners import Owners
from fdbroker.refusals import LinkViolation, OpenFailed, RateLimited, Refused
from fdbroker.terms import Grant, Namespace, NamespaceRule
from fdbroker.wire import worker

_SILENT_S = limits.NAMESPACE_WAIT_SECONDS + 1.0  # the worker gives a request up by itself a second before that
_STOP_S = 2.0  # when the service stops


class Asking:
    """The opener's end of the link to the worker, which it takes; without one nothing may be asked.

    `owners` is the policy's table of owners, by which the worker tells the processes of one. `answered` is called when
    the worker has no more to do for an Open: all is open, or it is to be refused.
    """

    answered: Callable[[Opening, Refused | None], None]

    def __init__(self, to_worker: Link | None) -> None:
        self.owners = Owners()
        self._link = to_worker
        self._wait_s = _SILENT_S
        self._last = 0
        self._asked: dict[int, tuple[Opening, float]] = {}  # by number, the oldest first; each until when
        self._unsent: deque[int] = deque()  # of these, for which there was no room in the link
        self._stuck = False

    def fileno(self) -> int:
        """For epoll; -1 without a worker."""
        return -1 if self._link is None else self._link.fileno()

    def poll(self, epoll: select.epoll) -> None:
        """Have `epoll` tell when there is something to `read`, or room for what was not sent."""
        if self._link is not None:
            self._link.poll(epoll, write=bool(self._unsent))

    @property
    def timeout_s(self) -> float:
        """Until somebody has waited too long; -1 for ever."""
        return max(0.0, next(iter(self._asked.values()))[1] - time.monotonic()) if self._asked else -1

    def ask(self, opening: Opening) -> None:
        """Have what is missing opened."""
        self._last += 1
        self._asked[self._last] = opening, time.monotonic() + self._wait_s
        self._unsent.append(self._last)
        self._send()

    def hurry(self) -> None:
        """The service stops: whoever still waits in two seconds is refused, and the worker is not ended for that."""
        self._stuck, self._wait_s = True, _STOP_S
        most_s = time.monotonic() + _STOP_S
        self._asked = {number: (opening, min(until_s, most_s)) for number, (opening, until_s) in self._asked.items()}

    def _send(self) -> None:
        """Put the questions for which there is room, each with the pidfd of who asks."""
        while self._link is not None and self._unsent:
            number = self._unsent[0]
            opening, pidfd = self._asked[number][0], None
            try:
                pidfd = sockets.peer_pidfd(opening.connection.sock)
                pidfds = [] if pidfd is None else [pidfd]
                if not self._link.send_with_descriptors(self._question(number, opening), pidfds):
                    return
                self._unsent.popleft()
            except OSError:  # no descriptor is left for it; or the worker is gone, which `read` finds
                self._end(number, RateLimited(limits.BUSY_RETRY_MS, "busy"))
            finally:
                if pidfd is not None:
                    os.close(pidfd)

    def _question(self, number: int, opening: Opening) -> bytes:
        subject, wanted = opening.connection.subject, []
        for index, resource in opening.missing().items():
            rule = opening.permits[index].rules[0]
            wanted.append(worker.Wanted(resource, rule.uplink if isinstance(rule, NamespaceRule) else None))
        known, maximum = opening.connection.account.namespaces, opening.view.limits["namespaces"]
        uids = ((subject.uid, subject.uid), *self.owners.uids(subject.owner))[: worker.RANGES]
        ask = worker.Ask(number, subject.uid, subject.owner, tuple(wanted), known, maximum, uids)
        return worker.TO_WORKER.encode(ask)

    def read(self) -> None:
        """Say and take what can be. Raises LinkViolation for what the worker must not say, and when it is gone."""
        self._send()
        while self._link is not None and (received := self._link.receive_whole(worker.DESCRIPTORS)) is not None:
            data, descriptors = received
            if not data:
                raise LinkViolation("the namespaces worker is gone")
            try:
                self._take(worker.FROM_WORKER.decode(data), descriptors)
            finally:
                for descriptor in descriptors or ():
                    os.close(descriptor)

    def _take(self, said: worker.Answer, descriptors: list[int] | None) -> None:
        """One answer; descriptors that are granted are taken out of `descriptors`, None when no room was left here."""
        if isinstance(said, worker.Lost):
            self._stuck = False
            for number in list(self._asked):
                self._end(number, OpenFailed(errno.ECONNRESET))
        elif said.request in self._asked:  # else asked of the worker before this one, or given up
            if isinstance(said, worker.Failed):
                if descriptors:
                    raise LinkViolation("a refusal with a descriptor")
                self._end(said.request, said.refusal)
            elif descriptors is None:
                self._end(said.request, OpenFailed(errno.EMFILE))
            else:
                self._grant(self._asked[said.request][0], said, descriptors)
                self._end(said.request, None)

    @staticmethod
    def _grant(opening: Opening, made: worker.Made, descriptors: list[int]) -> None:
        """Name the descriptors by what was asked for, of which they must be as many."""
        missing = opening.missing()
        owned = [index for index, one in missing.items() if isinstance(one, Namespace) and one.pid]
        if len(made.opened) != len(missing) or len(descriptors) != len(missing) + len(owned):
            raise LinkViolation(f"{len(descriptors)} descriptors for {next(iter(missing.values())).text}")
        opening.connection.account.namespaces = made.known
        opening.owners.update(zip(owned, descriptors[len(missing) :], strict=True))
        opening.descriptors.update(zip(missing, descriptors, strict=False))
        descriptors.clear()
        for (index, resource), (inode, unusable) in zip(missing.items(), made.opened, strict=True):
            grant = Grant(resource, opening.permits[index].rules[0])
            if isinstance(resource, Namespace):
                grant = grant._replace(inode=f"{resource.type}:[{inode}]", unusable=worker.UNUSABLE[unusable])
            opening.grants[index] = grant

    def _end(self, number: int, refusal: Refused | None) -> None:
        """That is done with; a refusal's index is one of what the worker was asked for."""
        opening = self._asked.pop(number)[0]
        with contextlib.suppress(ValueError):
            self._unsent.remove(number)  # otherwise `poll` would go on asking for EPOLLOUT
        if refusal is not None:
            missing, index = [*opening.missing()], refusal.index or 0
            if index >= len(missing):
                raise LinkViolation(f"a refusal of resource {index} of {len(missing)}")
            refusal.index = missing[index]
        self.answered(opening, refusal)

    def expire(self) -> bool:
        """Refuse those that waited too long. Returns whether the worker is to be ended, for it answers nothing."""
        late = [number for number, (_, until_s) in self._asked.items() if until_s <= time.monotonic()]
        for number in late:
            self._end(number, OpenFailed(errno.ETIMEDOUT))
        stuck = bool(late) and not self._stuck
        self._stuck |= stuck  # until it says that it was started again
        return stuck
