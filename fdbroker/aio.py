"""The asyncio client's entry point: `await fdbroker.aio.connect()`.

Runs in: any program.
"""

from __future__ import annotations

from fdbroker.client.aio import Client

__all__ = ["Client", "connect"]


async def connect(address: str | None = None) -> Client:
    """Connect to the broker and return an asyncio client, which the caller owns and closes.

    `address` is the path of the broker's socket; without it `$FDBROKER_SOCKET`, else /run/fdbroker/socket. Time
    limits are asyncio's: `async with asyncio.timeout(…)`.
    Raises BrokerUnavailable when nobody answers at that address.
    """
    return await Client.connect(address)
