"""One end of a link between two of our processes: whole messages, a few descriptors with them, never blocking.

Runs in: every process of the broker. In the opener, a taken-over inbox controls what `receive` returns.
"""

from __future__ import annotations

import errno
import select
import socket
from collections import deque
from collections.abc import Sequence

from fdbroker.kernel import sockets
from fdbroker.limits import opener as limits
from fdbroker.refusals import LinkViolation

_LINK_BYTES = limits.LINK_BYTES
_LINK_WAITING = limits.LINK_WAITING
_WHOLE = sockets.DONT_WAIT | int(socket.MSG_TRUNC)  # MSG_TRUNC: the size of the message, also when it was cut


class Link:
    """Takes a connected SOCK_SEQPACKET socket. What cannot be sent at once waits in order."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._waiting: deque[bytes] = deque()
        self.waiting = 0  # how many messages wait for room: `poll`, and at EPOLLOUT call `flush`
        self._buffer = bytearray(_LINK_BYTES)
        self._view = memoryview(self._buffer)
        self._events: int | None = None

    def fileno(self) -> int:
        """For epoll."""
        return self._sock.fileno()

    def poll(self, epoll: select.epoll, *, read: bool = True, write: bool = False) -> None:
        """Register for EPOLLIN if `read`, and for EPOLLOUT if messages wait or `write` is set."""
        events = (select.EPOLLIN if read else 0) | (select.EPOLLOUT if write or self._waiting else 0)
        if events != self._events:
            (epoll.register if self._events is None else epoll.modify)(self._sock.fileno(), events)
            self._events = events

    def send(self, message: bytes) -> None:
        """Send, or queue. Raises LinkViolation when over LINK_WAITING messages wait, OSError when the peer is gone."""
        if self._waiting or not self._try(message):
            if len(self._waiting) >= _LINK_WAITING:
                raise LinkViolation("the other end does not read")
            self._waiting.append(message)
            self.waiting += 1

    def send_with_descriptors(self, message: bytes, descriptors: Sequence[int]) -> bool:
        """Send now, with the borrowed `descriptors`, or not at all: false when there is no room.

        What carries a descriptor is never queued, so no number can be closed and reused while it waits. Raises
        OSError, ETOOMANYREFS among others when too many descriptors of this user are in flight.
        """
        if self._waiting:
            return False
        try:
            sockets.send(self._sock, message, descriptors)
        except BlockingIOError:
            return False
        return True

    def flush(self) -> None:
        """Send what waits, as far as there is room."""
        while self._waiting and self._try(self._waiting[0]):
            self._waiting.popleft()
            self.waiting -= 1

    def _try(self, message: bytes) -> bool:
        try:
            self._sock.send(message, sockets.SEND)
        except BlockingIOError:
            return False
        return True

    def receive(self) -> bytes | None:
        """The next message without descriptors, b"" at the end, None when there is none now.

        Descriptors that come with it are never installed: there is no room for them. Raises LinkViolation for a
        message above LINK_BYTES.
        """
        try:
            size = self._sock.recv_into(self._buffer, 0, _WHOLE)
        except BlockingIOError:
            return None
        except ConnectionResetError:
            return b""
        if size > _LINK_BYTES:
            raise LinkViolation(f"a message of {size} bytes, at most {_LINK_BYTES}")
        return bytes(self._view[:size])

    def receive_whole(self, most: int) -> tuple[bytes, list[int] | None] | None:
        """Like `receive_with_descriptors`; None in place of the descriptors when none is left for them here."""
        try:
            return self.receive_with_descriptors(most)
        except sockets.NoRoomLeft as lost:
            return bytes(self._view[: lost.size]), None

    def receive_with_descriptors(self, most: int) -> tuple[bytes, list[int]] | None:
        """The next message and its descriptors, which the caller owns; b"" at the end, None when there is none now.

        Raises LinkViolation when more than `most` descriptors came or the message was cut.
        """
        try:
            size, descriptors = sockets.receive_into(self._sock, self._view, most, sockets.DONT_WAIT)
        except BlockingIOError:
            return None
        except ConnectionResetError:
            return b"", []
        except OSError as error:
            if error.errno == errno.EMSGSIZE and not isinstance(error, sockets.NoRoomLeft):
                raise LinkViolation(str(error)) from None
            raise
        return bytes(self._view[:size]), descriptors

    def close(self) -> None:
        """Close our end; what still waits is dropped."""
        self._waiting, self.waiting = deque(), 0
        self._sock.close()
