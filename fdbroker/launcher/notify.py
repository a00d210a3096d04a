"""sd_notify(3): tell the service manager how we are.

Runs in: launcher. Source: sd_notify(3), the protocol.
"""

from __future__ import annotations

import contextlib
import os
import socket


class Notify:
    """Holds a socket to the manager; without one, or when the manager is gone, telling does nothing.

    Connected at once: once the launcher is confined it may reach no abstract address any more.
    """

    def __init__(self) -> None:
        address = os.environ.pop("NOTIFY_SOCKET", "")
        self._sock: socket.socket | None = None
        if address:
            self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            with contextlib.suppress(OSError):
                self._sock.connect("\0" + address[1:] if address.startswith("@") else address)
        # half the time the manager waits for a sign of life, in seconds; 0 for no watchdog: sd_watchdog_enabled(3)
        usec = os.environ.pop("WATCHDOG_USEC", "0")
        pid = os.environ.pop("WATCHDOG_PID", str(os.getpid()))
        known = usec.isascii() and usec.isdecimal() and len(usec) < 16 and pid == str(os.getpid())
        self.watchdog_s = int(usec) / 2_000_000 if known else 0.0

    def tell(self, **state: str | int) -> None:
        """Send VARIABLE=value lines, e.g. `tell(READY=1, STATUS="…")`."""
        if self._sock is not None:
            text = "\n".join(f"{name}={value}" for name, value in state.items())
            with contextlib.suppress(OSError):
                self._sock.send(text.encode(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def close(self) -> None:
        """Tell nothing more."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None
