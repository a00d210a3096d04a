"""Closing, which may sleep: an evdev node's last close takes 15 to 36 ms, a serial line waits for what it has to send.

Runs in: opener. An attacker controls what a descriptor of its own waits for, and what it leaves unread in our queue.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from functools import partial

from fdbroker.kernel import sockets
from fdbroker.kernel.jobs import Jobs
from fdbroker.limits import opener as limits
from fdbroker.opener.authorize import Account, Connection, Flight
from fdbroker.terms import OTHERS


class Closing:
    """Closes what was opened for clients, and clients' sockets: what may sleep by a thread of their owner's."""

    def __init__(self) -> None:
        self._jobs = Jobs(limits.CLOSING_THREADS, limits.STUCK_THREADS)
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []  # that a thread closes

    def close(self, connection: Connection, descriptors: dict[int, int]) -> None:
        """Take these descriptors and close them; until then they count for the owner."""
        account, flight = connection.account, connection.flight
        account.closing += len(descriptors)
        flight.closing += len(descriptors)
        jobs = [partial(self._close_one, account, flight, descriptor) for descriptor in descriptors.values()]
        descriptors.clear()
        self._jobs.put(connection.subject.owner, *jobs)

    def hang_up(self, sock: socket.socket, owner: int) -> None:
        """End a connection that the inbox never had; takes `sock`. What waits in it may hold descriptors to close.

        However many there are, none is closed here; the door accepts no more when there are too many.
        """
        sockets.hang_up(sock)
        sockets.hear_urgent(sock)
        if not sockets.drop_bytes(sock):
            self._sockets.append(sock)
            self._jobs.put(owner, partial(self._close_socket, sock))
        else:
            sock.close()

    def leave(self, listener: socket.socket) -> None:
        """Close a listening socket, which is taken: the last copy takes along what waiting clients have sent."""
        self._jobs.put(OTHERS, listener.close)

    @property
    def waiting(self) -> int:
        """How many connections wait to be closed by a thread."""
        return len(self._sockets)

    def _close_socket(self, sock: socket.socket) -> None:
        sock.close()
        self._sockets.remove(sock)

    def _close_one(self, account: Account, flight: Flight, descriptor: int) -> None:
        with contextlib.suppress(OSError):  # a driver may report what it could not write; it is closed
            os.close(descriptor)
        with self._lock:
            account.closed += 1
            flight.closed += 1
