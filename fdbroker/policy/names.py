"""Names of users and groups to numbers, by the machine's databases (NSS).

Runs in: launcher, command line; never in the opener or the inbox, for NSS loads code and talks to services.
"""

from __future__ import annotations

import grp
import os
import pwd


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


def groups_of(uid: int) -> tuple[int, frozenset[int]]:
    """The primary gid and all gids of a user by the databases; a uid without a user has its own number as group."""
    try:
        user = pwd.getpwuid(uid)
    except KeyError:
        return uid, frozenset({uid})
    return user.pw_gid, frozenset(os.getgrouplist(user.pw_name, user.pw_gid))


def members_of(gid: int) -> frozenset[int]:
    """The uids of a group's members by the databases: those it lists and those whose primary group it is."""
    members = {user.pw_uid for user in pwd.getpwall() if user.pw_gid == gid}
    try:
        listed = grp.getgrgid(gid).gr_mem
    except KeyError:
        listed = []
    for name in listed:
        uid = uid_of(name)
        if uid is not None:
            members.add(uid)
    return frozenset(members)


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


def user_names() -> list[str]:
    """All users that the databases list, for a suggestion."""
    return [user.pw_name for user in pwd.getpwall()]


def group_names() -> list[str]:
    """All groups that the databases list, for a suggestion."""
    return [group.gr_name for group in grp.getgrall()]
