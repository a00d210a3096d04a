"""Those of the C library's functions that Python lacks and several processes need, with prototypes.

Runs in: every process of the broker. Nothing here decides anything.
"""

from __future__ import annotations

import ctypes
import os
from typing import NoReturn

LIBC = ctypes.CDLL(None, use_errno=True)

_long, _int, _uint, _ulong, _ptr = ctypes.c_long, ctypes.c_int, ctypes.c_uint, ctypes.c_ulong, ctypes.c_void_p

# One prototype for each variadic use, so that no argument is passed in the wrong width.
_PROTO = ctypes.CFUNCTYPE
SYSCALL_OPENAT2 = _PROTO(_long, _long, _long, ctypes.c_char_p, _ptr, ctypes.c_size_t, use_errno=True)(("syscall", LIBC))
SYSCALL_LANDLOCK = _PROTO(_long, _long, _long, _long, _ptr, _long, use_errno=True)(("syscall", LIBC))
GETSOCKOPT = _PROTO(_int, _int, _int, _int, _ptr, ctypes.POINTER(_uint), use_errno=True)(("getsockopt", LIBC))
CAPSET = _PROTO(_int, _ptr, _ptr, use_errno=True)(("capset", LIBC))
PRCTL = _PROTO(_int, _int, _ulong, _ulong, _ulong, _ulong, use_errno=True)(("prctl", LIBC))


def fail(call: str) -> NoReturn:
    """Raise the OSError of the call that just failed; `call` names it."""
    number = ctypes.get_errno()
    raise OSError(number, f"{call}: {os.strerror(number)}")


def prctl(option: int, value: int = 0, value2: int = 0) -> int:
    """One call of prctl with at most two numbers. Source: linux/prctl.h."""
    result: int = PRCTL(option, value, value2, 0, 0)
    if result < 0:
        fail(f"prctl({option})")
    return result
