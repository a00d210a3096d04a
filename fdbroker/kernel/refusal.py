"""What a client hears that is not let in: one Varlink error, sent unread, whatever protocol the client speaks.

Runs in: opener, refuser. An attacker controls how often it is turned away.
"""

from __future__ import annotations

import contextlib
import json
import socket
from functools import lru_cache

from fdbroker.kernel import sockets
from fdbroker.refusals import Refused


@lru_cache(maxsize=16)
def _refused(name: str, *parameters: tuple[str, str | int]) -> bytes:
    """Encoded once: in a storm of connections each costs no more than it must."""
    error = {"error": f"io.fdbroker.Broker.{name}", "parameters": dict(parameters)}
    return json.dumps(error, separators=(",", ":")).encode() + b"\0"


def say_refusal(sock: socket.socket, refusal: Refused) -> None:
    """Tell a client that is not let in, as far as it listens; its protocol is not known yet, so in Varlink."""
    parameters = [(name, getattr(refusal, attribute)) for attribute, name, _ in refusal.said]
    with contextlib.suppress(OSError):
        sockets.send(sock, _refused(refusal.wire_name, *parameters))
