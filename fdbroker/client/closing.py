"""Closing what came with messages, in threads: close(2) can wait for as long as the sender likes.

Runs in: any program. A sender controls what its descriptors are: closing a file of a FUSE file system asks its program,
which may never answer. What one user has sent is closed in the order in which it came, and holds up itself alone.

A closing that waits has let go of its number already. What is still in the queue at a fork stays open in the child,
which has no such thread; at the end of the process the kernel closes it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections import deque
from collections.abc import Iterable
from functools import partial

from fdbroker.kernel.jobs import Jobs
from fdbroker.limits import client as limits

_UNKNOWN = -1  # whose a closing is where no message says it
# Descriptors that come faster than threads close them would fill the process's table. Above so many of one sender the
# receiver lets the threads get on, in short steps, until half are closed. Where they do not get on, one waits in the
# kernel: the receiver goes on, for a while without looking.
_AHEAD, _STEP_S, _STEPS, _NOT_AGAIN_S = 128, 0.0002, 20, 0.1


class Closing:
    """The descriptors that are still to be closed, by sender."""

    def __init__(self) -> None:
        self._jobs = Jobs(limits.RECEIVED_THREADS, limits.RECEIVED_STUCK)
        self._waiting: dict[int, deque[int]] = {}
        self._behind: dict[int, float] = {}  # senders, of whom some wait in the kernel: until when not to look
        self._lock = self._jobs.lock

    def put(self, numbers: Iterable[int], sender: int) -> None:
        """Have them closed after what else came from that sender."""
        with self._lock:
            waiting = self._waiting.setdefault(sender, deque())
            waiting.extend(number for number in numbers if number >= 0)
            if sender in self._jobs.waiting:
                self._jobs.start()
            else:
                self._jobs.put(sender, partial(self._close, sender))
        if len(waiting) > _AHEAD:
            self._keep_pace(sender, waiting)

    def _keep_pace(self, sender: int, waiting: deque[int]) -> None:
        if time.monotonic() < self._behind.get(sender, 0):
            return
        for _ in range(_STEPS):
            time.sleep(_STEP_S)
            if len(waiting) <= _AHEAD // 2:
                self._behind.pop(sender, None)
                return
        self._behind[sender] = time.monotonic() + _NOT_AGAIN_S

    def _close(self, sender: int) -> None:
        while (waiting := self._waiting.get(sender)) is not None:
            try:
                number = waiting.popleft()
            except IndexError:
                with self._lock:
                    if not waiting and self._waiting.get(sender) is waiting:
                        del self._waiting[sender]
                        self._behind.pop(sender, None)
            else:
                _close(number)


def _close(number: int) -> None:
    with contextlib.suppress(OSError):  # what the file's owner says to it; the number is free all the same
        os.close(number)


_closing = Closing()


def _forked() -> None:
    """The child has neither the threads nor who held a lock, and of a number that was taken it cannot know."""
    global _closing  # noqa: PLW0603 -- one for each process
    _closing = Closing()


os.register_at_fork(after_in_child=_forked)


def close_later(numbers: Iterable[int], sender: int = _UNKNOWN) -> None:
    """Close these, which are nobody's from now on, after what else came from that user; takes 5 ms at most.

    Negative numbers are left out.
    """
    if not sys.is_finalizing():  # then no thread can start any more, and the kernel closes them in a moment
        _closing.put(numbers, sender)
