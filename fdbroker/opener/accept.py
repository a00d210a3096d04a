"""Stage accept: connections in, a few at a time, and what happens when descriptors run out.

Runs in: opener. An attacker controls how many connections come and how fast.
"""

from __future__ import annotations

import errno
import os
import resource
import socket

from fdbroker.kernel.refusal import say_refusal
from fdbroker.opener.close import Closing
from fdbroker.refusals import QuotaExceeded
from fdbroker.terms import OTHERS

_OUT_OF = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class OutOfDescriptors(Exception):
    """No descriptor is left; the client that waited longest was told so. Accepting should pause."""


class Acceptor:
    """Accepts from the listening socket, which it takes. Keeps one descriptor in reserve to say a refusal with."""

    def __init__(self, listener: socket.socket, closing: Closing) -> None:
        self._listener = listener
        self._closing = closing
        self._reserve = self._open_reserve()

    def fileno(self) -> int:
        """For epoll."""
        return self._listener.fileno()

    def accept(self) -> socket.socket | None:
        """The next connection, owned by the caller, or None when none waits. Raises OutOfDescriptors."""
        try:
            # accept4 as Python makes it: close-on-exec; every read and write on it says MSG_DONTWAIT by itself
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return None
        except OSError as error:
            if error.errno not in _OUT_OF:
                raise
        else:
            return sock
        self.turn_one_away()
        raise OutOfDescriptors

    def turn_one_away(self) -> None:
        """Use the reserve to tell one waiting client that there are no descriptors."""
        if self._reserve is None:
            self._reserve = self._open_reserve()
            if self._reserve is None:
                return
        os.close(self._reserve)
        self._reserve = None
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        say_refusal(sock, QuotaExceeded("descriptors", resource.getrlimit(resource.RLIMIT_NOFILE)[0]))
        self._closing.hang_up(sock, OTHERS)  # nobody has asked who it is
        self._reserve = self._open_reserve()

    def _open_reserve(self) -> int | None:
        try:
            return os.dup(self._listener.fileno())
        except OSError:
            return None

    def close(self) -> None:
        """Accept no more; who waits gets ECONNREFUSED or the next broker."""
        if self._reserve is not None:
            os.close(self._reserve)
            self._reserve = None
        self._closing.leave(self._listener)
