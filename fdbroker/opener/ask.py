"""What only the namespaces worker can open: ask for it, one question of each user at a time, and never wait.

Runs in: opener. An attacker controls how many questions there are, and how long its own take. A taken-over worker
controls what it answers: another descriptor than was asked for, but no other client, and nothing of the opener's own.
"""

from __future__ import annotations

import errno
import os
import time
from collections import deque
from typing import NamedTuple

from fdbroker import limits
from fdbroker.kernel import sockets
from fdbroker.kernel.link import Link
from fdbroker.opener.authorize import Connection
from fdbroker.opener.request import Opening
from fdbroker.policy.owners import Owners
from fdbroker.refusals import LinkViolation, OpenFailed, RateLimited, Refused
from fdbroker.terms import Device, Grant, Namespace, NamespaceRule
from fdbroker.wire import worker

_REQUESTS = limits.NAMESPACE_REQUESTS
_WAIT_S = limits.NAMESPACE_WAIT_SECONDS
_FOR_OTHERS = 4  # of these, for what no client can stop
_HELD = limits.NAMESPACE_HELD
_BUSY_MS = limits.BUSY_RETRY_MS
_HURRY_S = 2.0  # when the service stops


def _makes(opening: Opening) -> bool:
    """Whether the next question of it is for a new namespace."""
    index = opening.missing()
    resource = None if index is None else opening.resources[index]
    return isinstance(resource, Namespace) and not resource.name and not resource.pid


class Answered(NamedTuple):
    """An Open for which the worker has no more to do: all is open, or it is to be refused."""

    opening: Opening
    refusal: Refused | None


class _Question(NamedTuple):
    opening: Opening
    position: int
    put_s: float
    until_s: float


