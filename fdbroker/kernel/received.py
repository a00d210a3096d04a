"""What a client sends, with its sender's identity and descriptors, read from a Unix socket.

Runs in: inbox; `ask_credentials` in the launcher. A client controls the bytes and which descriptors come, but not
these descriptors' flags or the credentials.
"""

from __future__ import annotations

import errno
import functools
import socket

from fdbroker.kernel.sockets import CREDENTIALS_SPACE, DONT_WAIT, FD_SIZE, UCRED, descriptors_in

SCM_MAX_FD = 253  # net/scm.h: the most descriptors of one message
SO_PASSRIGHTS = 83  # asm-generic/socket.h; Python 3.11 has no name for it
_FLAGS, _CTRUNC = DONT_WAIT | int(socket.MSG_CMSG_CLOEXEC), int(socket.MSG_CTRUNC)


def ask_credentials(sock: socket.socket) -> None:
    """Have every message carry its sender's credentials; accepted sockets inherit it from a listener."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)


def collect() -> None:
    """Have the kernel free sockets that nothing but their own queues holds: it looks when a Unix socket is closed.

    Before Linux 6.10 it lets go of what is in them in this thread, which can take as long as a driver likes. Source:
    net/unix/garbage.c.
    """
    for sock in socket.socketpair(socket.AF_UNIX):
        sock.close()


def receive_with_sender(sock: socket.socket, size: int, room: int = 0) -> tuple[bytes, int, list[int], bool]:
    """Read at most `size` bytes of one sender: the bytes, its uid, its descriptors, and whether there were more.

    The uid is -1 at the end of the stream. At most `room` descriptors come, close-on-exec and owned by the caller; the
    kernel lets go of the others. They belong to the last of these bytes: a read never goes on behind the first message
    that has some. Never blocks: raises BlockingIOError. Needs `ask_credentials`. Source: unix(7), SCM_CREDENTIALS;
    recv(2), MSG_CTRUNC.
    """
    data, ancillary, flags, _ = sock.recvmsg(size, _space(room), _FLAGS)
    uid = -1
    numbers: list[int] = []
    for level, kind, value in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
            uid = UCRED.unpack(value)[1]
        elif level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers += descriptors_in(value)
    return data, uid, numbers, bool(flags & _CTRUNC)


@functools.cache
def _space(room: int) -> int:
    # exactly: CMSG_LEN at the end, for padding would let one more in
    return socket.CMSG_SPACE(UCRED.size) + socket.CMSG_LEN(room * FD_SIZE) if room else CREDENTIALS_SPACE


def let_descriptors(sock: socket.socket, *, allowed: bool) -> None:
    """Whether the peer may send descriptors: else its attempt fails (Linux 6.16). Older kernels let it."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, allowed)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise


def plain_bytes(sock: socket.socket, size: int) -> int:
    """How many bytes, of at most `size`, a read can take now without losing a descriptor that comes with them.

    To lose a descriptor is to close it, which can take as long as its driver likes. At the end of the stream `size`.
    Never blocks: raises BlockingIOError. Needs `ask_credentials`.
    """
    data, _, flags, _ = sock.recvmsg(size, CREDENTIALS_SPACE, DONT_WAIT | socket.MSG_PEEK)
    return 0 if flags & socket.MSG_CTRUNC else len(data) or size
