"""What /proc shows about another process to anybody: its name for itself and its user namespace's id maps.

Runs in: opener. The process's owner controls `comm`, and nothing else here.
"""

from __future__ import annotations

import os
import select


def is_alive(pidfd: int) -> bool:
    """Whether the process of the borrowed `pidfd` still runs. Source: pidfd_open(2): readable once it ended."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return not poll.poll(0)


def _read(proc: int, name: str) -> bytes:
    descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=proc)
    try:
        return os.read(descriptor, 4096)
    finally:
        os.close(descriptor)


def comm(proc: int, pid: int) -> str:
    """The name that process `pid` gives itself, at most 15 bytes, or "" once it is gone. `proc` is /proc, borrowed."""
    try:
        return _read(proc, f"{pid}/comm").rstrip(b"\n").decode(errors="backslashreplace")
    except OSError:
        return ""


def id_maps(proc: int, pid: int) -> tuple[bytes, bytes] | None:
    """The uid and gid map of the user namespace of process `pid`, None when they cannot be read.

    The namespace itself would need CAP_SYS_PTRACE. A namespace with other ids than ours has other maps; one with
    the very same maps can only be made by who may act as every one of these ids already. Source: user_namespaces(7).
    """
    try:
        return _read(proc, f"{pid}/uid_map"), _read(proc, f"{pid}/gid_map")
    except OSError:
        return None
