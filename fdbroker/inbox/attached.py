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
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial

from fdbroker.errors import QuotaExceeded
from fdbroker.kernel import sockets
from fdbroker.kernel.jobs import Jobs
from fdbroker.kernel.received import collect
from fdbroker.kernel.sealed import SEALS
from fdbroker.limits import inbox as limits
from fdbroker.limits.opener import reserved, shared

_HELD, _HELD_BYTES = limits.HELD_DESCRIPTORS, limits.HELD_BYTES
_LOOK_S = 0.05
_READ = 65536  # bytes at a time
_OURS = -1  # whose job it is to have the kernel collect
_UNREAD, _UNREAD_OF_USER = limits.UNREAD_DESCRIPTORS, limits.UNREAD_OF_USER


def drain(sock: socket.socket) -> None:
    """Read and forget all that has come on a connection that was hung up; borrows `sock`.

    Descriptors that came along are closed by the kernel, in this thread. Until then the connection stays: one of them
    can be its own other end.
    """
    with contextlib.suppress(OSError):
        while sock.recv(_READ, sockets.DONT_WAIT):
            pass


class Attached:
    """Owns the descriptors of one message; they are closed when nothing refers to this object any more.

    `over`: they were not let in, for the user's messages hold too many; then there are none.
    """

    __slots__ = ("_ledger", "_owner", "_size", "numbers", "over")

    def __init__(self, ledger: Ledger, owner: int, numbers: Sequence[int]) -> None:
        self._ledger = ledger
        self._owner = owner
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
        self._ledger.add_bytes(self._owner, size)
        self._size += size
        return size

    def read(self, index: int, size: int) -> bytes:
        """The bytes of a memfd that `size` was asked of."""
        return os.pread(self.numbers[index], size, 0)

    def __del__(self) -> None:
        self._ledger.give_back(self._owner, self.numbers, self._size)


class _Held:
    """What one owner's messages hold; what waits to be closed still counts."""

    __slots__ = ("bytes", "count")

    def __init__(self) -> None:
        self.count = 0
        self.bytes = 0


