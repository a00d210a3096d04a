"""A desktop as far as notifications go: owns the name on its session's bus, and writes down what it would show."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

from dbus_fast import Message, MessageType
from dbus_fast.aio import MessageBus

NOTES, SESSION = map(Path, sys.argv[1:])


def received(message: Message) -> Message | None:
    if message.message_type is not MessageType.METHOD_CALL or message.member != "Notify":
        return None
    name, _, icon, summary, body, actions, hints, expire_ms = message.body
    urgency = hints["urgency"].value
    with NOTES.open("a") as file:
        file.write(json.dumps([name, icon, summary, body, actions, urgency, sorted(hints), expire_ms]) + "\n")
    return Message.new_method_return(message, "u", [1])


async def main() -> None:
    bus = await MessageBus(bus_address=f"unix:path=/run/user/{os.getuid()}/bus").connect()
    bus.add_message_handler(received)
    await bus.request_name("org.freedesktop.Notifications")
    SESSION.write_text(os.environ["XDG_SESSION_ID"])
    await bus.wait_for_disconnect()


while True:  # a bus that was restarted gets its desktop again
    try:
        asyncio.run(main())
    except Exception as error:
        print(error, file=sys.stderr, flush=True)
