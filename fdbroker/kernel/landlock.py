"""landlock(7): which files a process may still open, for good.

Runs in: launcher, opener, inbox, each on itself.
LANDLOCK_ACCESS_FS_IOCTL_DEV is never handled: the missing right would travel with a passed descriptor, and the
client's ioctl would fail.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterable

from fdbroker.kernel import libc

# linux/landlock.h
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REMOVE_FILE, MAKE_REG = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 5, 1 << 8
TRUNCATE = 1 << 14  # its ABI is 3; before that nothing forbids it
_FS_BY_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1}
_FOR_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE  # the rights that a rule on something else than a folder takes
_NET_ALL, _NET_ABI = 0b11, 4  # bind and connect TCP
_SCOPE_ALL, _SCOPE_ABI = 0b11, 6  # abstract Unix sockets, signals
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_RULE_PATH_BENEATH = 1


class _Ruleset(ctypes.Structure):
    _fields_ = (("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    # Packed in the kernel: 12 bytes. Here 4 bytes follow, which the kernel does not read; `_pack_` alone is deprecated.
    _fields_ = (("allowed", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


def abi() -> int:
    """The kernel's Landlock version, 0 where there is none or it is not enabled."""
    version: int = libc.SYSCALL_LANDLOCK(_CREATE_RULESET, 0, 0, 1, 0)  # no attributes, flag VERSION
    if version < 0:
        if ctypes.get_errno() in (errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
            return 0
        libc.fail("landlock_create_ruleset")
    return version


def restrict(rules: Iterable[tuple[str, int]]) -> bool:
    """Forbid this process every file access but `rules`: (path, rights beneath it).

    A path that is gone, or that this process may not reach, is left out: without its rule nothing more can be opened.
    Returns False where the kernel has no Landlock. Needs no_new_privs.
    """
    version = abi()
    if not version:
        return False
    handled = _FS_BY_ABI[min(version, 3)]
    attributes = _Ruleset(handled, _NET_ALL if version >= _NET_ABI else 0, _SCOPE_ALL if version >= _SCOPE_ABI else 0)
    # older kernels take a longer structure only while its unknown end is zero, which it is then
    ruleset: int = libc.SYSCALL_LANDLOCK(
        _CREATE_RULESET, ctypes.addressof(attributes), ctypes.sizeof(attributes), None, 0
    )
    if ruleset < 0:
        libc.fail("landlock_create_ruleset")
    try:
        for path, rights in rules:
            _allow(ruleset, path, rights & handled)
        if libc.SYSCALL_LANDLOCK(_RESTRICT_SELF, ruleset, 0, None, 0) < 0:
            libc.fail("landlock_restrict_self")
    finally:
        os.close(ruleset)
    return True


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError):
        return
    try:
        if not os.path.isdir(f"/proc/self/fd/{parent}"):
            rights &= _FOR_FILES
        rule = _PathBeneath(rights, parent)
        if libc.SYSCALL_LANDLOCK(_ADD_RULE, ruleset, _RULE_PATH_BENEATH, ctypes.addressof(rule), 0) < 0:
            libc.fail(f"landlock_add_rule({path})")
    finally:
        os.close(parent)
