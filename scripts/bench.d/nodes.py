"""The nodes and the policies of scripts/bench: a /dev of its own, in a mount namespace of its own.

In /dev/bench stand NODES nodes with harmless numbers, more than any memory of the service holds: so a client that asks
for one after the other asks, each time, for something that the service does not remember.
"""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from processes import Failed

NODES = 8192  # client.c is compiled with it
# nodes of one driver, drivers/char/mem.c, whose opening does not sleep: the names in client.c, in the same order
_KINDS = {"null": 3, "zero": 5, "full": 7, "random": 8, "urandom": 9}
_MEM_MAJOR = 1
_FOLDER = Path("/dev/bench")
FEW = 16  # nodes beside many rules
_CLONE_NEWNS, _MS_REC, _MS_PRIVATE = 0x20000, 0x4000, 1 << 18  # sched.h, sys/mount.h

_LIMITS = "requests_per_second: 1000000, burst: 1000000, records_per_second: 1000000, record_burst: 1000000"
NULL = '{path: /dev/null, access: rw, class: mem, device: "1:3"}'


def policy(rules: Iterable[str] = (), denied: Iterable[str] = (), more: str = "", limits: str = "") -> str:
    """A policy that lets everyone open what these rules of devices name, and nobody what the globs `denied` name."""
    text = f"version: 1\nlimits: {{connections: 20000, {limits}{_LIMITS}}}\n{more}"
    if devices := "".join(f"    - {rule}\n" for rule in rules):
        text += f"everyone:\n  devices:\n{devices}"
    if refused := "".join(f'  - {{everyone: true, devices: ["{glob}"]}}\n' for glob in denied):
        text += f"deny:\n{refused}"
    return text


def many() -> list[str]:
    """Rules for all nodes of /dev/bench."""
    return [
        f'{{path: "{_FOLDER}/{kind}-*", access: rw, class: mem, device: "{_MEM_MAJOR}:{minor}"}}'
        for kind, minor in _KINDS.items()
    ]


def others(count: int) -> tuple[list[str], list[str]]:
    """So many rules for what nobody asks for, and as many deny rules, all for names in a folder that has FEW nodes.

    When a policy is loaded each glob is compared with all names of its folder, so it matters how many there are.
    """
    globs = [f"{_FOLDER}{FEW}/other{number:04}-*" for number in range(count)]
    rules = [f'{{path: "{glob}", access: rw, class: mem, device: "{_MEM_MAJOR}:3"}}' for glob in globs]
    return rules, [glob.replace("other", "secret") for glob in globs]


def listed(count: int) -> str:
    """A rule for `count` nodes; makes them where they are not there."""
    folder = Path(f"/dev/bench{count}")
    if not folder.exists():
        folder.mkdir(mode=0o755)
        for number in range(count):
            _node(folder / f"null-{number:05}", _KINDS["null"])
    return f'{{path: "{folder}/*", access: rw, class: mem, device: "{_MEM_MAJOR}:3"}}'


def _node(path: Path, minor: int) -> None:
    os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(_MEM_MAJOR, minor))
    path.chmod(0o666)


def own_dev() -> None:
    """From now on this process and its children have a /dev that goes with the last of them. Raises Failed."""
    libc = ctypes.CDLL(None, use_errno=True)

    def check(result: int) -> None:
        if result != 0:
            raise Failed(f"no /dev of its own: {os.strerror(ctypes.get_errno())}")

    check(libc.unshare(_CLONE_NEWNS))
    check(libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None))
    check(libc.mount(b"dev", b"/dev", b"tmpfs", 0, b"mode=0755"))
    for kind, minor in _KINDS.items():
        _node(Path("/dev") / kind, minor)
    Path("/dev/fd").symlink_to("/proc/self/fd")
    Path("/dev/shm").mkdir()
    Path("/dev/shm").chmod(0o1777)
    listed(FEW)
    _FOLDER.mkdir(mode=0o755)
    kinds = list(_KINDS.items())
    for number in range(NODES):
        kind, minor = kinds[number % len(kinds)]
        _node(_FOLDER / f"{kind}-{number:05}", minor)
