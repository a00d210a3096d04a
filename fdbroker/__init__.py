"""fdbroker hands open descriptors to programs that may not open them: the entry points of the client library.

Runs in: any program. The broker's own processes import this file too, so it imports nothing by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fdbroker.client.sync import Client

__version__ = "0.1.0"
__all__ = ["__version__", "connect"]


def connect(address: str | None = None, *, timeout_s: float | None = 30.0) -> Client:
    """Connect to the broker and return a blocking client, which the caller owns and closes.

    `address` is the path of the broker's socket; without it `$FDBROKER_SOCKET`, else /run/fdbroker/socket.
    `timeout_s` bounds each call; None waits for ever.
    Raises BrokerUnavailable when nobody answers at that address.
    """
    from fdbroker.client.sync import Client  # noqa: PLC0415 -- the broker's processes must not load the client

    return Client.connect(address, timeout_s=timeout_s)
