"""sd_notify(3): tell the service manager how we are.

Runs in: launcher. Source: sd_notify(3), the protocol.
"""

from __future__ import annotations

import contextlib
import os
import socket


class Notify:
    """Keeps the manager's address; without one, or when the manager is gone, telling does nothing."""

    def __init__(self) -> None:
        address = os.environ.pop("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        # half the time the manager waits for a sign of life, in seconds; 0 for no watchdog: sd_watchdog_enabled(3)
        usec = os.environ.pop("WATCHDOG_USEC", "0")
        pid = os.environ.pop("WATCHDOG_PID", str(os.getpid()))
        self.watchdog_s = int(usec) / 2_000_000 if usec.isdecimal() and pid == str(os.getpid()) else 0.0

    def tell(self, **state: str | int) -> None:
        """Send VARIABLE=value lines, e.g. `tell(READY=1, STATUS="…")`."""
        if not self._address:
            return
        text = "\n".join(f"{name}={value}" for name, value in state.items())
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(text.encode(), self._address)
