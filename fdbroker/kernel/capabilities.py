"""Capabilities of the calling thread, effective only inside a `with` block.

Runs in: opener, namespaces worker, launcher. Source: capabilities(7), capset(2), linux/capability.h.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from types import TracebackType

from fdbroker.kernel import libc

# linux/capability.h; those that a process of ours can need
NUMBERS = {
    "CAP_DAC_OVERRIDE": 1,
    "CAP_DAC_READ_SEARCH": 2,
    "CAP_NET_BIND_SERVICE": 10,
    "CAP_NET_ADMIN": 12,
    "CAP_SYS_CHROOT": 18,
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_ADMIN": 21,
}

_VERSION_3 = 0x20080522


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Data(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


_HEADER = _Header(_VERSION_3, 0)
_HEADER_REF = ctypes.addressof(_HEADER)


def mask(names: Iterable[str]) -> int:
    """The bits of these capabilities."""
    return sum(1 << NUMBERS[name] for name in names)


class Bracket:
    """`with bracket:` makes its capabilities effective, and leaving it, however, makes none effective.

    They must be permitted to the thread; permitted to it from then on are `permitted_names`, or just the same ones.
    The two states are prepared once, so that entering and leaving is one system call each. If dropping fails,
    CapabilityStuck must end the process: it must not go on with them raised.
    """

    __slots__ = ("_lowered", "_needed", "_raised")

    def __init__(self, names: frozenset[str], permitted_names: frozenset[str] | None = None) -> None:
        effective = mask(names)
        permitted = effective if permitted_names is None else mask(permitted_names)
        self._needed = bool(effective)
        self._raised = (_Data * 2)(_Data(effective, permitted, 0), _Data(0, 0, 0))
        self._lowered = (_Data * 2)(_Data(0, permitted, 0), _Data(0, 0, 0))

    def __enter__(self) -> None:
        if self._needed and libc.CAPSET(_HEADER_REF, ctypes.addressof(self._raised)) != 0:
            libc.fail("capset")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._needed and libc.CAPSET(_HEADER_REF, ctypes.addressof(self._lowered)) != 0:
            raise CapabilityStuck(ctypes.get_errno(), "capset: the raised capability could not be dropped")


class CapabilityStuck(BaseException):
    """The process holds a raised capability and cannot drop it. No handler of ordinary errors may go on after this."""
