"""Imports pyseccomp without the programs that it runs to find its libraries: ldconfig, or else the compiler.

Runs in: launcher, as root, before anything is confined. No attacker controls anything here.
"""

from __future__ import annotations

import ctypes.util


def _soname(name: str) -> str | None:
    """Of libseccomp, which is the same everywhere; None, for the C library, is what the process has loaded already."""
    return "libseccomp.so.2" if name == "seccomp" else None


_search = ctypes.util.find_library
ctypes.util.find_library = _soname
try:
    import pyseccomp
finally:
    ctypes.util.find_library = _search

__all__ = ["pyseccomp"]
