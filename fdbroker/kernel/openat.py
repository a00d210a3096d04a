"""openat2(2), and reopening a descriptor for use.

Runs in: opener. An attacker controls the path; `resolve` keeps it where it belongs.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache

from fdbroker.kernel import libc

# linux/openat2.h
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08

_SYS_OPENAT2 = 437  # the same on every architecture: linux/syscall tables since 424
_ACCESS_FLAGS = {"ro": os.O_RDONLY, "wo": os.O_WRONLY, "rw": os.O_RDWR}
# A terminal must not become ours, a device must not make us wait, a child must not inherit it.
_USE_FLAGS = os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


_HOW_BYTES = ctypes.sizeof(_OpenHow)


@cache
def _how(flags: int, resolve: int) -> _OpenHow:
    """The kernel only reads it, so one is enough for each of the few combinations."""
    return _OpenHow(flags | os.O_CLOEXEC, 0, resolve)


def openat2(directory: int, path: str, flags: int, resolve: int) -> int:
    """Open `path` below the borrowed `directory`; returns an owned descriptor, always close-on-exec.

    `resolve` holds RESOLVE_ bits. Raises OSError: ELOOP for a link that they forbid, EXDEV for an escape.
    Source: openat2(2).
    """
    name, how = os.fsencode(path), ctypes.addressof(_how(flags, resolve))
    descriptor: int = libc.SYSCALL_OPENAT2(_SYS_OPENAT2, directory, name, how, _HOW_BYTES)
    if descriptor < 0:
        libc.fail("openat2")
    return descriptor


def reopen(proc_self_fd: int, node_fd: int, access: str) -> int:
    """Open the very file of the O_PATH descriptor `node_fd` for use; returns an owned descriptor.

    `proc_self_fd` is a descriptor of /proc/self/fd; both are borrowed. The result is a new open file description,
    non-blocking. Raises OSError as open(2) of the device does.
    """
    return os.open(str(node_fd), _ACCESS_FLAGS[access] | _USE_FLAGS, dir_fd=proc_self_fd)
