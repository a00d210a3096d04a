"""Namespaces: what a descriptor of one is, whose it is, who could enter it; entering and making them.

Runs in: the namespaces worker; the command line, to say of one whether its program could use it.
Source: namespaces(7), ioctl_ns(2), setns(2), unshare(2), user_namespaces(7); linux/nsfs.h, linux/sched.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
import sys
from typing import NamedTuple

from fdbroker.kernel import libc
from fdbroker.kernel.pinned import Process

CLONE = {
    "net": 0x4000_0000,
    "mnt": 0x0002_0000,
    "pid": 0x2000_0000,
    "user": 0x1000_0000,
    "uts": 0x0400_0000,
    "ipc": 0x0800_0000,
    "cgroup": 0x0200_0000,
    "time": 0x0000_0080,
}
_int = ctypes.c_int
_SETNS = ctypes.CFUNCTYPE(_int, _int, _int, use_errno=True)(("setns", libc.LIBC))
_UNSHARE = ctypes.CFUNCTYPE(_int, _int, use_errno=True)(("unshare", libc.LIBC))
FOLDER = "/run/netns"  # ip-netns(8)
_NS_GET_USERNS, _NS_GET_NSTYPE, _NS_GET_OWNER_UID = 0xB701, 0xB703, 0xB704
_NS_GET_PID_FROM_PIDNS = 0x8004B706  # Linux 6.11
_NS_MNT_GET_INFO, _NS_MNT_GET_NEXT = 0x8010B70A, 0x8010B70B  # Linux 6.12
QUESTIONS = {
    "NS_GET_USERNS": _NS_GET_USERNS,
    "NS_GET_NSTYPE": _NS_GET_NSTYPE,
    "NS_GET_OWNER_UID": _NS_GET_OWNER_UID,
    "NS_GET_PID_FROM_PIDNS": _NS_GET_PID_FROM_PIDNS,
    "NS_MNT_GET_INFO": _NS_MNT_GET_INFO,
    "NS_MNT_GET_NEXT": _NS_MNT_GET_NEXT,
}
_MNT_INFO = struct.Struct("=IIQ")  # struct mnt_ns_info: its size, the number of mounts, an id
KCMP_FILES = 2  # linux/kcmp.h
_SYS_KCMP = {"x86_64": 312, "aarch64": 272, "riscv64": 272}.get(os.uname().machine)  # asm/unistd.h
_long = ctypes.c_long
_SYSCALL_KCMP = ctypes.CFUNCTYPE(_long, _long, _long, _long, _long, _long, _long)(("syscall", libc.LIBC))
_CAP_SYS_CHROOT, _CAP_SYS_ADMIN = 1 << 18, 1 << 21
# struct pidfd_info of linux/pidfd.h, as long as it was at first: mask, cgroup, pid, tgid, ppid, then user and group in
# turn: real, effective, saved, of the file system
_INFO = struct.Struct("=QQ3I8I4x")
_INFO_CREDS = 1 << 1
PIDFD_GET_INFO = 0xC040FF0B  # Linux 6.13


class NotANamespace(Exception):
    """What was found is no namespace of the type that was asked for, or not root's; the text says what it is."""


class Caller(NamedTuple):
    """What decides whether a program may enter a namespace: its user namespace, its effective uid and capabilities.

    `user` is a descriptor, owned by who made this.
    """

    user: int
    euid: int
    capabilities: int


def uids_of(pidfd: int) -> tuple[int, ...] | None:
    """Real, effective, saved and file system uid of the process of the borrowed `pidfd`; None: the kernel does not say.

    /proc/PID/status has them as well, but the kernel writes all groups of the process with each read of it, which a
    process in 65,536 groups makes take 14 ms and more. Raises ProcessLookupError once it is gone.
    """
    try:
        info = _INFO.unpack(fcntl.ioctl(pidfd, PIDFD_GET_INFO, _INFO.pack(_INFO_CREDS, *[0] * 12)))
    except ProcessLookupError:
        raise
    except OSError:  # ENOTTY before Linux 6.13
        return None
    return info[5::2] if info[0] & _INFO_CREDS else None


def type_of(descriptor: int) -> str:
    """The type of a namespace's descriptor, "" for a descriptor of something else."""
    try:
        flag = fcntl.ioctl(descriptor, _NS_GET_NSTYPE)
    except OSError as error:
        if error.errno in (errno.ENOTTY, errno.EBADF, errno.EINVAL):
            return ""
        raise
    return next((name for name, clone in CLONE.items() if clone == flag), "")


def identity(descriptor: int) -> tuple[int, int]:
    """Two descriptors are of one namespace when these are equal."""
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def owner(descriptor: int) -> int:
    """An owned descriptor of the user namespace that owns a namespace; of a user namespace, its parent.

    Raises PermissionError when that is not ours or below ours; so the parent of our own is never told.
    """
    return fcntl.ioctl(descriptor, _NS_GET_USERNS)


def owner_uid(user: int) -> int:
    """The uid that made a user namespace."""
    number = fcntl.ioctl(user, _NS_GET_OWNER_UID, bytes(4))
    return int.from_bytes(number, sys.byteorder)


