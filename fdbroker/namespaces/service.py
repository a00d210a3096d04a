"""The worker's loop: requests in, a child for each question of them, in its own time, and one answer for all out.

Runs in: namespaces worker. A taken-over opener controls the requests. A client can stop or kill the child that makes
a namespace in its user namespace; then that child alone is lost, and its request fails.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import sys
import time
from collections import deque
from itertools import islice
from typing import NamedTuple

from fdbroker.errors import LinkViolation, OpenFailed, RateLimited, Refused
from fdbroker.kernel import confine
from fdbroker.kernel.link import Link
from fdbroker.limits import namespaces as limits
from fdbroker.limits.opener import BUSY_RETRY_MS, NAMESPACE_WAIT_SECONDS
from fdbroker.namespaces.answer import Unfinished, answer
from fdbroker.namespaces.ending import Ending, reap
from fdbroker.namespaces.queue import Queue, Request
from fdbroker.wire import worker

_to_opener = worker.FROM_WORKER.encode
_CHILD_S = limits.NAMESPACE_SECONDS
_WAIT_S = NAMESPACE_WAIT_SECONDS
_HELD = limits.NAMESPACE_HELD
_BUSY_MS = BUSY_RETRY_MS
_LIVING_S, _RESTS = limits.LIVING_SECONDS, limits.LIVING_RESTS
_REAP_S = 0.05


class _Child(NamedTuple):
    process: int
    link: Link
    request: Request
    until_s: float
    looks: bool  # at what the owner's processes hold


class Worker:
    """Answers what the opener asks. `permitted` are the capabilities that it may raise."""

    def __init__(self, opener: Link, permitted: frozenset[str]) -> None:
        self._opener = opener
        self._permitted = permitted
        self._queue = Queue()
        self._ending = Ending()
        self._requests: dict[int, Request] = {}  # by number, in order of time; what is not answered
        self._answers: deque[tuple[Request, worker.Answer]] = deque()  # for which there was no room in the link
        self._known: dict[int, tuple[int, ...]] = {}  # by owner: inode numbers of those made that may be living
        self._rests: dict[int, float] = {}  # by owner: until when it gets no new one, for it was looked for long
        self._children: dict[int, _Child] = {}  # by descriptor; in order of time
        self._ended: list[int] = []  # processes, killed or not, of which the kernel has not told the end

    def serve(self) -> None:
        """Serve until the opener closes its end. Raises LinkViolation when it asks what it must not."""
        self._poll = select.epoll()
        try:
            self._serve(self._poll)
        finally:
            for child in list(self._children.values()):
                self._forget(child)

    def _serve(self, poll: select.epoll) -> None:
        while True:
            begun = self._begin()  # one at a time: who asks is heard meanwhile
            self._opener.poll(poll, write=bool(self._answers))
            for descriptor, events in poll.poll(0 if begun else self._timeout_s()):
                if descriptor != self._opener.fileno():
                    self._answered(self._children[descriptor])
                elif events & ~select.EPOLLOUT and not self._read():
                    return
            self._expire()
            self._send()
            self._ended = [process for process in self._ended if not reap(process)]
            self._ending.go_on(self._leave)

    def _timeout_s(self) -> float:
        if self._ended or self._ending.busy:
            return _REAP_S
        ends_s = [child.until_s for child in self._children.values()]
        ends_s += [request.until_s for request in islice(self._requests.values(), 1)]
        ends_s += self._resting().values()
        return max(0.0, min(ends_s) - time.monotonic()) if ends_s else -1

    def _resting(self) -> dict[int, float]:
        now_s = time.monotonic()
        self._rests = {owner: until_s for owner, until_s in self._rests.items() if until_s > now_s}
        return self._rests

    def _expire(self) -> None:
        """Give up what takes too long. A child of a request that has ended so keeps its own time, and its place."""
        now_s = time.monotonic()
        for child in list(self._children.values()):
            if child.until_s <= now_s:
                if child.request.mounts:  # it may be saying something just now
                    with contextlib.suppress(OSError):
                        self._ending.put(child.request.ask.owner, [os.dup(child.link.fileno())])
                self._forget(child)
                self._refuse(child.request, OpenFailed(errno.ETIMEDOUT))
        for request in list(self._requests.values()):
            if request.until_s > now_s:
                break
            self._refuse(request, OpenFailed(errno.ETIMEDOUT))

    # ---- the opener's link

    def _read(self) -> bool:
        """Take all that the opener asks now; false when it has closed its end."""
        while (received := self._opener.receive_whole(1)) is not None:
            data, descriptors = received
            if not data:
                return False
            callers = descriptors or []
            try:
                ask = worker.TO_WORKER.decode(data)
                if ask.request in self._requests:
                    raise LinkViolation(f"request {ask.request} is asked twice")
                request = Request(ask, callers.pop() if callers else None, time.monotonic() + _WAIT_S)
            finally:
                for caller in callers:
                    os.close(caller)
            self._requests[ask.request] = request
            if known := dict.fromkeys((*ask.known, *self._known.get(ask.owner, ()))):  # a worker before this one knew
                self._known[ask.owner] = tuple(known)
            self._queue.put(request)
            if descriptors is None:  # none is left for the pidfd
                self._refuse(request, RateLimited(_BUSY_MS, "busy"))
        return True

    def _refuse(self, request: Request, refusal: Refused) -> None:
        if self._requests.pop(request.ask.request, None) is not None:  # else it has ended before
            self._queue.remove(request)
            refusal.index = len(request.opened)
            self._close(request)
            self._answers.append((request, worker.Failed(request.ask.request, refusal)))

    def _grant(self, request: Request) -> None:
        del self._requests[request.ask.request]
        known = self._known.get(request.ask.owner, ())[-worker.KNOWN :]
        self._answers.append((request, worker.Made(request.ask.request, tuple(request.opened), known)))

    def _send(self) -> None:
        """Answer as far as there is room."""
        while self._answers:
            request, said = self._answers[0]
            try:
                if not self._opener.send_with_descriptors(_to_opener(said), (*request.descriptors, *request.pidfds)):
                    return
            except OSError as error:
                if error.errno != errno.ETOOMANYREFS:
                    raise
                said = worker.Failed(request.ask.request, RateLimited(_BUSY_MS, "in flight"))
                self._answers[0] = request, said  # without its descriptors
            else:
                self._answers.popleft()
            self._close(request)

    def _close(self, request: Request) -> None:
        """Close what it holds; never, here, the last descriptor of a mount namespace."""
        self._ending.put(request.ask.owner, request.give_mounts())
        request.close()

    # ---- the children

    def _begin(self) -> bool:
        """Put the next question, if one may be put now, and the opener takes the answers that wait for it."""
        request = None if self._answers else self._queue.next(self._resting())
        if request is None:
            return False
        if self._ending.held(request.ask.owner) > _HELD:
            return self._refuse_busy(request)
        if self._queue.held(request.ask.owner) > _HELD:  # by the owner's others: taken from everybody
            return self._refuse_busy(request)
        try:
            self._start(request)
        except OSError as error:  # no process or descriptor is left for us: a reason to fail this one request
            self._queue.over(request)
            self._refuse(request, OpenFailed(error.errno or errno.EAGAIN))
        return True

    def _refuse_busy(self, request: Request) -> bool:
        self._queue.over(request)
        self._refuse(request, RateLimited(_BUSY_MS, "busy"))
        return True

    def _start(self, request: Request) -> None:
        wanted = request.ask.wanted[len(request.opened)]
        ask = request.ask._replace(wanted=(wanted,), known=self._known.get(request.ask.owner, ()))
        parent, until_s = os.getpid(), time.monotonic() + _CHILD_S
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            process = os.fork()
        except OSError:
            ours.close()
            theirs.close()
            raise
        if process == 0:
            self._be_child(request, ask, ours, Link(theirs), parent, until_s)
        theirs.close()
        with contextlib.suppress(PermissionError):  # it was the first to do that, and runs another program by now
            os.setpgid(process, process)
        looks = request.makes and len(ask.known) >= ask.maximum
        child = _Child(process, Link(ours), request, until_s, looks)
        self._children[child.link.fileno()] = child
        self._poll.register(child.link.fileno(), select.EPOLLIN)

    def _be_child(
        self, request: Request, ask: worker.Ask, ours: socket.socket, out: Link, parent: int, until_s: float
    ) -> None:
        """Answer one question in this forked process, before `until_s`; never returns."""
        code = 1
        try:
            os.setpgid(0, 0)  # whoever of the two comes first
            confine.die_with(parent)
            # what it does, it does without a way to the opener or to the other children, and with nothing of others'
            ours.close()
            caller, request.caller = request.caller, None
            waiting = [one for one in self._unanswered() if one.ask.owner == ask.owner]
            held = frozenset(opened.inode for one in waiting for opened in one.opened)
            self._leave()
            self._ending.close()
            try:
                made, descriptors = answer(ask, caller, self._permitted, until_s, held)
                message = _to_opener(made)
            except (Unfinished, Refused, OSError) as error:
                why, known = (error.why, error.known) if isinstance(error, Unfinished) else (error, ())
                refusal = why if isinstance(why, Refused) else OpenFailed(why.errno or errno.EIO)
                message, descriptors = _to_opener(worker.Failed(ask.request, refusal, known[-worker.KNOWN :])), []
            out.send_with_descriptors(message, descriptors)
            code = 0
        except Exception as error:  # noqa: BLE001 -- said here, for nothing above us does
            sys.excepthook(type(error), error, error.__traceback__)
        finally:
            os._exit(code)

    def _unanswered(self) -> list[Request]:
        return [*self._requests.values(), *(one for one, _ in self._answers)]

    def _leave(self) -> None:
        """Close a forked process's copies of the links to opener and children, and of the unanswered requests."""
        self._opener.close()
        self._poll.close()
        for child in self._children.values():
            child.link.close()
        for request in self._unanswered():
            request.close()

    def _answered(self, child: _Child) -> None:
        """What a child says, which is its last word: the request has its next question, or is answered."""
        received = child.link.receive_whole(2)
        if received is None:
            return
        self._forget(child)
        request, (data, descriptors) = child.request, received
        try:
            said = worker.FROM_WORKER.decode(data) if data else None
            if said is not None and not isinstance(said, worker.Lost) and said.known:
                self._known[request.ask.owner] = said.known
            if isinstance(said, worker.Failed):
                self._refuse(request, said.refusal)
            elif not isinstance(said, worker.Made) or descriptors is None:  # it was killed; or no descriptor is left
                self._refuse(request, OpenFailed(errno.EIO if descriptors is not None else errno.EMFILE))
            elif len(said.opened) != 1 or len(descriptors) != 1 + request.of_process:
                self._refuse(request, OpenFailed(errno.EIO))
            elif request.ask.request in self._requests:
                request.take(said.opened[0], descriptors)
                descriptors.clear()
                (self._grant if request.complete else self._queue.put)(request)
        finally:
            if descriptors and request.mounts:
                self._ending.put(request.ask.owner, descriptors)
                descriptors = None
            for descriptor in descriptors or ():
                os.close(descriptor)

    def _forget(self, child: _Child) -> None:
        """End a child, if it has not ended by itself, and its own: the group is theirs, and nobody can leave it.

        What it took to look is the owner's: its next new namespace waits some times as long.
        """
        if child.looks:
            now_s = time.monotonic()
            took_s = min(now_s - child.until_s + _CHILD_S, _LIVING_S)
            self._rests[child.request.ask.owner] = now_s + _RESTS * took_s
        del self._children[child.link.fileno()]
        self._queue.over(child.request)
        self._poll.unregister(child.link.fileno())
        child.link.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.process, signal.SIGKILL)
        self._ended.append(child.process)  # waited for without waiting: it may be stuck in the kernel
