"""What a client hears that is not let in: one Varlink error, sent unread, whatever protocol the client speaks.

Runs in: opener, refuser. An attacker controls how often it is turned away.
"""

from __future__ import annotations

import contextlib
import json
import socket
from functools import lru_cache

from fdbroker.kernel import sockets
from fdbroker.refusals import PolicyBroken, QuotaExceeded


@lru_cache(maxsize=16)
def _refused(name: str, limit: str, maximum: int) -> bytes:
    """Encoded once: in a storm of connections each costs no more than it must."""
    parameters = {"limit": limit, "maximum": maximum} if limit else {}
    return (
        json.dumps({"error": f"io.fdbroker.Broker.{name}", "parameters": parameters}, separators=(",", ":")).encode()
        + b"\0"
    )


def say_refusal(sock: socket.socket, refusal: QuotaExceeded | PolicyBroken) -> None:
    """Tell a client that is not let in, as far as it listens; its protocol is not known yet, so in Varlink."""
    limit, maximum = (refusal.limit, refusal.maximum) if isinstance(refusal, QuotaExceeded) else ("", 0)
    with contextlib.suppress(OSError):
        sockets.send(sock, _refused(refusal.wire_name, limit, maximum))
