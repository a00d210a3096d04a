"""The client of scripts/bench in Python: asker.py CPU ROUNDS COUNT USER WHAT@SOCKET ...

Pinned to CPU, as USER without rights, in each round COUNT requests for one descriptor of /dev/null to every target in
turn, each round beginning with another one; prints one line a round: the median round trip of each in nanoseconds.
WHAT is
    floor     two calls of the kernel and no library
    library   fdbroker.connect(), which blocks
    asyncio   fdbroker.client.aio.Client
    dbus      dbus-fast, for asyncio, connected as root; the service of dbus_service.py
"""

import asyncio
import os
import socket
import statistics
import sys
import time
from collections.abc import Awaitable, Callable

from dbus_fast import Message, MessageType
from dbus_fast.aio import MessageBus

from fdbroker.client import aio, sync

_NODE = "/dev/null"
_OPEN = b'{"method":"io.fdbroker.Broker.Open","parameters":{"resources":[{"device":"/dev/null","access":"rw"}]}}\0'
Asked = Callable[[], Awaitable[None]]


async def _floor(address: str) -> Asked:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(address)
    room = socket.CMSG_SPACE(4)

    async def ask() -> None:
        sock.send(_OPEN)
        _, ((_, _, number),), _, _ = sock.recvmsg(65536, room, socket.MSG_CMSG_CLOEXEC)
        os.close(int.from_bytes(number, sys.byteorder))

    return ask


async def _library(address: str) -> Asked:
    client = sync.Client.connect(address)

    async def ask() -> None:
        client.open(_NODE, "rw").close()

    return ask


async def _asyncio(address: str) -> Asked:
    client = await aio.Client.connect(address)

    async def ask() -> None:
        (await client.open(_NODE, "rw")).close()

    return ask


async def _dbus(address: str) -> Asked:
    bus = await MessageBus(bus_address=f"unix:path={address}", negotiate_unix_fd=True).connect()

    async def ask() -> None:
        call = Message(
            destination="io.fdbroker.Bench",
            path="/io/fdbroker/Bench",
            interface="io.fdbroker.Bench",
            member="Open",
            signature="s",
            body=[_NODE],
        )
        reply = await bus.call(call)
        if reply is None or reply.message_type is not MessageType.METHOD_RETURN:
            raise SystemExit(f"the service answers {reply}")
        os.close(reply.unix_fds[reply.body[0]])

    return ask


_KINDS = {"floor": _floor, "library": _library, "asyncio": _asyncio}


async def main() -> None:
    """Measure."""
    cpu, rounds, count, user = map(int, sys.argv[1:5])
    os.sched_setaffinity(0, {cpu})
    words = [word.partition("@") for word in sys.argv[5:]]
    # dbus-daemon turns away whom the user database does not know
    buses = {address: await _dbus(address) for what, _, address in words if what == "dbus"}
    # everything is imported: the checkout may be where this user cannot read
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    targets = [buses.get(address) or await _KINDS[what](address) for what, _, address in words]
    for number in range(-1, rounds):  # the first one warms up
        medians = [0] * len(targets)
        for turn in range(len(targets)):
            index = (turn + number + 1) % len(targets)
            ask, times = targets[index], []
            for _ in range(count):
                began = time.perf_counter_ns()
                await ask()
                times.append(time.perf_counter_ns() - began)
            medians[index] = round(statistics.median(times))
        if number >= 0:
            print(*medians)
    sys.stdout.flush()
    os._exit(0)  # the connections need no farewell


asyncio.run(main())
