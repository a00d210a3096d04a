"""While no policy can be used: a child that refuses everybody, and asks before it does whether that is still so.

Runs in: launcher, as root, which has started nothing else yet. It reads two fixed words of its child, and no client.
"""

from __future__ import annotations

import select
import socket
from types import TracebackType
from typing import Self

from fdbroker.errors import FdbrokerError
from fdbroker.kernel import lifeline
from fdbroker.launcher import start
from fdbroker.limits import launcher as limits
from fdbroker.wire.launcher import REFUSER_TO_LAUNCHER, STILL_BROKEN, Look


class RefuserFailed(FdbrokerError):
    """The child that refuses everybody has ended by itself."""


class Refuser:
    """The child, which lives as long as the `with` block; it borrows the listening socket."""

    def __init__(self, listener: socket.socket) -> None:
        self._child = start.start_refuser(listener)

    def wait(self, wake: int) -> bool:
        """Until the child says something, or `wake` is readable; false when nobody has come for BROKEN_SECONDS."""
        poll = select.poll()
        poll.register(self._child.link.fileno(), select.POLLIN)
        poll.register(wake, select.POLLIN)
        return bool(poll.poll(limits.BROKEN_SECONDS * 1000))

    def is_asked(self) -> bool:
        """Whether somebody waits, and the child asks if it is to refuse. Raises RefuserFailed."""
        data = self._child.link.receive()
        if data == b"":
            process = self._child.process
            how = lifeline.how_ended(process.pid, process.wait())
            raise RefuserFailed(f"the process that refuses everybody {how}")
        return data is not None and isinstance(REFUSER_TO_LAUNCHER.decode(data), Look)

    def go_on(self) -> None:
        """Nothing is mended: refuse who waits."""
        self._child.tell(STILL_BROKEN)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        start.end(self._child)
