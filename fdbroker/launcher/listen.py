"""The listening socket: the one that systemd passes, or one bound in place with its final owner and mode.

Runs in: launcher, as root. A user with write access to the socket's folder, or to one above it, could replace the
socket: so these folders must be root's alone.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import socket
import stat

from fdbroker.errors import EX_CONFIG, EX_UNAVAILABLE, FdbrokerError
from fdbroker.kernel import received
from fdbroker.policy.files import untrusted
from fdbroker.terms import INVALID_ID

_LISTEN_FDS_START = 3  # sd_listen_fds(3)
_BACKLOG = 128  # whoever connects in a storm waits in the kernel, where one process has one place
DEFAULT_ADDRESS = "/run/fdbroker/socket"
DEFAULT_GROUP = "fdbroker"


class CannotListen(FdbrokerError):
    """There is no socket to serve on; the text says why and what to do."""

    exit_code = EX_CONFIG


class AnotherBroker(CannotListen):
    """Somebody listens at the address already."""

    exit_code = EX_UNAVAILABLE


class Listener:
    """The listening socket, and how to leave its place clean: a path that we bound is ours to remove."""

    def __init__(self, sock: socket.socket, path: str = "", *, asked_credentials: bool = True) -> None:
        self.sock = sock
        self.path = path
        # else a message that was sent before this moment says nothing of its sender, and ends its connection
        self.asked_credentials = asked_credentials
        self._identity = _identity(path) if path else None
        sock.setblocking(False)  # for the opener, which may not do that itself
        # inherited by accepted sockets, so set before the first client can send anything
        received.ask_credentials(sock)

    def remove(self) -> None:
        """Unlink the path if it is still the socket that we bound."""
        if self.path and _identity(self.path) == self._identity:
            with contextlib.suppress(OSError):
                os.unlink(self.path)


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def inherited() -> Listener | None:
    """The socket from systemd, or None when none was passed to this very process.

    Takes descriptor 3 and removes the variables, so that nobody after us believes them. Raises CannotListen when
    descriptor 3 is no good.
    """
    count, pid = os.environ.pop("LISTEN_FDS", ""), os.environ.pop("LISTEN_PID", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdecimal() or int(count) == 0:
        return None
    if int(count) != 1:
        raise CannotListen(f"systemd passed {count} sockets; fdbroker serves one: check the units' ListenStream=")
    try:
        sock = socket.socket(fileno=_LISTEN_FDS_START)
        listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise CannotListen(f"LISTEN_FDS says that descriptor 3 is a socket, but: {error.strerror}") from None
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM or not listening:
        raise CannotListen("descriptor 3 is no listening Unix stream socket: use ListenStream=/path")
    name = sock.getsockname()
    if not isinstance(name, str) or not name.startswith("/"):
        raise CannotListen("descriptor 3 listens on an abstract address, which has no mode: use ListenStream=/path")
    os.set_inheritable(_LISTEN_FDS_START, False)
    asked = bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED))
    return Listener(sock, asked_credentials=asked)


def bound(path: str, mode: int, group: str | None) -> Listener:
    """Bind and listen at `path`, which from its first moment has `mode` and `group` (None: root's own).

    Raises AnotherBroker, or CannotListen when the path is not ours to use.
    """
    if not path.startswith("/"):
        raise CannotListen(f"{path!r} is no absolute path; abstract addresses have no mode and are refused")
    _judge_folders(path)
    _remove_stale(path)
    gid_before = os.getegid()
    gid = gid_before if group is None else _gid_of(group)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask_before = os.umask(0o777 & ~mode)
    try:
        os.setegid(gid)
        sock.bind(path)
    except OSError as error:
        sock.close()
        raise CannotListen(f"cannot bind {path}: {error.strerror or error}") from None
    finally:
        os.umask(mask_before)
        os.setegid(gid_before)
    listener = Listener(sock, path)
    sock.listen(_BACKLOG)
    return listener


def _judge_folders(path: str) -> None:
    """Raises CannotListen when somebody else than root could put another socket in the place of `path`."""
    folder, name = os.path.split(path)
    real = os.path.realpath(folder)
    if real != folder:  # the owner of a link could lead clients elsewhere, and so could the owner of a folder with one
        raise CannotListen(f"{folder} is not the plain name of a folder: write {os.path.join(real, name)}")
    while True:
        try:
            trouble = untrusted(os.stat(folder), sticky_is_fine=True)
        except OSError as error:
            raise CannotListen(f"{folder}: {error.strerror}; make it: install -d -m 0755 {folder}") from None
        if trouble:
            raise CannotListen(f"{folder} {trouble}, or others could replace the socket {path}")
        if folder == "/":
            return
        folder = os.path.dirname(folder)


def _gid_of(group: str) -> int:
    try:
        if group.isascii() and group.isdecimal() and int(group) < INVALID_ID:
            return int(group)
        return grp.getgrnam(group).gr_gid
    except (KeyError, ValueError):
        raise CannotListen(f"there is no group {group!r}: groupadd --system {group}") from None


def group_exists(group: str) -> bool:
    """Whether the group database knows it."""
    try:
        grp.getgrnam(group)
    except KeyError:
        return False
    return True


def _remove_stale(path: str) -> None:
    """Remove a socket of root's at which nobody listens any more; refuse anything else that is in the way."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode) or status.st_uid != 0:
        raise CannotListen(f"{path} is in the way and is no socket of root's; it is left alone: remove it yourself")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return
            if error.errno != errno.ECONNREFUSED:
                raise CannotListen(f"{path} is in the way: {error.strerror}") from None
        else:
            raise AnotherBroker(f"a broker serves at {path} already")
    os.unlink(path)
