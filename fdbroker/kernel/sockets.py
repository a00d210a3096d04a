"""Unix sockets: who is at the other end, and messages with descriptors.

Runs in: every process. A client controls what is received, but not the descriptors' flags or the credentials.
"""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import os
import select
import socket
import struct
import sys
import termios
from collections.abc import Callable, Sequence

from fdbroker.kernel import libc
from fdbroker.limits import opener as limits

# asm-generic/socket.h; Python 3.11 has no names for these
SO_PEERPIDFD = 77
_SO_PEERSEC = 31
_SO_PEERGROUPS = 59
UCRED = struct.Struct("iII")  # struct ucred: pid, uid, gid
# As plain numbers: each `|` or `&` of the socket module's flags makes an enum member, which takes as long as the call.
DONT_WAIT = int(socket.MSG_DONTWAIT)
SEND = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
_CLOEXEC, _CTRUNC, _TRUNC = int(socket.MSG_CMSG_CLOEXEC), int(socket.MSG_CTRUNC), int(socket.MSG_TRUNC)
_PEEK = int(socket.MSG_PEEK)
_READ = 65536  # bytes at a time
_READS = 6  # of one connection, so that its sender's socket may be as full as it is by default
_LOOKED_AT = 4096  # bytes of a queue, to see whether a descriptor comes with them
FD_SIZE = array.array("i").itemsize
_LABEL_BYTES = limits.LABEL_BYTES
CREDENTIALS_SPACE = socket.CMSG_LEN(UCRED.size)  # exactly: nothing else has room, so no descriptor comes in


class NoRoomLeft(OSError):
    """A message came whole, its descriptors did not: this process has none left. `size` bytes are in the buffer."""

    def __init__(self, size: int) -> None:
        super().__init__(errno.EMSGSIZE, "recvmsg: no descriptor is left for those that came")
        self.size = size


def peer_credentials(sock: socket.socket) -> tuple[int, int, int]:
    """The pid, uid and gid of who called connect(2), frozen at that moment. Source: unix(7), SO_PEERCRED."""
    pid, uid, gid = UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size))
    return pid, uid, gid


def _option_bytes(sock: socket.socket, option: int, size: int) -> bytes:
    """getsockopt(2) for values of any size: socket.getsockopt stops at 1024 bytes, which is 256 groups."""
    while True:
        buffer = ctypes.create_string_buffer(size)
        length = ctypes.c_uint(size)
        if libc.GETSOCKOPT(sock.fileno(), socket.SOL_SOCKET, option, buffer, length) == 0:
            return ctypes.string_at(buffer, length.value)
        if ctypes.get_errno() != errno.ERANGE:
            libc.fail(f"getsockopt({option})")
        size = max(length.value, size * 2)


def peer_groups(sock: socket.socket) -> array.array[int]:
    """The peer's supplementary groups at connect(2), however many. Source: socket(7), SO_PEERGROUPS."""
    return array.array("I", _option_bytes(sock, _SO_PEERGROUPS, 256))


def peer_label(sock: socket.socket) -> str:
    """The MAC label of who made the peer's socket, or "" where no security module says one, or it is too long.

    It does not change after connect(2). SELinux always says it, AppArmor in Linux 7.2, but not in 6.1. Source: unix(7),
    SO_PEERSEC.
    """
    try:
        # SELinux counts a NUL at the end; what is below /proc ends with a newline
        label = _option_bytes(sock, _SO_PEERSEC, 256).rstrip(b"\0\n")
    except OSError as error:
        if error.errno == errno.ENOPROTOOPT:
            return ""
        raise
    text = label.decode(errors="backslashreplace")
    return text if len(text.encode()) <= _LABEL_BYTES else ""


def peer_pidfd(sock: socket.socket) -> int | None:
    """An owned pidfd of the process that called connect(2), or None before Linux 6.5 or once it is gone."""
    try:
        return sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError as error:
        if error.errno in (errno.ENOPROTOOPT, errno.ESRCH, errno.EINVAL, errno.ENODATA):
            return None
        raise


def says_peer_pidfd(sock: socket.socket) -> bool:
    """Whether this kernel knows SO_PEERPIDFD, as Linux does from 6.5 on."""
    try:
        os.close(sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD))
    except OSError as error:
        return error.errno != errno.ENOPROTOOPT
    return True


