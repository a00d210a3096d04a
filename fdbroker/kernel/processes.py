"""What /proc shows about another process: its name for itself, its session, its id maps, whether it is the one meant.

Runs in: opener; `read` and `is_alive` in others, too. The process's owner controls `comm`, and nothing else here.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import time
from typing import NamedTuple


def is_alive(pidfd: int) -> bool:
    """Whether the process of the borrowed `pidfd` still runs. Source: pidfd_open(2): readable once it ended."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return not poll.poll(0)


def boot_s() -> float:
    """Now, on the clock by which the kernel says when a process started."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def read(proc: int, name: str) -> bytes:
    """The whole of a file below `proc`, which is /proc or a folder of it, borrowed. Raises OSError."""
    descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=proc)
    try:
        data = b""
        while part := os.read(descriptor, 65536):  # a user in many groups has a long status
            data += part
        return data
    finally:
        os.close(descriptor)


def comm(proc: int, pid: int) -> str:
    """The name that process `pid` gives itself, at most 15 bytes, or "" once it is gone. `proc` is /proc, borrowed."""
    try:
        return read(proc, f"{pid}/comm").rstrip(b"\n").decode(errors="backslashreplace")
    except OSError:
        return ""


# The line of cgroup(5) for the tree that systemd manages. Root alone puts a process into `user-UID.slice` and, right
# below it, `session-ID.scope`; a user may make whatever it likes in what is delegated to it, further below.
_SLICE = re.compile(rb"0::/user\.slice/user-(0|[1-9][0-9]{0,9})\.slice(/[^\n]*)?")
_SCOPE = re.compile(rb"/session-([A-Za-z0-9_]{1,32})\.scope")


class Place(NamedTuple):
    """Where logind put a process: in the slice of user `uid`, -1 for none, and in the user's `session`, "" for none."""

    uid: int
    session: str


NOWHERE = Place(-1, "")


def place(proc: int, pid: int) -> Place:
    """The login session of process `pid`, as logind names it, and its user, by the process's control group.

    Raises OSError when it has ended, or is hidden from us: proc(5), hidepid.
    """
    for line in read(proc, f"{pid}/cgroup").split(b"\n"):
        if found := _SLICE.fullmatch(line):
            scope = _SCOPE.fullmatch(found[2] or b"")
            return Place(int(found[1]), scope[1].decode() if scope else "")
    return NOWHERE


def id_maps(proc: int, pid: int) -> tuple[bytes, bytes] | None:
    """The uid and gid map of the user namespace of process `pid`, None when they cannot be read.

    The namespace itself would need CAP_SYS_PTRACE. A namespace with other ids than ours has other maps; one with
    the very same maps can only be made by who may act as every one of these ids already. Source: user_namespaces(7).
    """
    try:
        return read(proc, f"{pid}/uid_map"), read(proc, f"{pid}/gid_map")
    except OSError:
        return None


def like(proc: int, pid: int, uid: int, by_s: float) -> int | None:
    """An owned pidfd of process `pid`, if its uid is that and it started by `by_s` of CLOCK_BOOTTIME; else None.

    Source: proc(5), "starttime", in hundredths of a second, rounded down. Raises OSError.
    """
    pidfd = os.pidfd_open(pid)
    with contextlib.suppress(OSError):
        # behind its name, which may have anything in it
        started = int(read(proc, f"{pid}/stat").rpartition(b")")[2].split()[19])
        same = os.stat(str(pid), dir_fd=proc).st_uid == uid and started / os.sysconf("SC_CLK_TCK") <= by_s
        if same and is_alive(pidfd):  # so what was read was this process's
            return pidfd
    os.close(pidfd)
    return None
