"""The worker's loop: each question is answered by a child of its own, in its own time.

Runs in: namespaces worker. A taken-over opener controls the questions. A client can stop or kill the child that makes
a namespace in its user namespace; then that child alone is lost, and its question fails.
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
from typing import NamedTuple

from fdbroker import limits
from fdbroker.errors import LinkViolation, OpenFailed, Refused
from fdbroker.kernel import confine, lifeline
from fdbroker.kernel.link import Link
from fdbroker.namespaces.answer import answer
from fdbroker.wire import worker

_to_opener = worker.FROM_WORKER.encode
_CHILD_S = limits.NAMESPACE_SECONDS
_CHILDREN = limits.NAMESPACE_REQUESTS
_REAP_S = 0.05


class _Child(NamedTuple):
    process: int
    link: Link
    request: int
    until_s: float


class Worker:
    """Answers what the opener asks. `permitted` are the capabilities that it may raise."""

    def __init__(self, opener: Link, permitted: frozenset[str]) -> None:
        self._opener = opener
        self._permitted = permitted
        self._children: dict[int, _Child] = {}  # by descriptor; in order of time
        self._ended: list[int] = []  # processes, killed or not, of which the kernel has not told the end

    def serve(self) -> None:
        """Serve until the opener closes its end. Raises LinkViolation when it asks what it must not."""
        self._poll = select.epoll()
        self._poll.register(self._opener.fileno(), select.EPOLLIN)
        try:
            self._serve(self._poll)
        finally:
            for child in list(self._children.values()):
                self._forget(child)

    def _serve(self, poll: select.epoll) -> None:
        while True:
            # what was asked of a worker before this one may still wait, beside what the opener asks of this one
            poll.modify(self._opener.fileno(), select.EPOLLIN if len(self._children) < _CHILDREN else 0)
            for descriptor, _ in poll.poll(self._timeout_s()):
                if descriptor == self._opener.fileno():
                    if not self._read():
                        return
                else:
                    self._answered(self._children[descriptor])
            for child in list(self._children.values()):
                if child.until_s <= time.monotonic():
                    self._forget(child)
                    self._fail(child, errno.ETIMEDOUT)
            self._ended = [process for process in self._ended if not _reap(process)]

    def _timeout_s(self) -> float:
        if self._ended:
            return _REAP_S
        for child in self._children.values():
            return max(0.0, child.until_s - time.monotonic())
        return -1

    def _read(self) -> bool:
        received = self._opener.receive_with_descriptors(1)
        if received is None:
            return True
        data, descriptors = received
        try:
            if not data:
                return False
            ask = worker.TO_WORKER.decode(data)
            self._start(ask, descriptors[0] if descriptors else None)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return True

    def _start(self, ask: worker.Ask, caller: int | None) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent, until_s = os.getpid(), time.monotonic() + _CHILD_S
        try:
            process = os.fork()
        except OSError as error:  # no process is left for us: a reason to fail this one question
            ours.close()
            theirs.close()
            self._opener.send(_to_opener(worker.Failed(ask.request, OpenFailed(error.errno or errno.EAGAIN))))
            return
        if process == 0:
            self._be_child(ask, caller, ours, Link(theirs), parent, until_s)
        theirs.close()
        with contextlib.suppress(PermissionError):  # it was the first to do that, and runs another program by now
            os.setpgid(process, process)
        child = _Child(process, Link(ours), ask.request, until_s)
        self._children[child.link.fileno()] = child
        self._poll.register(child.link.fileno(), select.EPOLLIN)

    def _be_child(
        self, ask: worker.Ask, caller: int | None, ours: socket.socket, out: Link, parent: int, until_s: float
    ) -> None:
        """Answer one question in this forked process, before `until_s`; never returns."""
        code = 1
        try:
            os.setpgid(0, 0)  # whoever of the two comes first
            confine.die_with(parent)
            # what it does, it does without a way to the opener or to the other children
            ours.close()
            self._opener.close()
            self._poll.close()
            for other in self._children.values():
                other.link.close()
            try:
                made, descriptors = answer(ask, caller, self._permitted, until_s)
                message = _to_opener(made)
            except Refused as refusal:
                message, descriptors = _to_opener(worker.Failed(ask.request, refusal)), []
            except OSError as error:
                failed = OpenFailed(error.errno or errno.EIO)
                message, descriptors = _to_opener(worker.Failed(ask.request, failed)), []
            out.send_with_descriptors(message, descriptors)
            code = 0
        except Exception as error:  # noqa: BLE001 -- said here, for nothing above us does
            sys.excepthook(type(error), error, error.__traceback__)
        finally:
            os._exit(code)

    def _answered(self, child: _Child) -> None:
        """Pass on what a child says, which is its last word."""
        received = child.link.receive_with_descriptors(2)
        if received is None:
            return
        self._forget(child)
        data, descriptors = received
        try:
            if not data or worker.request_of(worker.FROM_WORKER.decode(data)) != child.request:
                self._fail(child, errno.EIO)
            elif not self._opener.send_with_descriptors(data, descriptors):
                raise LinkViolation("the opener does not read")
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _fail(self, child: _Child, number: int) -> None:
        self._opener.send(_to_opener(worker.Failed(child.request, OpenFailed(number))))

    def _forget(self, child: _Child) -> None:
        """End a child, if it has not ended by itself, and its own: the group is theirs, and nobody can leave it."""
        del self._children[child.link.fileno()]
        self._poll.unregister(child.link.fileno())
        child.link.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.process, signal.SIGKILL)
        self._ended.append(child.process)  # waited for without waiting: it may be stuck in the kernel


def _reap(process: int) -> bool:
    """Whether that child has ended; its filter's work is said, for the client learns no more than that it failed."""
    found, status = os.waitpid(process, os.WNOHANG)
    code = os.waitstatus_to_exitcode(status)
    if found and code == -signal.SIGSYS:
        os.write(2, f"fdbroker: a child of the namespaces worker {lifeline.how_ended(process, code)}\n".encode())
    return bool(found)
