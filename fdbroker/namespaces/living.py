"""Which namespaces still are: those that a process is in, has open, or has mounted somewhere.

Runs in: a child of the namespaces worker, with CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH raised. Clients control what
their processes hold; one that is held by a socket alone, or by a descriptor in flight, is not seen here. The kernel's
own maxima (/proc/sys/user) hold for those as well.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator

from fdbroker.kernel import namespaces
from fdbroker.kernel.namespaces import CLONE
from fdbroker.wire.worker import Ask

_LINKS = (*CLONE, "time_for_children")
# what has no path of a file system, and no other kind of it than namespaces
_NSFS = re.compile(rf"(?:{'|'.join(CLONE)}):\[([0-9]+)\]")


def living(ask: Ask, until_s: float) -> set[int]:
    """Those of the known namespaces, which were made for an owner, that still are: that any of its uids holds.

    A number that the kernel has given to somebody else's namespace since then does not count. At `until_s` all that
    were not found yet count: it takes as long as processes hold descriptors.
    """
    wanted = set(ask.known)
    found: set[int] = set()
    mounts: set[str] = set()
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        if wanted <= found:
            break
        if time.monotonic() >= until_s:
            return wanted
        with contextlib.suppress(OSError):  # it ended meanwhile
            its = any(map(ask.belongs, _uids(pid)))
            found |= set(_entered(f"/proc/{pid}", wanted - found, ask, its=its))
            if its:
                for thread in os.listdir(f"/proc/{pid}/task"):
                    if time.monotonic() >= until_s:
                        break
                    found |= set(_entered(f"/proc/{pid}/task/{thread}", wanted - found, ask, its=its))
                found |= set(_opened(pid, until_s)) & wanted
                mounted = os.readlink(f"/proc/{pid}/ns/mnt")
                if mounted not in mounts:
                    mounts.add(mounted)
                    found |= set(_mounted(pid)) & wanted
    return found if time.monotonic() < until_s else wanted


def _uids(pid: str) -> tuple[int, ...]:
    """Those of a process. Its folder's owner is root when it is not dumpable, which it decides itself."""
    with open(f"/proc/{pid}/status", "rb") as file:
        return next(tuple(map(int, line[5:].split())) for line in file if line.startswith(b"Uid:\t"))


def _number(link: str) -> int:
    found = _NSFS.fullmatch(link)
    return int(found[1]) if found else 0


def _entered(folder: str, wanted: set[int], ask: Ask, *, its: bool) -> Iterator[int]:
    """Those that a process or thread is in; `its`: it is one of the owner's."""
    for kind in _LINKS:
        path = f"{folder}/ns/{kind}"
        try:
            number = _number(os.readlink(path))
        except FileNotFoundError:  # a kernel without that type
            continue
        if number in wanted and _is_of(path, ask, its=its):
            yield number


def _is_of(path: str, ask: Ask, *, its: bool) -> bool:
    """Whether a namespace is owned by a user namespace of that owner; or by ours, and `its` process is in it."""
    with contextlib.ExitStack() as owned:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        owned.callback(os.close, descriptor)
        user = namespaces.owner(descriptor)
        owned.callback(os.close, user)
        ours = os.stat("/proc/self/ns/user")
        return ask.belongs(namespaces.owner_uid(user)) or (
            its and namespaces.identity(user) == (ours.st_dev, ours.st_ino)
        )


def _opened(pid: str, until_s: float) -> Iterator[int]:
    """By the link alone: fdinfo would ask the file's driver, and an epoll's owner can make that wait for ever."""
    for name in os.listdir(f"/proc/{pid}/fd"):
        if time.monotonic() >= until_s:
            return
        with contextlib.suppress(FileNotFoundError):
            yield _number(os.readlink(f"/proc/{pid}/fd/{name}"))


def _mounted(pid: str) -> Iterator[int]:
    # a newline alone ends a line: a mount's path may have "\r" in it
    with open(f"/proc/{pid}/mountinfo", errors="replace", newline="\n") as file:
        for line in file:
            number = _number(line.split(" ", 4)[3])
            if number:
                yield number
