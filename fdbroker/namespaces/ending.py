"""Letting go of mount namespaces: with the last descriptor of one go its file systems, in whoever closes that.

Runs in: namespaces worker, and a child of it for each owner that has some to let go of. A client controls how long that
takes: a tmpfs with a million files takes seconds. All other types of namespaces are ended by the kernel's own workers.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence

from fdbroker.kernel import lifeline
from fdbroker.limits import namespaces as limits

_AT_ONCE = limits.NAMESPACE_REQUESTS


class Ending:
    """Closes descriptors that may be the last of a mount namespace, by one process for each owner at a time.

    While that process runs, what is put for the same owner waits here, and `held` says how much.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, list[int]] = {}  # by owner; the owners in turn
        self._processes: dict[int, int] = {}  # by owner

    def put(self, owner: int, descriptors: Sequence[int]) -> None:
        """Take these, to be closed by another process."""
        if descriptors:
            self._waiting.setdefault(owner, []).extend(descriptors)

    def held(self, owner: int) -> int:
        """How many of that owner's wait."""
        return len(self._waiting.get(owner, ()))

    @property
    def busy(self) -> bool:
        """Whether `go_on` has to be called again."""
        return bool(self._waiting or self._processes)

    def go_on(self, leave: Callable[[], None]) -> None:
        """Start a process for each owner that has none, as far as there is room.

        The process calls `leave` first, which closes what it has inherited and this object does not know.
        """
        self._processes = {owner: process for owner, process in self._processes.items() if not reap(process)}
        for owner in [owner for owner in self._waiting if owner not in self._processes]:
            if len(self._processes) >= _AT_ONCE:
                return
            try:
                self._start(owner, leave)
            except OSError:  # no process or descriptor is left for us: the next time
                return

    def _start(self, owner: int, leave: Callable[[], None]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            process = os.fork()
            descriptors = self._waiting.pop(owner)
            if process == 0:
                try:
                    leave()
                    ours.close()
                    self.close()
                    theirs.recv(1)  # the end: the worker has closed its copies, which were not the last
                    _close(descriptors)
                except Exception as error:  # noqa: BLE001 -- the process ends here, so nobody else would tell
                    sys.excepthook(type(error), error, error.__traceback__)
                finally:
                    os._exit(0)
            self._processes[owner] = process
            _close(descriptors)

    def close(self) -> None:
        """Close all that waits, in a process that has only a copy of it."""
        for descriptors in self._waiting.values():
            _close(descriptors)
        self._waiting = {}


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def reap(process: int) -> bool:
    """Whether that child has ended. One that its filter killed is reported, for its client learns only of a failure."""
    found, status = os.waitpid(process, os.WNOHANG)
    code = os.waitstatus_to_exitcode(status)
    if found and code == -signal.SIGSYS:
        os.write(2, f"fdbroker: a child of the namespaces worker {lifeline.how_ended(process, code)}\n".encode())
    return bool(found)
