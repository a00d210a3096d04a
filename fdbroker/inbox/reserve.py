"""Room on the disk that is kept free by a file of nothing, so that what makes room never lacks it.

Runs in: inbox. An attacker controls none of it.
"""

from __future__ import annotations

import contextlib
import os

from fdbroker.limits import inbox as limits


class Reserve:
    """The file `path`, in a folder that is ours alone; `held` says whether all of it is there."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.held = False

    def take(self) -> None:
        """Hold it; where there is no room for all of it, hold nothing. Source: posix_fallocate(3)."""
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, limits.STORE_RESERVE_BYTES)
            finally:
                os.close(descriptor)
            self.held = True
        except OSError:
            self.give()

    def give(self) -> None:
        """Let others have the room."""
        self.held = False
        with contextlib.suppress(OSError):
            os.unlink(self._path)
