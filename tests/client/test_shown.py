"""Messages as people see them, and a slow subscriber of the asyncio client."""

from __future__ import annotations

import asyncio
import json
import socket

from fdbroker.cli import show
from fdbroker.client.aio import Client


def test_a_long_message_is_cut_and_said_to_be():
    most = show._SHOWN_BYTES
    assert show.shown(b"hello") == "hello"
    assert show.shown(b"\xff\xfe") == "//4="
    assert show.shown(b"x" * most) == "x" * most
    assert show.shown(b"x" * (most + 5)) == "x" * most + " … and 5 bytes more: see --json"
    assert show.shown("€".encode() * most).startswith("€" * (most // 3))


def test_what_a_slow_subscriber_does_not_take_stays_in_the_kernel():
    """So the broker sees that it is slow; nothing is lost, and all come in their order."""
    count = 3000

    def reply(number):
        said = {"number": number, "topic": "t", "uid": 1, "gid": 1, "pid": 1, "time": 1, "encoding": "text"}
        message = {**said, "payload": "x" * 1000}
        return json.dumps({"parameters": {"message": message}, "continues": True}).encode() + b"\0"

    async def run():
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        theirs.setblocking(False)
        ours.setblocking(False)
        loop = asyncio.get_running_loop()
        client = Client(ours)

        async def send():
            for number in range(1, count + 1):
                await loop.sock_sendall(theirs, reply(number))

        messages = client.subscribe(["t"])
        sending = asyncio.ensure_future(send())
        first = await anext(messages)
        await asyncio.sleep(0.3)
        waiting = client._waiting[0].replies.qsize()
        assert not sending.done()
        numbers = [first.number]
        while len(numbers) < count:
            numbers.append((await anext(messages)).number)
        await sending
        await messages.aclose()
        client.close()
        theirs.close()
        return waiting, numbers

    waiting, numbers = asyncio.run(run())
    assert waiting < 200
    assert numbers == list(range(1, count + 1))
