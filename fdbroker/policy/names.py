"""Names of users and groups to numbers, by the machine's databases (NSS).

Runs in: launcher, command line; never in the opener or the inbox, for NSS loads code and talks to services.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
from collections.abc import Collection
from functools import cached_property

from fdbroker.policy.owners import Owners
from fdbroker.policy.ranges import make_owners
from fdbroker.terms import INVALID_ID

_SUBUID = "/etc/subuid"
_DATABASES = ("/etc/passwd", "/etc/group", _SUBUID)


def _number(name: str) -> int | None:
    return int(name) if name.isascii() and name.isdecimal() and len(name) <= 10 else None


def uid_of(name: str) -> int | None:
    """The uid of a user's name or of a decimal number, which need not exist; None for an unknown name."""
    number = _number(name)
    if number is not None:
        return number
    try:
        return pwd.getpwnam(name).pw_uid
    except (KeyError, ValueError):  # unknown, or no name at all: a NUL, a lone surrogate
        return None


def gid_of(name: str) -> int | None:
    """The gid of a group's name or of a decimal number, which need not exist; None for an unknown name."""
    number = _number(name)
    if number is not None:
        return number
    try:
        return grp.getgrnam(name).gr_gid
    except (KeyError, ValueError):  # unknown, or no name at all: a NUL, a lone surrogate
        return None


def group_name(gid: int) -> str:
    """A group's name by the databases, or its number."""
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def has_group(name: str) -> bool:
    """Whether the databases list a group of that name, or that decimal number."""
    gid = gid_of(name)
    return gid is not None and (name != str(gid) or group_name(gid) != name)


def groups_of(uid: int) -> tuple[int, frozenset[int]]:
    """The primary gid and all gids of a user by the databases; a uid without a user has its own number as group."""
    try:
        user = pwd.getpwuid(uid)
    except KeyError:
        return uid, frozenset({uid})
    return user.pw_gid, frozenset(os.getgrouplist(user.pw_name, user.pw_gid))


class Listed:
    """What the databases list of users and groups, each read when it is first asked for: once for all of a policy."""

    @cached_property
    def _users(self) -> list[pwd.struct_passwd]:
        return pwd.getpwall()

    @cached_property
    def _uids(self) -> dict[str, int]:
        return {user.pw_name: user.pw_uid for user in reversed(self._users)}  # of a name in two lines the first counts

    @cached_property
    def _by_gid(self) -> dict[int, set[int]]:
        found: dict[int, set[int]] = {}
        for user in self._users:
            found.setdefault(user.pw_gid, set()).add(user.pw_uid)
        return found

    @cached_property
    def _groups(self) -> list[str]:
        return [group.gr_name for group in grp.getgrall()]

    def names(self, kind: str) -> Collection[str]:
        """All names of a "user" or "group", for a suggestion."""
        return self._uids if kind == "user" else self._groups

    def uid_of(self, name: str) -> int | None:
        """As `uid_of` of this module, and quick for a user that is listed: else each time all lines are read."""
        number = _number(name)
        if number is None:
            number = self._uids.get(name)
        return uid_of(name) if number is None else number

    def members_of(self, gid: int) -> frozenset[int]:
        """The uids of a group's members: those it lists and those whose primary group it is."""
        members = set(self._by_gid.get(gid, ()))
        with contextlib.suppress(KeyError):
            members.update(uid for name in grp.getgrgid(gid).gr_mem if (uid := self.uid_of(name)) is not None)
        return frozenset(members)

    def subordinate_uids(self) -> list[tuple[int | None, int, int]]:
        """The ranges of subuid(5): (the user's uid, or None for an unknown user, first uid, last uid).

        A line that newuidmap(1) would not use, either, is left out. What another NSS service knows cannot be listed.
        """
        try:
            with open(_SUBUID, "rb") as file:
                lines = file.read().decode(errors="replace").split("\n")
        except OSError:
            return []
        ranges = []
        for line in lines:
            name, *numbers = line.split(":")
            first, count = (_number(text) for text in numbers) if len(numbers) == 2 else (None, None)
            if first is not None and count and first < INVALID_ID:
                ranges.append((self.uid_of(name), first, min(first + count, INVALID_ID) - 1))
        return ranges

    def owners(self) -> Owners:
        """The owner of every uid, by passwd(5) and subuid(5) as they are now."""
        return make_owners((user.pw_uid for user in self._users), self.subordinate_uids())


def databases() -> tuple[tuple[int, int, int], ...]:
    """What tells that passwd(5), group(5) or subuid(5) is another file than before."""
    found = []
    for path in _DATABASES:
        try:
            status = os.stat(path)
        except OSError:
            found.append((0, 0, 0))
        else:
            found.append((status.st_ino, status.st_mtime_ns, status.st_size))
    return tuple(found)


def name_of(uid: int) -> str:
    """A user's name by the databases, or its number."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def people() -> frozenset[int]:
    """The accounts that the databases list for people: root, and those with a login shell from uid 1000 on."""
    return frozenset(
        user.pw_uid
        for user in pwd.getpwall()
        if user.pw_uid == 0 or (user.pw_uid >= 1000 and os.path.basename(user.pw_shell) not in ("nologin", "false"))
    )
