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

from fdbroker import limits
from fdbroker.kernel import namespaces, processes
from fdbroker.kernel.namespaces import CLONE
from fdbroker.wire.worker import Ask

_OTHERS_S = limits.LIVING_OTHERS_MS / 1000
_LINKS = (*CLONE, "time_for_children")
# what has no path of a file system, and no other kind of it than namespaces
_NSFS = re.compile(rf"(?:{'|'.join(CLONE)}):\[([0-9]+)\]")


class _Late(Exception):
    """The time is over, and nobody has looked at all processes that may be the owner's."""


def living(ask: Ask, until_s: float) -> set[int]:
    """Those of the known namespaces, which were made for an owner, that still are: that any of its uids holds.

    A number that the kernel has given to somebody else's namespace since then does not count. At `until_s` all that
    were not found yet count, if the owner's processes or root's took it so long.
    """
    search = _Search(ask, until_s)
    try:
        search.run()
    except _Late:
        return set(ask.known)
    return set(ask.known) - search.missing


class _Search:
    """The owner's processes come first, then root's: a user starts such a one by each setuid program of root's.

    Others come last, in a time of their own, and when that is over those that are left do not count. They would be the
    owner's by an id that is not the effective one: while it runs a program that another user made setuid, and who has
    such a user's help can give it the namespace. But any user can make them slow to look at, by their number, or before
    Linux 6.13 by their groups, and the owner would be refused for it.
    """

    def __init__(self, ask: Ask, until_s: float) -> None:
        self.ask = ask
        self.until_s = until_s
        self.missing = set(ask.known)
        self._mounts: set[str] = set()

    def run(self) -> None:
        """Look until nothing is missing. Raises _Late."""
        own, roots, others = self._processes()
        for pid in own:
            self._in_time()
            self._look(pid)
        for pid in roots:
            self._in_time()
            self._enter(pid)
            self._look_if_its(pid)
        until_s = min(self.until_s, time.monotonic() + _OTHERS_S)
        for step in (self._enter, self._look_if_its):  # the first takes no longer for anybody's groups
            for pid in others:
                if time.monotonic() >= until_s:
                    return
                step(pid)

    def _in_time(self) -> None:
        if time.monotonic() >= self.until_s:
            raise _Late

    def _processes(self) -> tuple[list[str], list[str], list[str]]:
        """By their effective uids: the owner's, root's, and others, those of the system's users first.

        The owner of a process' folder is its effective uid, of one that is not dumpable as well: proc(5) says so of
        what is in the folder alone.
        """
        own: list[str] = []
        roots: list[str] = []
        others: list[tuple[int, str]] = []
        for pid in filter(str.isdecimal, os.listdir("/proc")):
            self._in_time()
            with contextlib.suppress(OSError):  # it ended meanwhile
                euid = os.stat(f"/proc/{pid}").st_uid
                if self.ask.belongs(euid):
                    own.append(pid)
                elif euid == 0:
                    roots.append(pid)
                else:
                    others.append((euid, pid))
        return own, roots, [pid for _, pid in sorted(others)]

    def _enter(self, pid: str) -> None:
        """A process that need not be the owner's: what it is in."""
        if not self.missing:
            return
        with contextlib.suppress(OSError):
            self.missing -= set(_entered(f"/proc/{pid}", self.missing, self.ask, its=False))

    def _look_if_its(self, pid: str) -> None:
        with contextlib.suppress(OSError):
            if self.missing and any(map(self.ask.belongs, _uids(pid))):
                self._look(pid)

    def _look(self, pid: str) -> None:
        """A process of the owner's: all that it holds."""
        if not self.missing:
            return
        with contextlib.suppress(OSError):
            self.missing -= set(_entered(f"/proc/{pid}", self.missing, self.ask, its=True))
            for thread in os.listdir(f"/proc/{pid}/task"):
                self._in_time()
                self.missing -= set(_entered(f"/proc/{pid}/task/{thread}", self.missing, self.ask, its=True))
            for number in _opened(pid):
                self._in_time()
                self.missing.discard(number)
            mounted = os.readlink(f"/proc/{pid}/ns/mnt")
            if mounted not in self._mounts:
                self._mounts.add(mounted)
                self.missing -= set(_mounted(pid))


def _uids(pid: str) -> tuple[int, ...]:
    """Those of a process. Before Linux 6.13 it takes as long as the process has groups."""
    pidfd = os.pidfd_open(int(pid))
    try:
        found = processes.uids_of(pidfd)
    finally:
        os.close(pidfd)
    if found is not None:
        return found
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


def _opened(pid: str) -> Iterator[int]:
    """By the link alone: fdinfo would ask the file's driver, and an epoll's owner can make that wait for ever."""
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            yield _number(os.readlink(f"/proc/{pid}/fd/{name}"))


def _mounted(pid: str) -> Iterator[int]:
    # a newline alone ends a line: a mount's path may have "\r" in it
    with open(f"/proc/{pid}/mountinfo", errors="replace", newline="\n") as file:
        for line in file:
            number = _number(line.split(" ", 4)[3])
            if number:
                yield number
