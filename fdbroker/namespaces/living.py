"""Which namespaces still are: those that a process is in, has open, or has mounted somewhere.

Runs in: a child of the namespaces worker, with CAP_SYS_PTRACE, CAP_DAC_READ_SEARCH and CAP_SYS_ADMIN raised. Clients
control what their processes hold. What cannot be looked at counts, for the owner of what hides it, as if all were
there. A namespace that is held by a socket alone, by a descriptor in flight, or by a process that forks and ends all
the time, is not seen here, unless it is a mount namespace, which the kernel lists. The kernel's own maxima
(/proc/sys/user) hold for all of them.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator

from fdbroker.kernel import namespaces
from fdbroker.limits import namespaces as limits
from fdbroker.terms import NEW_NAMESPACE_TYPES
from fdbroker.wire.worker import Ask

_OTHERS_S = limits.LIVING_OTHERS_MS / 1000
_TRIES, _TRY_S = 20, 0.001
# User and pid namespaces are never made here: one that has the number by now is another one.
_LINKS = (*NEW_NAMESPACE_TYPES, "time_for_children")
_ENDED = (FileNotFoundError, ProcessLookupError)
# what has no path of a file system, and no other kind of it than namespaces
_NSFS = re.compile(rf"(?:{'|'.join(NEW_NAMESPACE_TYPES)}):\[([0-9]+)\]")


class _Unseen(Exception):
    """Not all that the owner's processes may hold was looked at: the time is over, or something hides it."""


def living(ask: Ask, until_s: float) -> set[int]:
    """Those of the known namespaces, which were made for an owner, that still are: that any of its uids holds.

    A number that the kernel has given to somebody else's namespace since then does not count. At `until_s` all that
    were not found yet count, if the owner's processes or root's took it so long; so do they when the owner's hide
    something.
    """
    search = _Search(ask, until_s)
    try:
        search.run()
    except _Unseen:
        return set(ask.known)
    return set(ask.known) - search.missing


def in_own_user_namespaces(ask: Ask, *, sure: bool) -> set[int]:
    """The mount namespaces, as far as the kernel lists them, of user namespaces that an owner's uids have made.

    If it need not be `sure`, one that is just ending may hide some.
    """
    found = _listed(time.monotonic() + _OTHERS_S, _TRIES if sure else 1)
    return {os.fstat(one).st_ino for one in found if _is_of(one, ask, its=False)}


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
        self._listed: set[int] = set()  # mount namespaces of our own user namespace that are, whoever holds them
        self._of_others: set[int] = set()  # mount namespaces that processes which need not be the owner's are in
        self._whole: dict[str, bool] = {}  # mount namespaces, by link: whether all that is mounted there was seen

    def run(self) -> None:
        """Look until nothing is missing. Raises _Unseen."""
        own, roots, others = self._processes()
        for pid in own:
            self._in_time()
            self._look(pid)
        for pid in roots:
            self._in_time()
            self._enter(pid)
            self._look_if_its(pid)
        self._look_at_list(time.monotonic() + _OTHERS_S)
        self._look_at_others(others, min(self.until_s, time.monotonic() + _OTHERS_S))
        # What is listed lives. It counts for this owner unless a process of others is in it, which the owner cannot
        # bring about: to join it takes CAP_SYS_ADMIN in our own user namespace.
        self.missing -= self._listed - self._of_others
        if self.missing and not all(self._whole.values()):
            raise _Unseen

    def _look_at_others(self, others: list[str], until_s: float) -> None:
        for step in (self._enter, self._look_if_its):  # the first takes no longer for anybody's groups
            for pid in others:
                if time.monotonic() >= until_s:
                    return
                step(pid)

    def _look_at_list(self, until_s: float) -> None:
        for found in _listed(until_s):
            number = os.fstat(found).st_ino
            if number in self.missing and _is_of(found, self.ask, its=False):
                self.missing.discard(number)
            elif number in self.missing and _is_of(found, self.ask, its=True):
                self._listed.add(number)
            if not self.missing:
                return

    def _in_time(self) -> None:
        if time.monotonic() >= self.until_s:
            raise _Unseen

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
                if _belongs(self.ask, euid):
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
            self._of_others.add(_number(os.readlink(f"/proc/{pid}/ns/mnt")))

    def _look_if_its(self, pid: str) -> None:
        its = False
        with contextlib.suppress(OSError):
            its = bool(self.missing) and any(_belongs(self.ask, uid) for uid in _uids(pid))
        if its:
            self._look(pid)

    def _look(self, pid: str) -> None:
        """A process of the owner's: all that it holds. Its threads are in one, have tables and roots of their own."""
        threads: list[str] = []
        with contextlib.suppress(*_ENDED):
            threads = os.listdir(f"/proc/{pid}/task")
        read = 0  # the last one whose descriptors were looked at
        for thread in threads:
            if not self.missing:
                return
            shared = bool(read) and namespaces.shares_descriptors(read, int(thread))
            if self._look_at_thread(f"/proc/{pid}/task/{thread}", descriptors=not shared) and not shared:
                read = int(thread)

    def _look_at_thread(self, folder: str, *, descriptors: bool) -> bool:
        """Whether it was there to the end. One that ends meanwhile can be forbidden for a moment. Raises _Unseen."""
        for _ in range(2):
            self._in_time()
            try:
                self.missing -= set(_entered(folder, self.missing, self.ask, its=True))
                for number in _opened(folder) if descriptors else ():
                    self._in_time()
                    self.missing.discard(number)
                self._look_at_mounts(folder)
            except _ENDED:
                return False
            except OSError:
                continue
            return True
        if not _belongs(self.ask, 0):  # root has processes that a security module keeps from everybody
            raise _Unseen
        return False

    def _look_at_mounts(self, folder: str) -> None:
        """What is mounted in a thread's mount namespace. What is outside of its root another one may see."""
        link = os.readlink(f"{folder}/ns/mnt")
        if not self._whole.get(link):
            descriptor = os.open(f"{folder}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
            try:
                numbers, whole = _mounted(folder, descriptor)
                self.missing -= numbers
                # in one of somebody else's the owner can mount nothing
                self._whole[link] = whole or not _is_of(descriptor, self.ask, its=False)
            finally:
                os.close(descriptor)


def _listed(until_s: float, tries_max: int = _TRIES) -> Iterator[int]:
    """A borrowed descriptor of each mount namespace made since this service's own, where the kernel lists them."""
    found, tries = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC), 0
    try:
        while time.monotonic() < until_s and tries < tries_max:
            before = found
            try:
                found = namespaces.next_mount_namespace(before)
            except FileNotFoundError:  # the end; or one is just ending, and hides those behind it for a moment
                tries += 1
                if tries < tries_max:
                    time.sleep(_TRY_S)
                continue
            os.close(before)
            tries = 0
            yield found
    except OSError:  # this kernel has no list, or not for us
        pass
    finally:
        os.close(found)


def _belongs(ask: Ask, uid: int) -> bool:
    """Whether a uid is one of the owner's."""
    return any(first <= uid <= last for first, last in ask.uids)


def _uids(pid: str) -> tuple[int, ...]:
    """Those of a process. Before Linux 6.13 it takes as long as the process has groups."""
    pidfd = os.pidfd_open(int(pid))
    try:
        found = namespaces.uids_of(pidfd)
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
        if number in wanted:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if _is_of(descriptor, ask, its=its):
                    yield number
            finally:
                os.close(descriptor)


def _is_of(descriptor: int, ask: Ask, *, its: bool) -> bool:
    """Whether a namespace is owned by a user namespace of that owner; or by ours, and `its` process is in it."""
    maker = _maker(descriptor)
    return its if maker is None else _belongs(ask, maker)


def _maker(descriptor: int) -> int | None:
    """The uid that made the user namespace which owns a namespace; None: that is ours, or above ours."""
    try:
        user = namespaces.owner(descriptor)
    except PermissionError:
        return None
    try:
        ours = os.stat("/proc/self/ns/user")
        return None if namespaces.identity(user) == (ours.st_dev, ours.st_ino) else namespaces.owner_uid(user)
    finally:
        os.close(user)


def _opened(folder: str) -> Iterator[int]:
    """By the link alone: fdinfo would ask the file's driver, and an epoll's owner can make that wait for ever."""
    for name in os.listdir(f"{folder}/fd"):
        with contextlib.suppress(FileNotFoundError):
            yield _number(os.readlink(f"{folder}/fd/{name}"))


def _mounted(folder: str, namespace: int) -> tuple[set[int], bool]:
    """The namespaces that a thread sees mounted, and whether it sees all mounts of its mount namespace.

    Before Linux 6.12, which does not say how many there are, whoever sees a `/` is believed to see all: in an empty
    folder it would not.
    """
    numbers, seen, root = set(), 0, False
    # a newline alone ends a line: a mount's path may have "\r" in it
    with open(f"{folder}/mountinfo", errors="replace", newline="\n") as file:
        for line in file:
            own, parent, _, what, where, _ = line.split(" ", 5)
            numbers.add(_number(what))
            seen += own != parent  # the root of them all is its own parent, and does not count
            root = root or where == "/"
    there = namespaces.mounts_in(namespace)
    return numbers - {0}, root if there is None else there == seen