def hear_urgent(sock: socket.socket) -> None:
    """Make reads return bytes that came with MSG_OOB. Without this, reads skip them and poll(2) reports them for ever.

    The kernel would let go of a descriptor that came with it as well, in the thread that reads. Source: socket(7),
    SO_OOBINLINE; Linux from 5.15 on knows MSG_OOB for these sockets.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)


def unread_bytes(sock: socket.socket) -> int:
    """Memory, in bytes, of what the peer has not read yet: 0 when it has read all. Source: unix(7), SIOCOUTQ."""
    buffer = bytearray(4)
    fcntl.ioctl(sock, termios.TIOCOUTQ, buffer)  # SIOCOUTQ is the same number
    return int.from_bytes(buffer, sys.byteorder)


def waiting_bytes(sock: socket.socket) -> int:
    """How many bytes have come and were not read. Source: unix(7), SIOCINQ."""
    buffer = bytearray(4)
    fcntl.ioctl(sock, termios.FIONREAD, buffer)  # SIOCINQ is the same number
    return int.from_bytes(buffer, sys.byteorder)


def only_bytes_wait(sock: socket.socket) -> bool:
    """Whether the socket's queue holds few bytes and no descriptor: then closing the socket takes no time.

    Nothing is read, and no more than _LOOKED_AT bytes are looked at. False where that is not sure. Needs SO_PASSCRED
    and `hear_urgent`.
    """
    waiting = waiting_bytes(sock)
    if not 0 < waiting <= _LOOKED_AT:
        return not waiting
    try:
        data, _, flags, _ = sock.recvmsg(waiting, CREDENTIALS_SPACE, DONT_WAIT | _PEEK)
    except OSError:
        return False
    return len(data) == waiting and not flags & _CTRUNC


def drop_bytes(sock: socket.socket) -> bool:
    """Read away the bytes that have come, up to the first descriptor: whether nothing is left.

    For a connection that was hung up: nobody else reads it, so the bytes that are peeked at are those that are read. At
    most _READS reads of _READ bytes. Needs `hear_urgent`.
    """
    # else each byte of another sender is a message of its own, and there can be thousands
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0)
    for _ in range(_READS):
        try:
            data, _, flags, _ = sock.recvmsg(_READ, 0, DONT_WAIT | _PEEK)  # without room for any descriptor
            if flags & _CTRUNC or not data:
                return not flags & _CTRUNC
            sock.recv(len(data), DONT_WAIT)
        except ConnectionResetError:  # the peer has left something unread: said once, and the queue is as it was
            pass
        except OSError:
            break
    return False


def descriptors_in(value: bytes) -> list[int]:
    """What a control message of the kind SCM_RIGHTS brings; a last number that was cut is none."""
    return array.array("i", value[: len(value) - len(value) % FD_SIZE]).tolist()


def send(sock: socket.socket, data: bytes | bytearray, descriptors: Sequence[int] = ()) -> int:
    """sendmsg(2) without blocking, with `descriptors`, which are borrowed. Returns how many bytes were taken."""
    if not descriptors:
        return sock.send(data, SEND)
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
    return sock.sendmsg([data], ancillary, SEND)


def receive_into(
    sock: socket.socket,
    buffer: bytearray | memoryview,
    descriptors: int,
    flags: int = 0,
    close: Callable[[list[int]], object] | None = None,
) -> tuple[int, list[int]]:
    """Read into `buffer`; how many bytes, and at most `descriptors` descriptors, which the caller owns.

    All are close-on-exec. Raises OSError EMSGSIZE, with every received descriptor closed, by `close` if it is given,
    when more came than there was room for, or when the kernel could not install them all. Source: recv(2),
    MSG_CMSG_CLOEXEC, MSG_CTRUNC.
    """
    # CMSG_LEN, not CMSG_SPACE: its padding would let one descriptor more in
    space = socket.CMSG_LEN(descriptors * FD_SIZE) if descriptors else 0
    size, ancillary, received_flags, _ = sock.recvmsg_into([buffer], space, flags | _CLOEXEC)
    owned: list[int] = []
    for level, kind, value in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            owned += descriptors_in(value)
    if received_flags & (_CTRUNC | _TRUNC):
        if close is not None:
            close(owned)
        else:
            for descriptor in owned:
                os.close(descriptor)
        if len(owned) < descriptors and not received_flags & _TRUNC:
            raise NoRoomLeft(size)  # there was room in the buffer: this process has no descriptor left
        raise OSError(errno.EMSGSIZE, "recvmsg: message or descriptors were cut")
    return size, owned


def hung_up(*socks: socket.socket) -> int:
    """How many of these the peer has closed, or both ends are shut down; nothing is read.

    Source: unix_poll(), POLLHUP.
    """
    poll = select.poll()
    for sock in socks:
        poll.register(sock, 0)  # POLLHUP comes unasked
    return len(poll.poll(0))


def hang_up(sock: socket.socket) -> None:
    """End the connection for every process that holds it: close(2) in one leaves the other's copy open."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise
