"""Descriptors that came with messages: whose they are, how many of them, and when they are closed.

Runs in: inbox. An attacker controls what the descriptors are, so nothing is done with one that could wait for its
owner: none is read, and each is closed in a thread of its user's own, for close(2) can wait as well (a file of a FUSE
file system, a socket with SO_LINGER).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import socket
import threading
from collections import deque
from collections.abc import Sequence

from fdbroker import limits
from fdbroker.errors import QuotaExceeded
from fdbroker.kernel import sockets
from fdbroker.kernel.memfd import SEALS

_HELD, _HELD_BYTES = limits.HELD_DESCRIPTORS, limits.HELD_BYTES
_UNREAD, _UNREAD_OF_USER = limits.UNREAD_DESCRIPTORS, limits.UNREAD_OF_USER


class Attached:
    """Owns the descriptors of one message; they are closed when nothing refers to this object any more.

    `over`: they were not let in, for the user's messages hold too many; then there are none.
    """

    __slots__ = ("_ledger", "_size", "_uid", "numbers", "over")

    def __init__(self, ledger: Ledger, uid: int, numbers: Sequence[int]) -> None:
        self._ledger = ledger
        self._uid = uid
        self._size = 0
        self.numbers = tuple(numbers)
        self.over = not numbers

    def size(self, index: int) -> int | None:
        """How long the memfd is whose seals keep it as it is; None when it is none, or not sealed.

        From then on its bytes count for its sender. Raises QuotaExceeded when they are too many.
        """
        number = self.numbers[index]
        try:
            # first: only a memfd has seals, and of anything else fstat(2) might wait for its owner
            if fcntl.fcntl(number, fcntl.F_GET_SEALS) & SEALS != SEALS:
                return None
        except OSError:
            return None
        size = os.fstat(number).st_size
        self._ledger.add_bytes(self._uid, size)
        self._size += size
        return size

    def read(self, index: int, size: int) -> bytes:
        """The bytes of a memfd that `size` was asked of."""
        return os.pread(self.numbers[index], size, 0)

    def __del__(self) -> None:
        self._ledger.give_back(self._uid, self.numbers, self._size)


class _Held:
    """What one user's messages hold, and what of it waits to be closed."""

    __slots__ = ("bytes", "closing", "count", "to_close")

    def __init__(self) -> None:
        self.count = 0
        self.bytes = 0
        self.to_close: deque[tuple[tuple[int, ...], int]] = deque()
        self.closing = False


class Ledger:
    """The descriptors that all messages hold, by the user who sent them; what is being closed still counts."""

    def __init__(self) -> None:
        self._held: dict[int, _Held] = {}
        self._count = 0
        self._most = limits.held_in_all(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        self._lock = threading.RLock()  # an Attached may be let go of anywhere

    def has_room(self, uid: int) -> bool:
        """Whether as many as one message may carry may be let in from that user."""
        with self._lock:
            held = self._held.get(uid)
            if held is not None and held.to_close:
                self._start(uid, held)
            most = limits.DESCRIPTORS_PER_MESSAGE
            # of a small table, one user gets half
            each = min(_HELD, self._most // 2)
            return self._count + most <= self._most and (held is None or held.count + most <= each)

    def take(self, uid: int, numbers: Sequence[int]) -> Attached:
        """Own these, which came from that user, once `has_room` said so; none of them stands for those not let in."""
        if numbers:
            with self._lock:
                self._held.setdefault(uid, _Held()).count += len(numbers)
                self._count += len(numbers)
        return Attached(self, uid, numbers)

    def add_bytes(self, uid: int, size: int) -> None:
        """Raises QuotaExceeded when that user's memfds are too many bytes."""
        with self._lock:
            held = self._held[uid]
            if held.bytes + size > _HELD_BYTES:
                raise QuotaExceeded("held_bytes", _HELD_BYTES)
            held.bytes += size

    def give_back(self, uid: int, numbers: tuple[int, ...], size: int) -> None:
        """Close these, without waiting for it."""
        if not numbers:
            return
        with self._lock:
            held = self._held[uid]
            held.to_close.append((numbers, size))
            self._start(uid, held)

    def _start(self, uid: int, held: _Held) -> None:
        if held.closing:
            return
        held.closing = True
        try:
            threading.Thread(target=self._close, args=(uid, held), daemon=True).start()
        except RuntimeError:  # no thread to be had: the next one closes these as well
            held.closing = False

    def _close(self, uid: int, held: _Held) -> None:
        while True:
            with self._lock:
                if not held.to_close:
                    held.closing = False
                    if not held.count:
                        del self._held[uid]
                    return
                numbers, size = held.to_close.popleft()
            for number in numbers:
                with contextlib.suppress(OSError):  # what its owner's close(2) says is nothing to us
                    os.close(number)
            with self._lock:
                self._count -= len(numbers)
                held.count -= len(numbers)
                held.bytes -= size


class Unread:
    """Descriptors that were sent and, as far as we know, not yet received: of each user, over all its connections.

    They count against our RLIMIT_NOFILE: at that, the kernel would refuse to send any to anybody (ETOOMANYREFS).
    """

    def __init__(self) -> None:
        self._sent: dict[int, dict[socket.socket, int]] = {}  # by uid
        self._ended: set[socket.socket] = set()
        # with more of all users we would rather lose count than descriptors
        self._ended_max = limits.held_in_all(resource.getrlimit(resource.RLIMIT_NOFILE)[0]) // 4

    def may_send(self, uid: int, sock: socket.socket, count: int) -> bool:
        """Whether so many more may be sent on that user's socket."""
        sent = self._sent.get(uid, {})
        for look in (True, False):
            if sent.get(sock, 0) + count <= _UNREAD and sum(sent.values()) + count <= _UNREAD_OF_USER:
                return True
            if look:
                self._look(uid)
        return False

    def add(self, uid: int, sock: socket.socket, count: int) -> None:
        """So many have been sent on this socket."""
        sent = self._sent.setdefault(uid, {})
        sent[sock] = sent.get(sock, 0) + count

    def end(self, uid: int, sock: socket.socket) -> None:
        """The connection is over: close our copy, once its other end has received, or closed, what it was sent."""
        if len(self._ended) < self._ended_max and sock in self._sent.get(uid, {}) and sockets.unread_bytes(sock):
            self._ended.add(sock)
            sockets.hang_up(sock)
        else:
            self._forget(uid, sock)
            sock.close()

    @property
    def lingering(self) -> bool:
        """Whether an ended connection waits for its other end: `sweep` from time to time."""
        return bool(self._ended)

    def sweep(self) -> None:
        """Close the ended connections of which nothing is unread any more."""
        for uid in list(self._sent):
            self._look(uid)

    def _look(self, uid: int) -> None:
        for sock in list(self._sent.get(uid, {})):
            if not sockets.unread_bytes(sock):
                self._forget(uid, sock)
                if sock in self._ended:
                    self._ended.discard(sock)
                    sock.close()

    def _forget(self, uid: int, sock: socket.socket) -> None:
        sent = self._sent.get(uid, {})
        sent.pop(sock, None)
        if not sent:
            self._sent.pop(uid, None)