class Asking:
    """The opener's end of the link to the worker, which it takes; without one nothing may be asked.

    `owners` is the policy's table of owners, by which the worker tells the processes of one.
    """

    def __init__(self, to_worker: Link | None) -> None:
        self.owners = Owners()
        self._link = to_worker
        self._last = 0
        self._waiting: dict[int, deque[tuple[Opening, float]]] = {}  # by owner, in turn; each until when
        self._asked: dict[int, _Question] = {}  # by number; what the worker has not answered
        self._gone: set[Opening] = set()  # nobody waits for these any more, but the worker does not know
        self._stuck = False
        self._ready: list[Answered] = []

    def fileno(self) -> int:
        """For epoll; -1 without a worker."""
        return -1 if self._link is None else self._link.fileno()

    @property
    def busy(self) -> bool:
        """Whether anybody waits for the worker."""
        return bool(self._asked or self._waiting)

    @property
    def timeout_s(self) -> float:
        """Until somebody has waited too long; -1 for ever."""
        ends = [asked.until_s for asked in self._asked.values() if asked.opening not in self._gone]
        ends += [asked.put_s + _WAIT_S for asked in self._asked.values() if not self._stuck]
        ends += [until_s for queue in self._waiting.values() for _, until_s in queue]
        return max(0.0, min(ends) - time.monotonic()) if ends else -1

    def ask(self, opening: Opening) -> None:
        """Have what is missing opened; `ready` returns it later."""
        self._queue(opening, time.monotonic() + _WAIT_S)
        self._ask_next()

    def _queue(self, opening: Opening, until_s: float) -> None:
        """Behind the owner's others: nobody holds up a program that asks for one by asking for many."""
        self._waiting.setdefault(opening.connection.subject.owner, deque()).append((opening, until_s))

    def drop(self, connection: Connection) -> None:
        """That client is gone: nothing more is asked for it, and what comes is closed."""
        for queue in self._waiting.values():
            for item in [item for item in queue if item[0].connection is connection]:
                queue.remove(item)
                item[0].close()
        self._gone.update(asked.opening for asked in self._asked.values() if asked.opening.connection is connection)

    def hurry(self) -> None:
        """The service stops: whoever still waits in two seconds is refused."""
        most_s = time.monotonic() + _HURRY_S
        for number, asked in self._asked.items():
            self._asked[number] = asked._replace(until_s=min(asked.until_s, most_s))
        for owner, queue in self._waiting.items():
            self._waiting[owner] = deque((opening, min(until_s, most_s)) for opening, until_s in queue)

    def _ask_next(self) -> None:
        """Put the questions that may be put now: of each owner one, in turn."""
        busy = {asked.opening.connection.subject.owner for asked in self._asked.values()}
        for owner in [owner for owner in self._waiting if owner not in busy]:
            if len(self._asked) >= _REQUESTS:
                return
            # who asks for a new one can stop the child that makes it: so never all places for those
            making = sum(_makes(asked.opening) for asked in self._asked.values())
            if making >= _REQUESTS - _FOR_OTHERS and self._waiting[owner] and _makes(self._waiting[owner][0][0]):
                continue
            queue = self._waiting.pop(owner)
            while queue:
                opening, until_s = queue.popleft()
                held = sum(len(other.descriptors) + len(other.owners) for other, _ in queue)
                if held <= _HELD:
                    self._put(opening, until_s)
                    break
                # what the user's other requests have open already is taken from everybody
                self._ready.append(Answered(opening, RateLimited(_BUSY_MS, "busy")))
            if queue:
                self._waiting[owner] = queue  # behind the others

    def _put(self, opening: Opening, until_s: float) -> None:
        index = opening.missing()
        if index is None or self._link is None:
            raise ValueError("there is nothing to ask, or nobody")
        connection, resource = opening.connection, opening.resources[index]
        if isinstance(resource, Device):
            raise TypeError("the worker opens no devices")
        self._last += 1
        question = worker.Ask(self._last, connection.subject.uid, resource, connection.subject.owner)
        rule = opening.allowed[index][0]
        if isinstance(rule, NamespaceRule) and rule.create:
            maximum = opening.view.limits["namespaces"]
            known = connection.account.namespaces[-worker.KNOWN :]
            uids = ((question.uid, question.uid), *self.owners.uids(question.owner))[: worker.RANGES]
            question = question._replace(known=known, maximum=maximum, uplink=rule.uplink, uids=uids)
        self._asked[self._last] = _Question(opening, index, time.monotonic(), until_s)
        if not self._send(self._link, worker.TO_WORKER.encode(question), connection):
            self._end(self._last, RateLimited(_BUSY_MS, "busy"))

    @staticmethod
    def _send(to_worker: Link, question: bytes, connection: Connection) -> bool:
        """With the pidfd of who asks; false when no descriptor is left for it, or no room."""
        try:
            pidfd = sockets.peer_pidfd(connection.sock)
            try:
                return to_worker.send_with_descriptors(question, [] if pidfd is None else [pidfd])
            finally:
                if pidfd is not None:
                    os.close(pidfd)
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.ECONNRESET):
                raise LinkViolation("the namespaces worker is gone") from None
            return False

    def ready(self) -> list[Answered]:
        """Those for which the worker has no more to do, each once."""
        ready, self._ready = self._ready, []
        return ready

    def read(self) -> None:
        """Take what the worker says. Raises LinkViolation for what it must not say, and when it is gone."""
        if self._link is None:
            return
        while (received := self._link.receive_whole(2)) is not None:
            data, descriptors = received
            if not data:
                raise LinkViolation("the namespaces worker is gone")
            if descriptors is None:
                number = worker.request_of(worker.FROM_WORKER.decode(data))
                if number in self._asked:
                    self._end(number, OpenFailed(errno.EMFILE))
                continue
            try:
                self._take(worker.FROM_WORKER.decode(data), descriptors)
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)
        self._ask_next()

    def _take(self, said: worker.Answer, descriptors: list[int]) -> None:
        """One answer; the descriptors that it brings are taken out of `descriptors`."""
        if isinstance(said, worker.Lost):
            self._stuck = False
            for number in list(self._asked):
                self._end(number, OpenFailed(errno.ECONNRESET))
            return
        number = worker.request_of(said)
        asked = self._asked.get(number)
        if asked is None:
            return  # asked of the worker before this one
        if isinstance(said, worker.Failed):
            if descriptors:
                raise LinkViolation("a refusal with a descriptor")
            self._end(number, said.refusal)
            return
        resource = asked.opening.resources[asked.position]
        of_process = isinstance(resource, Namespace) and bool(resource.pid)
        if len(descriptors) != 1 + of_process:
            raise LinkViolation(f"{len(descriptors)} descriptors for {resource.text}")
        self._note_living(asked, said)
        if asked.opening not in self._gone:
            if of_process:
                asked.opening.owners[asked.position] = descriptors.pop()
            asked.opening.descriptors[asked.position] = descriptors.pop()
            asked.opening.grants[asked.position] = self._grant(asked, said)
        self._end(number, None)

    @staticmethod
    def _note_living(asked: _Question, made: worker.Made) -> None:
        """Remember a new namespace, and forget those that are not any more."""
        account = asked.opening.connection.account
        rule = asked.opening.allowed[asked.position][0]
        if isinstance(rule, NamespaceRule) and rule.create:
            known = account.namespaces[-worker.KNOWN :]
            living = [inode for inode, lives in zip(known, made.living, strict=False) if lives and inode != made.inode]
            account.namespaces = (*living, made.inode)

    @staticmethod
    def _grant(asked: _Question, made: worker.Made) -> Grant:
        resource, rule = asked.opening.resources[asked.position], asked.opening.allowed[asked.position][0]
        if not isinstance(resource, Namespace):
            return Grant(resource, rule)
        unusable = None if made.unusable == worker.UNKNOWN else worker.UNUSABLE[made.unusable]
        return Grant(resource, rule, inode=f"{resource.type}:[{made.inode}]", unusable=unusable)

    def _end(self, number: int, refusal: Refused | None) -> None:
        """A question is done with: the opening goes on to the next one, to be finished, or to be refused."""
        asked = self._asked.pop(number)
        opening = asked.opening
        if opening in self._gone:
            self._gone.discard(opening)
            opening.close()
        elif refusal is not None:
            refusal.index = asked.position
            self._ready.append(Answered(opening, refusal))
        elif opening.missing() is None:
            self._ready.append(Answered(opening, None))
        else:
            self._queue(opening, asked.until_s)

    def expire(self) -> bool:
        """Refuse those that waited too long. Returns whether the worker is to be ended, for it answers nothing."""
        now_s = time.monotonic()
        for queue in self._waiting.values():
            for item in [item for item in queue if item[1] <= now_s]:
                queue.remove(item)
                self._ready.append(Answered(item[0], OpenFailed(errno.ETIMEDOUT)))
        for asked in self._asked.values():
            if asked.until_s <= now_s and asked.opening not in self._gone:
                self._gone.add(asked.opening)
                self._ready.append(Answered(asked.opening, OpenFailed(errno.ETIMEDOUT, index=asked.position)))
        if self._stuck or not any(asked.put_s + _WAIT_S <= now_s for asked in self._asked.values()):
            return False
        self._stuck = True  # until it says that it was started again
        return True
