"""inotify(7): be told that a directory's entries change.

Runs in: opener. Only root changes /dev; nothing that is read here is used but the fact that something changed.
"""

from __future__ import annotations

import os

from fdbroker.kernel import libc

# sys/inotify.h
_IN_MOVED_FROM, _IN_MOVED_TO, _IN_CREATE, _IN_DELETE = 0x40, 0x80, 0x100, 0x200
_IN_ONLYDIR = 0x01000000
_CHANGES = _IN_MOVED_FROM | _IN_MOVED_TO | _IN_CREATE | _IN_DELETE | _IN_ONLYDIR


def create() -> int:
    """An owned inotify descriptor, non-blocking and close-on-exec."""
    descriptor: int = libc.INOTIFY_INIT1(os.O_CLOEXEC | os.O_NONBLOCK)
    if descriptor < 0:
        libc.fail("inotify_init1")
    return descriptor


def watch_directory(inotify: int, path: str) -> None:
    """Report entries that come to or leave the directory `path`; watching it twice is one watch.

    A directory that is not there, or cannot be watched, is left out: its own directory's watch tells when it comes.
    So is one that others than root may write to, such as /dev/shm: they would keep us busy.
    """
    try:
        if os.stat(path).st_mode & 0o022:
            return
    except OSError:
        return
    # ENOSPC, ENOMEM: then this folder's changes are not told, which is no reason to end
    libc.INOTIFY_ADD_WATCH(inotify, os.fsencode(path), _CHANGES)


def drain(inotify: int) -> None:
    """Forget what was reported."""
    try:
        while os.read(inotify, 65536):
            pass
    except BlockingIOError:
        pass
