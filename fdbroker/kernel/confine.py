"""Give up, for good, every right that a process of the broker does not need.

Runs in: each child before it reads anything, launcher after start-up.
Source: capabilities(7), prctl(2), seccomp(2); docs/confinement.md says what each step is against.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
from typing import NamedTuple

import prctl

from fdbroker.kernel import capabilities, landlock, libc

# linux/prctl.h, linux/seccomp.h
_PR_CAPBSET_DROP = 24
_PR_SET_SECUREBITS = 28
_PR_SET_SECCOMP = 22
_SECCOMP_MODE_FILTER = 2
_INSTRUCTION_BYTES = 8  # struct sock_filter
# NOROOT, NO_SETUID_FIXUP, NO_CAP_AMBIENT_RAISE, each with its lock, and KEEP_CAPS locked off
_SECUREBITS = 0xEF


class Order(NamedTuple):
    """How a process of the broker is confined, and which of the descriptors that it inherits is what.

    `process` is its name in messages. `files` are Landlock rules (path, rights beneath it), None for no Landlock.
    `parent`: die when this process does, 0 for none.
    """

    process: str
    uid: int
    gid: int
    groups: list[int]
    capabilities: list[str]
    files: list[tuple[str, int]] | None
    descriptors: dict[str, int]
    descriptors_max: int
    parent: int


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def confine(to: Order, program: bytes) -> bool:
    """Confine this process, which must be root and single-threaded. Returns whether Landlock is in force.

    `program` is its seccomp filter. Raises OSError when any step fails, PermissionError when the result is not what was
    asked for, ProcessLookupError when the parent is gone: the caller must end then.
    """
    _empty_bounding_set()
    libc.prctl(_PR_SET_SECUREBITS, _SECUREBITS)  # python-prctl knows no ambient bit and refuses the number
    if sorted(os.getgroups()) != sorted(to.groups):
        os.setgroups(to.groups)
    if os.getuid() != to.uid:
        os.setresgid(to.gid, to.gid, to.gid)
        os.setresuid(to.uid, to.uid, to.uid)
    numbers = [capabilities.NUMBERS[name] for name in to.capabilities]
    prctl.cap_effective.limit()
    prctl.cap_inheritable.limit()
    prctl.cap_permitted.limit(*numbers)
    prctl.set_no_new_privs(1)
    prctl.set_dumpable(0)
    os.umask(0o077)
    _verify(to)
    if to.parent:
        die_with(to.parent)  # a change of uid would have cleared it
    restricted = to.files is not None and landlock.restrict(to.files)
    _load_filter(program)
    return restricted


def die_with(parent: int) -> None:
    """Be killed when process `parent`, which must be ours, ends. Raises ProcessLookupError when it has."""
    prctl.set_pdeathsig(signal.SIGKILL)
    if os.getppid() != parent:
        raise ProcessLookupError(errno.ESRCH, "the parent is gone")


def _empty_bounding_set() -> None:
    prctl.capbset.limit()
    for number in range(64):  # those that are newer than python-prctl; the first unknown one ends it
        try:
            libc.prctl(_PR_CAPBSET_DROP, number)
        except OSError as error:
            if error.errno == errno.EINVAL:
                return
            raise


def _verify(to: Order) -> None:
    """Read back from the kernel what is in force: a step that silently did nothing must not go unnoticed."""
    # in bytes: no codec has to be loaded, which may not be readable any more
    with open("/proc/self/status", "rb") as status:
        lines = [line.rstrip(b"\n").partition(b":\t") for line in status]
    fields = {name.decode(): value.decode() for name, _, value in lines}
    permitted = f"{capabilities.mask(to.capabilities):016x}"
    none = f"{0:016x}"
    expected = {
        "Uid": "\t".join([str(to.uid)] * 4),
        "Gid": "\t".join([str(to.gid)] * 4),
        "CapInh": none,
        "CapPrm": permitted,
        "CapEff": none,
        "CapBnd": none,
        "CapAmb": none,
        "NoNewPrivs": "1",
    }
    for name, value in expected.items():
        if fields.get(name) != value:
            raise PermissionError(errno.EPERM, f"not confined: {name} is {fields.get(name)!r}, must be {value!r}")
    if sorted(os.getgroups()) != sorted(to.groups):
        raise PermissionError(errno.EPERM, f"not confined: groups are {os.getgroups()}, must be {to.groups}")


def _load_filter(program: bytes) -> None:
    buffer = ctypes.create_string_buffer(program, len(program))
    header = _Program(len(program) // _INSTRUCTION_BYTES, ctypes.addressof(buffer))
    libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(header))
