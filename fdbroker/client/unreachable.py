"""Why connect(2) to the broker's socket failed, and what to do next.

Runs in: any program, once its connect(2) has failed. Only root can make the socket file, its mode and its ACL; nothing
is decided by them here.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import stat
import struct
from collections.abc import Iterable
from typing import NamedTuple

from fdbroker.client.calls import DEFAULT_ADDRESS
from fdbroker.terms import UNMAPPED_ID

DEFAULT_GROUP = "fdbroker"  # the socket's, where there is one: `fdbroker serve --help`
_UNIT = "fdbroker.socket"
# linux/posix_acl_xattr.h: a version, then entries of a tag, permissions and an id, all little-endian
_ACL_NAME = "system.posix_acl_access"
_ACL_HEADER, _ACL_ENTRY = struct.Struct("<I"), struct.Struct("<HHI")
_TAG_USER, _TAG_GROUP_OBJ, _TAG_GROUP, _TAG_MASK = 0x02, 0x04, 0x08, 0x10
_WRITE = 2  # what connect(2) asks for: unix(7)


def why(path: str, error: OSError) -> str:
    """One sentence or two: why nobody is reached at `path`, as far as this program can see, and the cure."""
    installed = path == DEFAULT_ADDRESS
    match error.errno:
        case errno.EACCES | errno.ECONNREFUSED if not _is_socket(path):
            return f"{path} is no socket: give another one with --socket or $FDBROKER_SOCKET"
        case errno.EACCES:
            return f"you may not connect to {path}: {_why_not_let_in(path)}"
        case errno.ENOENT if os.path.islink(path):
            return f"{path} is a symlink that leads to nothing"
        case errno.ENOENT if installed:
            start = f"an admin starts the service with `systemctl enable --now {_UNIT}`"
            return f"there is no socket at {path}: {start}; for another broker give --socket or $FDBROKER_SOCKET"
        case errno.ENOENT:
            start = f"`fdbroker serve --socket {path}` makes it"
            return f"there is no socket at {path}: {start}; the installed service has {DEFAULT_ADDRESS}"
        case errno.ECONNREFUSED if installed:
            return f"nobody listens at {path} any more: an admin starts it with `systemctl restart {_UNIT}`"
        case errno.ECONNREFUSED:
            return f"nobody listens at {path} any more: start the broker again that made it"
        case errno.EAGAIN:
            return f"too many clients wait to be let in at {path}: try again; `systemctl status fdbroker` says more"
    return f"nobody answers at {path}: {error.strerror or error}"


def cure_for_root_alone(group: str = DEFAULT_GROUP) -> str:
    """What an admin does about a socket of the group root, of which nobody else is to be a member."""
    if _group_exists(group):
        return f"it is root's alone: an admin starts the broker with `--group {group}`"
    made = f"`groupadd --system {group}`, and starts the broker again"
    return f"it is root's alone: an admin makes the group {group}, {made}, or starts it with `--group GROUP`"


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:  # it was one, and has gone meanwhile
        return True


class _Writers(NamedTuple):
    """The right to write to a file by its mode and its ACL; `groups` has the owning group as well."""

    owner: bool
    users: dict[int, bool]
    groups: dict[int, bool]
    others: bool


def _writers(path: str, status: os.stat_result) -> _Writers:
    """Source: acl(5), "Access check algorithm"."""
    users: dict[int, bool] = {}
    groups = {status.st_gid: bool(status.st_mode >> 3 & _WRITE)}
    try:
        acl = os.getxattr(path, _ACL_NAME)
    except OSError:  # it has none
        acl = b""
    entries = list(_ACL_ENTRY.iter_unpack(acl[_ACL_HEADER.size :]))
    mask = next((bits for tag, bits, _ in entries if tag == _TAG_MASK), _WRITE)
    for tag, bits, number in entries:
        may = bool(bits & mask & _WRITE)
        if tag == _TAG_USER:
            users[number] = may
        elif tag == _TAG_GROUP_OBJ:  # the mode of a file with an ACL shows the mask instead
            groups[status.st_gid] = may
        elif tag == _TAG_GROUP:
            groups[number] = may or groups.get(number, False)
    return _Writers(bool(status.st_mode >> 6 & _WRITE), users, groups, bool(status.st_mode & _WRITE))


def _why_not_let_in(path: str) -> str:
    try:
        status = os.stat(path)
    except PermissionError:
        return _why_not_entered(path)
    except OSError as error:
        return f"it has changed meanwhile ({error.strerror}): try again"
    mode, uid = f"{stat.S_IMODE(status.st_mode):04o}", os.geteuid()
    mine = {os.getegid(), *os.getgroups()}
    may = _writers(path, status)
    if uid == status.st_uid:
        if not may.owner:
            return f"the socket is yours, and its mode {mode} does not let its owner write"
    elif uid in may.users:
        if not may.users[uid]:
            return f"its ACL has an entry for user {_user(uid)} that does not let you write"
    elif mine.isdisjoint(may.groups):
        if not may.others:
            return _for_others(mode, may, mine)
    elif not any(may.groups.get(gid) for gid in mine):
        names = _groups(mine.intersection(may.groups))
        return f"its mode {mode} and its ACL do not let {names} write, which this session has"
    return f"its mode {mode} lets you, so a security module such as AppArmor or SELinux does not: see `journalctl -k`"


def _why_not_entered(path: str) -> str:
    folder = os.path.dirname(os.path.realpath(path))
    while folder != "/" and not os.access(os.path.dirname(folder), os.X_OK, effective_ids=True):
        folder = os.path.dirname(folder)
    return f"you may not enter {folder}, which an admin must allow: `chmod a+x {folder}`"


def _for_others(mode: str, may: _Writers, mine: set[int]) -> str:
    """The socket is for users and groups that this program is not of; `mine` are its groups."""
    gids = [gid for gid, write in may.groups.items() if write]
    users = [_user(uid) for uid, write in may.users.items() if write]
    if not gids:
        whom = f"is for {' and '.join(users)}, and for no group" if users else f"has the mode {mode}, for no group"
        return f"the socket {whom}: an admin gives it a group (SocketGroup= of {_UNIT}, or fdbroker serve --group)"
    whom = " and ".join([_groups(gids), *(f"user {name}" for name in users)])
    return f"the socket is for {whom}; {_how_to_join(gids)} (this session's groups: {_names(mine)})"


def _how_to_join(gids: list[int]) -> str:
    """What gets a user into one of these groups, which this session lacks."""
    named = {gid: name for gid in gids if (name := _group_name(gid))}
    if UNMAPPED_ID in gids:
        return "this user namespace does not map that group: run this program outside of the namespace"
    if not named:
        return "the group database has no such number: an admin gives the socket another group"
    try:
        user = pwd.getpwuid(os.geteuid())
    except KeyError:
        name = next((name for gid, name in named.items() if gid), "")
        if not name:
            return cure_for_root_alone()
        return f"uid {os.geteuid()} is no user of the database: start this program with the group {name}"
    listed = named.keys() & os.getgrouplist(user.pw_name, user.pw_gid)
    if listed:
        name = named[min(listed)]
        return f"{user.pw_name} is a member of {name}, but this session is not: log in again, or run `newgrp {name}`"
    named.pop(0, None)
    if not named:
        return cure_for_root_alone()
    name = next(iter(named.values()))
    return f"{user.pw_name} is no member: an admin runs `sudo usermod -aG {name} {user.pw_name}`, then log in again"


def _group_exists(name: str) -> bool:
    try:
        return bool(grp.getgrnam(name))
    except KeyError:
        return False


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return ""


def _names(gids: Iterable[int]) -> str:
    return ", ".join(_group_name(gid) or str(gid) for gid in sorted(gids))


def _groups(gids: Iterable[int]) -> str:
    text = _names(gids)
    return f"the groups {text}" if "," in text else f"group {text}"


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
