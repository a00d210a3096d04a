"""The journal's socket, to which opener, keeper and inbox write; connected again when the journal has a new one.

Runs in: launcher. It writes nothing to it: the children, which may not connect, share this very socket.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import time

from fdbroker.limits import launcher as limits

_ADDRESS = "/run/systemd/journal/socket"
_BYTES = 8 * 1024 * 1024  # SO_SNDBUF, as sd_journal_send(3) sets it
_WAIT_S = 0.1
_NULL = os.makedev(1, 3)  # /dev/null


class Journal:
    """Owns `sock`, a datagram socket that is connected to the journal, or None where there is no journal."""

    def __init__(self, address: str = _ADDRESS) -> None:
        self._address = address
        self.sock: socket.socket | None = None

    def connect(self) -> bool:
        """Connect to the journal; returns whether there is one."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            sock.connect(self._address)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BYTES)
        except OSError:
            sock.close()
            return False
        self.sock = sock
        return True

    def await_place(self) -> bool:
        """Have a place for records: the journal, or standard error; false without any.

        systemd, when its journal is not there, gives /dev/null as standard error: then wait for the journal. Who starts
        the service by hand and sends its standard error there wants no records.
        """
        end_s = time.monotonic() + limits.START_SECONDS
        while not self.connect():
            said_to = os.fstat(2)
            nowhere = stat.S_ISCHR(said_to.st_mode) and said_to.st_rdev == _NULL
            if not nowhere or "INVOCATION_ID" not in os.environ:  # systemd.exec(5)
                return True
            if time.monotonic() > end_s:
                return False
            time.sleep(_WAIT_S)
        return True

    def look(self) -> None:
        """Connect again: a journal whose socket was closed and made anew is reached by nobody who was connected.

        For whom it is still the same, nothing changes. Source: unix_dgram_connect() in net/unix/af_unix.c; the children
        have the same open file description, so this holds for them.
        """
        if self.sock is not None:
            with contextlib.suppress(OSError):  # there is none now: what is to be recorded is refused
                self.sock.connect(self._address)

    def close(self) -> None:
        """Write nothing more."""
        if self.sock is not None:
            self.sock.close()
            self.sock = None