class Ledger:
    """The descriptors that all messages hold, by the owner who sent them; what is being closed still counts.

    A part of them is kept for owners whose messages hold none, so that a few owners cannot hold them all.
    """

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._held: dict[int, _Held] = {}
        self._count = 0
        self._most = held_in_all(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        self._lock = threading.RLock()  # an Attached may be let go of anywhere

    def has_room(self, owner: int) -> bool:
        """Whether as many as one message may carry may be let in from that owner."""
        with self._lock:
            held = self._held.get(owner)
            if held is None:
                return self._count + limits.DESCRIPTORS_PER_MESSAGE <= self._most
            self._jobs.start()
            most = limits.DESCRIPTORS_PER_MESSAGE
            # of a small table, one owner gets a quarter
            each = min(_HELD, self._most // 4)
            return self._count + most <= shared(self._most) and held.count + most <= each

    def has_room_to_close(self, owner: int) -> bool:
        """Whether the descriptors of one message more may be let in from that owner to be closed at once."""
        held = self._held.get(owner)  # without the lock: other threads only take away from it
        if held is None:
            return True
        self._jobs.start()
        return held.count <= min(_HELD, self._most // 4)

    def has_numbers(self, count: int) -> bool:
        """Whether so many more surely find a free number in this process."""
        return self._count + count <= self._most  # without the lock: other threads only take away from it

    def take(self, owner: int, numbers: Sequence[int]) -> Attached:
        """Own these, which came from that owner, once `has_room` said so; none of them stands for those not let in."""
        if numbers:
            with self._lock:
                self._held.setdefault(owner, _Held()).count += len(numbers)
                self._count += len(numbers)
        return Attached(self, owner, numbers)

    def add_bytes(self, owner: int, size: int) -> None:
        """Raises QuotaExceeded when that owner's memfds are too many bytes."""
        with self._lock:
            held = self._held[owner]
            if held.bytes + size > _HELD_BYTES:
                raise QuotaExceeded("held_bytes", _HELD_BYTES)
            held.bytes += size

    def give_back(self, owner: int, numbers: tuple[int, ...], size: int) -> None:
        """Close these, without waiting for it: each by a job of its own, for one may wait for another to be closed."""
        jobs = [partial(self._close, owner, number, 0 if index else size) for index, number in enumerate(numbers)]
        self._jobs.put(owner, *jobs)  # together: to wake a thread for each would hold up others

    def _close(self, owner: int, number: int, size: int) -> None:
        with contextlib.suppress(OSError):  # what its owner's close(2) says is nothing to us
            os.close(number)
        with self._lock:
            held = self._held[owner]
            self._count -= 1
            held.count -= 1
            held.bytes -= size
            if not held.count:
                del self._held[owner]


class Unread:
    """Descriptors that were sent and, as far as we know, not yet received: of each user, over all its connections.

    They count against our RLIMIT_NOFILE: at that, the kernel would refuse to send any to anybody (ETOOMANYREFS).
    """

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._draining: set[socket.socket] = set()  # ended ones that a thread reads
        self._collecting = False
        # what waits to be received, by owner; an ended connection may have been sent none
        self.waiting: dict[int, dict[socket.socket, int]] = {}
        self._count = 0
        self._looked_s = 0.0
        self._ended: dict[socket.socket, int] = {}  # and whose it was
        self._ended_of: Counter[int] = Counter()  # of these, that were sent some: of others, sending makes none more
        self._ended_count = 0  # of all owners, and of one a quarter at most: else it could fill this alone
        descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most = descriptors - reserved(descriptors)
        self._ended_max = held_in_all(descriptors) // 4

    def may_send(self, owner: int, sock: socket.socket, count: int) -> bool:
        """Whether so many more may be sent on that user's socket; none while many that it ended have some unread."""
        for look in (True, False):
            sent = self.waiting.get(owner, {})
            # a part of all is kept for owners of whom none is unread
            most = shared(self._most) if sent else self._most
            own = sent.get(sock, 0) + count <= _UNREAD and sum(sent.values()) + count <= _UNREAD_OF_USER
            mine = self._ended_of[owner]
            ended = mine >= self._ended_max // 4
            ended |= self._ended_count >= (shared(self._ended_max) if mine else self._ended_max)
            if own and not ended and self._count + count <= most:
                return True
            if look:
                self._look(owner, [sock])
                self.sweep_at_times()
        return False

    def sweep_at_times(self) -> None:
        """Count anew, now and then: to look at the sockets of all owners for each message would take too long."""
        now_s = time.monotonic()
        if now_s - self._looked_s >= _LOOK_S:
            self._looked_s = now_s
            self.sweep()
            if self.waiting and not self._collecting:  # one may be the other end of the connection that it waits in
                self._collecting = True
                self._jobs.put(_OURS, self._collect)

    def add(self, owner: int, sock: socket.socket, count: int) -> None:
        """So many have been sent on this socket."""
        sent = self.waiting.setdefault(owner, {})
        sent[sock] = sent.get(sock, 0) + count
        self._count += count

    def end(self, owner: int, sock: socket.socket) -> None:
        """The connection is over: close our copy, once its other end has received, or closed, what it was sent.

        A thread closes what came and was not read, and our copy stays for so long: the connection's own other end can
        be among it, and the opener, which has a copy as well, counts it for the owner until nothing is left.
        """
        sockets.hang_up(sock)  # nothing more comes
        if sockets.waiting_bytes(sock):
            self.waiting.setdefault(owner, {}).setdefault(sock, 0)
            self._draining.add(sock)
            self._jobs.put(owner, partial(self._drain, sock))
        if self._is_in_use(owner, sock):
            self._ended[sock] = owner
            if self.waiting[owner][sock]:
                self._ended_count += self._ended_of[owner] < self._ended_max // 4
                self._ended_of[owner] += 1
        else:
            self._forget(owner, sock)
            sock.close()

    def _is_in_use(self, owner: int, sock: socket.socket) -> bool:
        sent = self.waiting.get(owner, {}).get(sock, 0)
        return sock in self._draining or (sent > 0 and sockets.unread_bytes(sock) > 0)

    def _drain(self, sock: socket.socket) -> None:
        drain(sock)
        self._draining.discard(sock)

    def _collect(self) -> None:
        with contextlib.suppress(OSError):  # no descriptor is left for it: another time
            collect()
        self._collecting = False

    def sweep(self) -> None:
        """Close the ended connections of which nothing is unread any more."""
        for owner, sent in list(self.waiting.items()):
            self._look(owner, list(sent))

    def _look(self, owner: int, of: Sequence[socket.socket]) -> None:
        for sock in of:
            if not self._is_in_use(owner, sock):
                sent = self._forget(owner, sock)
                if self._ended.pop(sock, None) is not None:
                    if sent:
                        self._ended_count -= self._ended_of[owner] <= self._ended_max // 4
                        self._ended_of -= Counter([owner])  # which leaves no zeros
                    sock.close()

    def _forget(self, owner: int, sock: socket.socket) -> int:
        sent = self.waiting.get(owner, {})
        count = sent.pop(sock, 0)
        self._count -= count
        if not sent:
            self.waiting.pop(owner, None)
        return count


def held_in_all(descriptors: int) -> int:
    """Of these, how many the messages of all users may hold: the others are for links, files, and what just came."""
    return reserved(descriptors) - 64
