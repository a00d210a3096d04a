"""The signals that the launcher is told by: SIGHUP to load the policy again, SIGTERM and SIGINT to stop.

Runs in: launcher.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType

_SIGNALS = (signal.SIGHUP, signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """We are told to stop. No Exception: whoever takes these for errors of its own lets this one pass."""


class Signals:
    """Their numbers come through a pipe. Only what may be broken off hears of a signal before that is read."""

    def __init__(self) -> None:
        self._stops = self._breaks_off = False
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def catch(self) -> None:
        """From now on; none of them ends the process any more."""
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, self._note)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._stops |= number != signal.SIGHUP
        if self._stops and self._breaks_off:
            self._breaks_off = False  # once is enough
            raise Stopped

    @contextlib.contextmanager
    def breaking_off(self) -> Iterator[None]:
        """Raises Stopped within the block as soon as a signal to stop comes or if one has come; `read` has it as well.

        It can come at any instruction: the block must do nothing that is to be undone.
        """
        said = sys.unraisablehook  # for what a finalizer raises

        def say(lost: sys.UnraisableHookArgs) -> None:
            """Not that a stop came in a finalizer, which swallows it, or just when a file had been opened."""
            if not (self._stops and isinstance(lost.exc_value, Stopped | ResourceWarning)):
                said(lost)

        self._breaks_off, sys.unraisablehook = True, say
        try:
            if self._stops:
                raise Stopped
            yield
        finally:
            self._breaks_off, sys.unraisablehook = False, said

    def ignore(self) -> None:
        """For good: at its own end Python would give them back what they did, which is to kill."""
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def fileno(self) -> int:
        """For epoll."""
        return self._read

    def read(self) -> bytes:
        """The numbers that came since the last time."""
        try:
            return os.read(self._read, 64)
        except BlockingIOError:
            return b""

    def close(self) -> None:
        """Close the pipe."""
        os.close(self._read)
        os.close(self._write)
