"""Looks at this machine with the rights of the command's user: nodes, namespaces, and rights to connect.

Runs in: an admin's or a user's shell. Nothing is opened; root alone makes names in the folders that are read.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
from collections import deque
from collections.abc import Collection

from fdbroker import connect as broker
from fdbroker.client.calls import About
from fdbroker.client.calls import address as broker_address
from fdbroker.client.unreachable import DEFAULT_GROUP, cure_for_root_alone
from fdbroker.errors import FdbrokerError
from fdbroker.kernel.devices import nodes_matching
from fdbroker.kernel.sockets import peer_label
from fdbroker.policy import names
from fdbroker.policy.fit import Facts
from fdbroker.policy.lint import Look, Machine

_NETNS = "/run/netns"  # ip-netns(8)
_INTERFACES = "/sys/class/net"
_GROUP = DEFAULT_GROUP
_ANSWER_S = 3.0  # for a broker that is idle a thousand times what it needs
_LINKS = 40  # as many as the kernel follows: path_resolution(7)
_WRITE, _SEARCH = 2, 1  # connect(2) asks for no more than to write
# linux/posix_acl_xattr.h and posix_acl.h: a version, then (tag, permissions, id) each
_ACL = "system.posix_acl_access"
_ACL_HEAD, _ACL_ENTRY = struct.Struct("<I"), struct.Struct("<HHI")
_USER, _GROUP_OBJ, _GROUP_TAG, _MASK = 0x02, 0x04, 0x08, 0x10


def machine() -> Machine:
    """This machine."""
    return Machine(paths, look, namespaces, connect, bridge)


def in_service() -> About | None:
    """Which policy the broker uses; None when none answers us."""
    try:
        with broker(timeout_s=_ANSWER_S) as client:
            return client.about()
    except (FdbrokerError, OSError):
        return None


def paths(pattern: str) -> list[str]:
    """The paths that a glob below /dev matches now."""
    return sorted(path for path in nodes_matching(pattern, set()) if os.path.lexists(path))


def beside(path: str) -> list[str]:
    """The paths that are there now as deep below /dev as this one is, but for folders and links to nothing."""
    every = paths("/dev" + "/*" * (path.count("/") - 1))
    return [one for one in every if os.path.exists(one) and not os.path.isdir(one)]


def namespaces() -> list[str]:
    """The network namespaces that have names."""
    try:
        return sorted(os.listdir(_NETNS))
    except OSError:
        return []


def bridge(name: str) -> bool | None:
    """Whether this network namespace has a bridge of that name; None without /sys. Source: linux/if_bridge.h, sysfs."""
    return os.path.isdir(f"{_INTERFACES}/{name}/bridge") if os.path.isdir(_INTERFACES) else None


def look(path: str) -> Look | None:
    """The node that a path below /dev leads to. As in the opener, symlinks must be root's and stay below /dev.

    None when this program has no right to see the node.
    """
    seen = [path]
    try:
        at = _follow(path, seen)
        status = os.stat(at, follow_symlinks=False)
    except _Astray as error:
        return Look(tuple(seen), None, str(error))
    except OSError as error:
        return Look(tuple(seen), None) if error.errno in (errno.ENOENT, errno.ENOTDIR) else None
    number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    return Look(tuple(seen), Facts(at, stat.S_IFMT(status.st_mode), number, *_device(status.st_mode, number)))


class _Astray(Exception):
    """The opener would not follow the path."""


def _follow(path: str, seen: list[str]) -> str:
    """The path without symlinks; the target of each symlink is added to `seen`. Raises OSError and _Astray."""
    parts = deque(path.split("/")[2:])
    at, links = "/dev", 0
    while parts:
        part = parts.popleft()
        if part in ("", "."):
            continue
        if part == "..":
            if at == "/dev":
                raise _Astray("a link leads out of /dev")
            at = os.path.dirname(at)
            continue
        status = os.lstat(f"{at}/{part}")
        if not stat.S_ISLNK(status.st_mode):
            at = f"{at}/{part}"
            continue
        links += 1
        if links > _LINKS:
            raise _Astray("too many links")
        if status.st_uid != 0:
            raise _Astray(f"the link {part} does not belong to root")
        target = os.readlink(f"{at}/{part}")
        if target.startswith("/"):
            if not target.startswith("/dev/"):
                raise _Astray("a link leads out of /dev")
            at, target = "/dev", target.removeprefix("/dev/")
        parts.extendleft(reversed(target.split("/")))
        seen.append(os.path.normpath("/".join([at, *parts])))
    return at


def _device(mode: int, number: str) -> tuple[str, str]:
    """Class and name of the device with that number, "" where there is none. Source: sysfs(5), /sys/dev."""
    place = f"/sys/dev/{'block' if stat.S_ISBLK(mode) else 'char'}/{number}"
    try:
        return os.readlink(f"{place}/subsystem").rpartition("/")[2], os.readlink(place).rpartition("/")[2]
    except OSError:
        return "", ""


def connect(uid: int, gids: Collection[int]) -> str | None:
    """Why a user cannot connect to the service here, "" if it can, None if that cannot be told.

    Without a socket, by the group that it will have.
    """
    address = broker_address(None, os.environ)
    name = names.name_of(uid)
    try:
        for folder in _folders_above(address):
            if not _may(folder, uid, gids, _SEARCH):
                return f"it may not enter {folder}"
        if _may(address, uid, gids, _WRITE):
            return ""
        of_root = os.stat(address).st_gid == 0
        group, there = names.group_name(os.stat(address).st_gid), f"{address} is"
    except FileNotFoundError:
        gid = names.gid_of(_GROUP)
        if gid is None:
            return None
        if uid == 0 or gid in gids:
            return ""
        of_root = gid == 0
        group, there = _GROUP, f"{address} is not there now, and will be"
    except OSError:
        return None
    if of_root:  # who is a member of root's group may do more than connect
        return f"{there} for the group {group}: {cure_for_root_alone(_GROUP)}"
    if name.isdecimal():  # no account, so usermod(8) cannot help
        return f"{there} for the group {group}: an ACL entry lets it in, `setfacl -m u:{uid}:rw {address}`"
    return f"{there} for the group {group}: `usermod -aG {group} {name}`, and log in again"


def _folders_above(path: str) -> list[str]:
    folder = os.path.dirname(os.path.abspath(path))
    found = [folder]
    while folder != "/":
        folder = os.path.dirname(folder)
        found.append(folder)
    return found


def _may(path: str, uid: int, gids: Collection[int], wanted: int) -> bool:
    """Whether the permission bits, and the ACL, give a user all of `wanted`. Source: acl(5), access check."""
    if uid == 0:
        return True
    status = os.stat(path)
    mode = stat.S_IMODE(status.st_mode)
    try:
        acl = list(_ACL_ENTRY.iter_unpack(os.getxattr(path, _ACL)[_ACL_HEAD.size :]))
    except OSError:
        acl = [(_GROUP_OBJ, mode >> 3 & 7, 0)]
    mask = next((allowed for tag, allowed, _ in acl if tag == _MASK), 7)
    users = [allowed for tag, allowed, number in acl if tag == _USER and number == uid]
    groups = [
        allowed
        for tag, allowed, number in acl
        if (tag == _GROUP_OBJ and status.st_gid in gids) or (tag == _GROUP_TAG and number in gids)
    ]
    if uid == status.st_uid:
        given = [mode >> 6]
    elif users or groups:
        given = [allowed & mask for allowed in users or groups]
    else:
        given = [mode]
    return any(allowed & wanted == wanted for allowed in given)


def own_label() -> str:
    """This program's MAC label as others see it on a connection, or ""."""
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind("")  # a free abstract address: unix(7), "Autobind feature"
        listener.listen(1)
        client.connect(listener.getsockname())
        accepted, _ = listener.accept()
        with accepted:
            return peer_label(accepted)
