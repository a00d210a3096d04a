"""Stage send: the descriptors and the reply in one message, taken whole or not at all.

Runs in: opener. An attacker controls the paths in the reply and whether it reads.
"""

from __future__ import annotations

import errno
import json
import socket
from collections.abc import Sequence
from functools import lru_cache

from fdbroker.kernel import sockets
from fdbroker.limits import opener as limits
from fdbroker.refusals import ClientNotReading, QuotaExceeded, RateLimited
from fdbroker.terms import Grant, Resource
from fdbroker.wire.resources import to_json

_REPLY_BYTES = limits.REPLY_WITH_DESCRIPTORS_BYTES
_BUSY_MS = limits.BUSY_RETRY_MS
_DESCRIBED = 256  # of so many grants we keep the text
_encode = json.JSONEncoder(separators=(",", ":")).encode


def compose(grants: Sequence[Grant]) -> bytes:
    """The Varlink reply of Open; grant k owns descriptor k. Raises QuotaExceeded when it would not fit one message."""
    listed = [
        f'{{"fileDescriptor":{index},{_described(grant.resource, grant.rule.where, grant.rdev, grant.unusable)}'
        for index, grant in enumerate(grants)
    ]
    reply = f'{{"parameters":{{"grants":[{",".join(listed)}]}}}}\0'.encode()
    if len(reply) > _REPLY_BYTES:
        raise QuotaExceeded("reply_bytes", _REPLY_BYTES)
    return reply


@lru_cache(maxsize=_DESCRIBED)
def _described(resource: Resource, where: str, rdev: str, unusable: str | None) -> str:
    """All members of a Grant but its index, and the closing brace: encoding them takes longer than opening a node."""
    grant = {"resource": to_json(resource), "access": resource.access, "rule": where, "revocable": False}
    if rdev:
        grant["rdev"] = rdev
    elif unusable is not None:
        grant |= {"usable": False, "why": unusable} if unusable else {"usable": True}
    return _encode(grant)[1:]


def send_grants(sock: socket.socket, reply: bytes, descriptors: Sequence[int]) -> None:
    """Send; the descriptors stay the caller's, the client gets its own.

    Raises ClientNotReading when the socket has no room, RateLimited when too many of our descriptors are in flight to
    others, ConnectionError when the client is gone. The connection ends when only a part of the reply has left.
    """
    try:
        sent = sockets.send(sock, reply, descriptors)
    except BlockingIOError:
        raise ClientNotReading from None
    except OSError as error:
        if error.errno == errno.ETOOMANYREFS:
            raise RateLimited(_BUSY_MS, "in flight") from None
        raise
    if sent != len(reply):  # a machine with tiny buffers; the descriptors have left with the first part
        sockets.hang_up(sock)
