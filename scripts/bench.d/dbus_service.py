"""A D-Bus service that opens /dev/null and returns the descriptor, and checks nothing: dbus_service.py SOCKET.

Written as close to the bus as dbus-fast lets one: no introspection, no type is looked up. Says "ready" once it has
its name, and serves until it is ended.
"""

import asyncio
import os
import sys
import time

from dbus_fast import Message, MessageType
from dbus_fast.aio import MessageBus

NAME = "io.fdbroker.Bench"
_WAIT_S = 20.0


async def main() -> None:
    """Serve."""
    address, deadline_s = sys.argv[1], time.monotonic() + _WAIT_S
    while True:
        bus = MessageBus(bus_address=f"unix:path={address}", negotiate_unix_fd=True)
        try:
            await bus.connect()
            break
        except OSError:  # the bus does not listen yet
            if time.monotonic() > deadline_s:
                raise
            await asyncio.sleep(0.01)

    def handle(message: Message) -> bool:
        if message.message_type is not MessageType.METHOD_CALL or message.member != "Open":
            return False
        descriptor = os.open(message.body[0], os.O_RDWR | os.O_CLOEXEC)
        sent = bus.send(Message.new_method_return(message, "h", [0], [descriptor]))
        if sent.done():
            os.close(descriptor)
        else:
            sent.add_done_callback(lambda _: os.close(descriptor))
        return True

    bus.add_message_handler(handle)
    await bus.request_name(NAME)
    print("ready", flush=True)
    await bus.wait_for_disconnect()


asyncio.run(main())
