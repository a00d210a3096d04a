"""Work that can sleep in the kernel, in threads: opening and closing what has a driver, closing what others have sent.

Runs in: opener, inbox, refuser, and programs of users (`client/closing.py`). An attacker controls how long a job of its
own takes, and how many it has. The jobs of one owner are done one after the other, and those of several owners in turn,
so a slow owner holds up itself alone. One job can be what another one waits for: Jobs.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable

from fdbroker import refusals
from fdbroker.limits import opener as limits

Job = Callable[[], None]
_STUCK_S = limits.STUCK_SECONDS


class Jobs:
    """At most `threads_max` threads, and none while there is nothing to do.

    A job that has run for STUCK_SECONDS counts no more, neither among the threads nor for its owner, and up to
    `stuck_max` such jobs may be there, a quarter of them one owner's: what ends one can be the owner's next job. To
    close a file of a FUSE server, for example, can wait until the server's own descriptor is closed.

    A job must not raise: an exception, such as a capability that cannot be dropped, ends the whole process.
    """

    def __init__(self, threads_max: int, stuck_max: int = 0) -> None:
        self._threads_max = threads_max
        self._stuck_max = stuck_max
        self._threads = 0
        self._idle = 0  # threads that wait for a running job to become a stuck one
        self.waiting: dict[int, deque[Job]] = {}  # that have not begun, by owner; the owners take turns in this order
        self._running: dict[int, tuple[int, float]] = {}  # by thread: whose job, since when
        # re-entrant: a finalizer can put a job anywhere; whoever needs a lock beside it takes this one
        self.lock = threading.Condition(threading.RLock())

    def put(self, owner: int, *jobs: Job) -> None:
        """Have them done one after the other, after the owner's other jobs."""
        with self.lock:
            if jobs:
                self.waiting.setdefault(owner, deque()).extend(jobs)
            self.start()

    def start(self) -> None:
        """See that a thread works for all owners that wait; also when there was no thread to be had before."""
        with self.lock:
            if self._idle:
                if self._next() is not None:  # else it was woken for each job, to find nothing
                    self.lock.notify()
                return
            watching = bool(self._stuck_max)  # one thread more, which runs nothing before there is room
            if not self.waiting or not (watching or self._next() is not None):
                return
            if self._threads >= self._threads_max + len(self._stuck()) + watching:
                return
            self._threads += 1
            try:
                threading.Thread(target=self._work, daemon=True).start()
            except RuntimeError:  # at the limit of tasks: a thread that runs, or the next `start`, does it as well
                self._threads -= 1

    def _stuck(self) -> list[int]:
        """The owners of the jobs that count no more, each once for each of them."""
        now_s = time.monotonic()
        old = [owner for owner, since_s in self._running.values() if now_s - since_s >= _STUCK_S]
        return old[: self._stuck_max]

    def _next(self) -> int | None:
        """The next owner whose job may begin; None if there is none, or no room.

        That is one of which no job runs. While jobs are stuck, it is also one of which all that run are stuck.
        """
        running = [owner for owner, _ in self._running.values()]
        if len(running) < self._threads_max:
            for owner in self.waiting:
                if owner not in running:
                    return owner
        stuck = self._stuck()
        if not stuck or len(running) >= self._threads_max + len(stuck):
            return None
        more = len(stuck) < limits.shared(self._stuck_max)  # the rest is for owners without a stuck job
        for owner in self.waiting:
            mine = running.count(owner)
            if not mine or (more and mine == stuck.count(owner) < self._stuck_max // 4):
                return owner
        return None

    def _take(self) -> tuple[int, Job] | None:
        """The next owner, and its first job, which runs from now on; without one this thread is over."""
        with self.lock:
            while (owner := self._next()) is None:
                # one thread waits to see whether the jobs that run come to an end
                if self._idle or not self.waiting or not self._stuck_max:
                    self._threads -= 1
                    return None
                self._idle += 1
                self.lock.wait(_STUCK_S)
                self._idle -= 1
            jobs = self.waiting.pop(owner)
            job = jobs.popleft()
            if jobs:
                self.waiting[owner] = jobs  # behind the other owners
            self._running[threading.get_ident()] = owner, time.monotonic()
            self.start()  # another thread for whoever else waits
            return owner, job

    def _work(self) -> None:
        while (taken := self._take()) is not None:
            try:
                taken[1]()
            except BaseException as error:  # noqa: BLE001 -- nobody is above a thread to hear of it
                sys.excepthook(type(error), error, error.__traceback__)
                os._exit(refusals.EX_SOFTWARE)
            del taken  # what the job held must not wait for the next one
            with self.lock:
                del self._running[threading.get_ident()]
