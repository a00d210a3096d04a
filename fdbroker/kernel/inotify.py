"""inotify(7): be told that a directory's entries, or their modes and owners, change.

Runs in: keeper. Root alone changes names, modes and owners in /dev. A user with write access to a node can change its
times at any rate, and inotify reports that too. Nothing read here is used but the fact that something changed.
"""

from __future__ import annotations

import ctypes
import os

from fdbroker.kernel import libc

_int, _PROTO = ctypes.c_int, ctypes.CFUNCTYPE
_INIT1 = _PROTO(_int, _int, use_errno=True)(("inotify_init1", libc.LIBC))
_ADD_WATCH = _PROTO(_int, _int, ctypes.c_char_p, ctypes.c_uint, use_errno=True)(("inotify_add_watch", libc.LIBC))

# sys/inotify.h
_IN_ATTRIB, _IN_MOVED_FROM, _IN_MOVED_TO, _IN_CREATE, _IN_DELETE = 0x4, 0x40, 0x80, 0x100, 0x200
_IN_ONLYDIR = 0x01000000
_CHANGES = _IN_ATTRIB | _IN_MOVED_FROM | _IN_MOVED_TO | _IN_CREATE | _IN_DELETE | _IN_ONLYDIR

_READ_BYTES = 65536
_QUEUE_BYTES = 16384 * (16 + 256)  # max_queued_events, each with the longest name


def create() -> int:
    """An owned inotify descriptor, non-blocking and close-on-exec."""
    descriptor: int = _INIT1(os.O_CLOEXEC | os.O_NONBLOCK)
    if descriptor < 0:
        libc.fail("inotify_init1")
    return descriptor


def watch_directory(inotify: int, path: str) -> None:
    """Report entries that come to or leave the directory `path`, or change; watching it twice is one watch.

    A directory that is not there, or cannot be watched, is left out: its own directory's watch tells when it comes.
    So is one that others than root may write to, such as /dev/shm: they would keep us busy.
    """
    try:
        if os.stat(path).st_mode & 0o022:
            return
    except OSError:
        return
    # ENOSPC, ENOMEM: then this folder's changes are not told, which is no reason to end
    _ADD_WATCH(inotify, os.fsencode(path), _CHANGES)


def drain(inotify: int) -> None:
    """Forget what was reported: all of it, or as much as a full queue had, where more comes all the time."""
    try:
        for _ in range(_QUEUE_BYTES // _READ_BYTES):
            os.read(inotify, _READ_BYTES)
    except BlockingIOError:
        pass