def pid_here(pid_namespace: int, pid: int) -> int:
    """What process `pid` of that pid namespace is called in ours. Raises OSError: ESRCH for none."""
    return fcntl.ioctl(pid_namespace, _NS_GET_PID_FROM_PIDNS, pid)


def mounts_in(descriptor: int) -> int | None:
    """How many mounts a mount namespace has, whoever sees them; None: the kernel does not say, before Linux 6.12.

    The root of them all does not count. It is below the one that is `/`, and nobody sees it.
    """
    try:
        _, number, _ = _MNT_INFO.unpack(fcntl.ioctl(descriptor, _NS_MNT_GET_INFO, bytes(_MNT_INFO.size)))
    except OSError:
        return None
    return int(number)


def next_mount_namespace(descriptor: int) -> int:
    """An owned descriptor of the mount namespace that was made next after this one, whoever holds it, and by what.

    Needs CAP_SYS_ADMIN; namespaces that this has no power over are left out. Raises OSError: ENOENT behind the last
    one, ENOTTY before Linux 6.12, EPERM for who is not in the machine's own pid namespace.
    """
    return fcntl.ioctl(descriptor, _NS_MNT_GET_NEXT, 0)


def shares_descriptors(thread: int, other: int) -> bool:
    """Whether two threads have one table of descriptors; no, when the kernel does not say. Needs CAP_SYS_PTRACE."""
    return _SYS_KCMP is not None and bool(_SYSCALL_KCMP(_SYS_KCMP, thread, other, KCMP_FILES, 0, 0) == 0)


def setns(descriptor: int, flags: int) -> None:
    """Enter the namespace of a descriptor."""
    if _SETNS(descriptor, flags) != 0:
        libc.fail("setns")


def unshare(flags: int) -> None:
    """Leave for new namespaces."""
    if _UNSHARE(flags) != 0:
        libc.fail("unshare")


def open_named(name: str) -> int:
    """An owned descriptor of the net namespace /run/netns/NAME; `name` has no slash.

    Raises FileNotFoundError, OSError, or NotANamespace: for a link, a file that no namespace is mounted on, a folder
    that is not root's alone. Nothing but a namespace is opened for more than looking at it: what is found must be on
    the file system of namespaces, which has nothing else.
    """
    if "/" in name:
        raise NotANamespace("it is no name")
    folder = os.open(FOLDER, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(folder)
        if status.st_uid != 0 or status.st_mode & 0o022:
            raise NotANamespace(f"{FOLDER} is not root's alone")
        # openat2 could say more, but its flags are hidden from the worker's seccomp filter
        found = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    finally:
        os.close(folder)
    try:
        if os.fstat(found).st_dev != os.stat("/proc/self/ns/net").st_dev:
            raise NotANamespace("no namespace is mounted there")
        # the very namespace that was looked at
        descriptor = os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(found)
    kind = type_of(descriptor)
    if kind != "net":
        os.close(descriptor)
        raise NotANamespace(f"it is a {kind or 'strange'} namespace, not a net namespace")
    return descriptor


def caller_of(process: Process) -> Caller:
    """What decides for a process. Needs CAP_SYS_PTRACE over it; the caller owns the descriptor in it."""
    status = process.status()
    return Caller(process.namespace("user"), status.uids[1], status.effective)


def why_unusable(descriptor: int, kind: str, who: Caller) -> int:
    """Why setns(2) of a program would fail, as an index of wire.worker.UNUSABLE: what ns_capable() of Linux says."""
    admin = bool(who.capabilities & _CAP_SYS_ADMIN)
    if kind == "user":
        if identity(descriptor) == identity(who.user):
            return 4
        return 0 if _rules_over(os.dup(descriptor), who, admin=admin) else 2
    reason = why_unusable_owned(kind, who)
    if reason:
        return reason
    try:
        owning = owner(descriptor)
    except PermissionError:
        return 2
    return 0 if _rules_over(owning, who, admin=admin) else 2


def why_unusable_owned(kind: str, who: Caller) -> int:
    """The same for a namespace that the program's own user namespace owns."""
    if not who.capabilities & _CAP_SYS_ADMIN:
        return 1
    return 3 if kind == "mnt" and not who.capabilities & _CAP_SYS_CHROOT else 0


def _rules_over(user: int, who: Caller, *, admin: bool) -> bool:
    """Whether a program has CAP_SYS_ADMIN in a user namespace, which is taken. Source: cap_capable() of Linux."""
    own = identity(who.user)
    with contextlib.ExitStack() as owned:
        owned.callback(os.close, user)
        while identity(user) != own:
            try:
                parent = owner(user)
            except PermissionError:
                return False  # at the top, and not met on the way
            owned.callback(os.close, parent)
            if identity(parent) == own and owner_uid(user) == who.euid:
                return True  # who makes a user namespace has all capabilities in it, from outside
            user = parent
        return admin


def is_at_or_above(user: int, below: int) -> bool:
    """Whether user namespace `user` is `below` or one of its ancestors; both are borrowed."""
    wanted = identity(user)
    with contextlib.ExitStack() as owned:
        while identity(below) != wanted:
            try:
                below = owner(below)
            except PermissionError:
                return False
            owned.callback(os.close, below)
        return True
