"""Reading a client's socket: its bytes, its descriptors, and whatever must not stay in our queue.

Runs in: inbox. An attacker controls what comes, when, and how long it takes to close what comes along.

The kernel closes a descriptor for which a read has no room, in the thread that reads, and that can take as long as a
driver likes. So descriptors are let in, also those that nobody may send, and a thread of their owner's closes them.
Where few numbers are free, a look at the queue copies as many as a message may have, and what the read then lets go of
is never the last copy; where more have come than that, or than have room, nothing is read.
"""

from __future__ import annotations

import socket
from typing import NamedTuple

from fdbroker.inbox.attached import Attached, Ledger
from fdbroker.inbox.client import Client
from fdbroker.kernel import received, sockets
from fdbroker.kernel.jobs import Jobs
from fdbroker.kernel.received import plain_bytes, receive_with_sender
from fdbroker.limits import inbox as limits

READ_BYTES = 65536
_MOST = limits.DESCRIPTORS_PER_MESSAGE
_LOOK_SPACE = socket.CMSG_SPACE(sockets.UCRED.size) + socket.CMSG_LEN(_MOST * sockets.FD_SIZE)
_LOOK = sockets.DONT_WAIT | int(socket.MSG_PEEK | socket.MSG_CMSG_CLOEXEC)


class Received(NamedTuple):
    """What one read brought of one sender: bytes, none at the end of the stream, and how many descriptors.

    `attached` owns them as far as the client may have sent them. `broken`: it sent more than anybody may.
    """

    data: bytes
    uid: int
    descriptors: int
    attached: Attached | None
    broken: bool


class Receiver:
    """Owns the descriptors that come, by a ledger."""

    def __init__(self, jobs: Jobs) -> None:
        self._ledger = Ledger(jobs)

    def read(self, client: Client) -> Received:
        """The next bytes. Raises BlockingIOError when there are none, OSError when the client is gone.

        There is room for descriptors from who may send none, too: one can wait since before the kernel was told so.
        """
        owner = client.user.owner
        size, room = READ_BYTES, received.SCM_MAX_FD
        if not self._ledger.has_room_to_close(owner):
            size, room = plain_bytes(client.sock, READ_BYTES), 0
            if not size:  # more than the owner may have waiting to be closed
                return Received(b"", -1, 0, None, broken=True)
        if room and not self._ledger.has_numbers(room):
            size, copies, cut = _look(client.sock)
            if cut:
                return Received(b"", -1, len(copies), self._ledger.take(owner, copies), broken=True)
            data, uid, _, _ = receive_with_sender(client.sock, size or 1)
            numbers = copies
        else:
            data, uid, numbers, cut = receive_with_sender(client.sock, size, room)
        may_hold = numbers and client.member.send and self._ledger.has_room(owner)
        attached = self._ledger.take(owner, numbers) if numbers else None
        if cut or (attached is not None and not may_hold):
            attached = self._ledger.take(owner, ())  # none was left here, or they are too many for it
        return Received(data, uid, len(numbers), attached, broken=len(numbers) > _MOST)

    @staticmethod
    def peek(client: Client) -> bytes | None:
        """The first byte that waits, b"" at the end of the stream, None when nothing has come."""
        try:
            return client.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except OSError:
            return b"?"


def _look(sock: socket.socket) -> tuple[int, list[int], bool]:
    """How much a read brings, copies of the descriptors that come with it, and whether there are more."""
    data, ancillary, flags, _ = sock.recvmsg(READ_BYTES, _LOOK_SPACE, _LOOK)
    rights = (value for _, kind, value in ancillary if kind == socket.SCM_RIGHTS)
    copies = [number for value in rights for number in sockets.descriptors_in(value)]
    return len(data), copies, bool(flags & socket.MSG_CTRUNC)
