"""The D-Bus bridge: signals of a bus to topics, and topics to the notifications of a desktop.

Runs in: `fdbroker bridge dbus`. Others on the bus control the signals, other users the messages; neither the topics.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from typing import Any

from dbus_fast import Message, MessageType, Variant
from dbus_fast.__version__ import __version__
from dbus_fast.aio import MessageBus

from fdbroker import errors
from fdbroker.bridges.notifications import Flood, Notification, name_of, notification
from fdbroker.bridges.outbox import Losses, Outbox, say, until_one_ends
from fdbroker.bridges.signals import signal_text
from fdbroker.client.aio import Client
from fdbroker.errors import FdbrokerError
from fdbroker.limits import inbox as limits
from fdbroker.limits.bridges import BUS_SECONDS

# Before, dbus-fast counted a text's characters where D-Bus counts bytes: the rest of a sender's text was then read as
# what follows, by the bus. Debian 12's package is older.
_LEAST_VERSION = (2, 11, 1)
_BUS = "org.freedesktop.DBus"
_NOTIFICATIONS = "org.freedesktop.Notifications"


class BusUnavailable(FdbrokerError):
    """No message bus answers at its address, or it closed the connection."""

    exit_code = errors.EX_UNAVAILABLE


class LibraryTooOld(FdbrokerError):
    """The library for D-Bus that is installed has a fault that matters here."""

    exit_code = errors.EX_UNAVAILABLE


class WrongMatch(FdbrokerError):
    """The bus does not take a match rule."""

    exit_code = errors.EX_DATAERR


class _Failed(Exception):
    """What was asked of the bus, or of a program on it, was answered by an error, or not in time."""


def run(bus: str, matches: Sequence[tuple[str, str]], notify: Sequence[str], address: str | None) -> None:
    """Bridge until the broker or the bus is gone.

    `bus` is session, system or a D-Bus address; `matches` are pairs of a match rule and the topic for its signals;
    messages on the topics `notify` become notifications. Raises BusUnavailable, LibraryTooOld, WrongMatch,
    BrokerUnavailable, or TopicDenied when it may not subscribe.
    """
    check_version(__version__)
    asyncio.run(_run(bus_address(bus, os.environ), matches, notify, address))


def check_version(version: str) -> None:
    """Raises LibraryTooOld where the library would write what a sender wrote as something else."""
    if tuple(map(int, re.findall(r"\d+", version)[:3])) < _LEAST_VERSION:
        least = ".".join(map(str, _LEAST_VERSION))
        raise LibraryTooOld(f"dbus-fast {version} writes wrong lengths of text: this bridge needs {least} or later")


def bus_address(bus: str, environment: Mapping[str, str]) -> str:
    """The D-Bus address for these words. Raises BusUnavailable when nothing says where the session's bus is."""
    if bus == "system":
        return environment.get("DBUS_SYSTEM_BUS_ADDRESS") or "unix:path=/run/dbus/system_bus_socket"
    if bus != "session":
        return bus
    if given := environment.get("DBUS_SESSION_BUS_ADDRESS"):
        return given
    if folder := environment.get("XDG_RUNTIME_DIR"):
        return f"unix:path={folder}/bus"
    raise BusUnavailable("no session bus: neither DBUS_SESSION_BUS_ADDRESS nor XDG_RUNTIME_DIR says where it is")


async def _run(bus: str, matches: Sequence[tuple[str, str]], notify: Sequence[str], address: str | None) -> None:
    losses = Losses()
    parts: list[Coroutine[Any, Any, None]] = [losses.run()]
    if matches:
        outbox = Outbox(address, losses)
        parts.append(outbox.run())
        # One connection for each rule: so the bus says which of them a signal fits.
        parts += [_publish(bus, rule, topic, outbox) for rule, topic in matches]
    if notify:
        parts.append(_notify(bus, notify, address, losses))
    await until_one_ends(*parts)


@contextlib.contextmanager
def _unavailable(why: str, but: type[Exception] | tuple[()] = ()) -> Iterator[None]:
    """Whatever the library raises in here means that the bus is not there: it promises no class of errors."""
    try:
        yield
    except but:
        raise
    except Exception as error:  # noqa: BLE001 -- EOFError, OSError, AuthError, ValueError and others are all seen
        raise BusUnavailable(f"{why}: {error or type(error).__name__}") from None


async def _connected(address: str) -> MessageBus:
    with _unavailable(f"no bus answers at {address}"):
        async with asyncio.timeout(BUS_SECONDS):
            # Without negotiate_unix_fd the bus sends us no descriptors.
            return await MessageBus(bus_address=address).connect()


async def _end_of(bus: MessageBus) -> None:
    with _unavailable("the bus is gone"):
        await bus.wait_for_disconnect()
    raise BusUnavailable("the bus is gone")


async def _called(bus: MessageBus, destination: str, path: str, member: str, signature: str, body: list[Any]) -> None:
    """Call a method of the interface that has the destination's name. Raises _Failed, or BusUnavailable."""
    message = Message(destination, path, destination, member, signature=signature, body=body)
    try:
        async with asyncio.timeout(BUS_SECONDS):
            with _unavailable("the bus is gone", but=ValueError):
                reply = await bus.call(message)
    except TimeoutError:
        raise _Failed(f"{destination} does not answer") from None
    except ValueError as error:  # a word that is no text
        raise _Failed(str(error)) from None
    if reply.message_type is MessageType.ERROR:
        raise _Failed(": ".join([str(reply.error_name), *(one for one in reply.body if isinstance(one, str))]))


async def _publish(address: str, rule: str, topic: str, outbox: Outbox) -> None:
    bus = await _connected(address)
    try:
        bus.add_message_handler(lambda message: _received(message, topic, outbox))
        try:
            await _called(bus, _BUS, "/org/freedesktop/DBus", "AddMatch", "s", [rule])
        except _Failed as error:
            raise WrongMatch(f"the bus does not take the match rule {rule}: {error}") from None
        say(f"signals that match {rule} go to the topic {topic}")
        await _end_of(bus)
    finally:
        bus.disconnect()


def _received(message: Message, topic: str, outbox: Outbox) -> None:
    # Whoever is on the bus may send us a signal by our own name there, which no match rule judges: not that one.
    if message.message_type is MessageType.SIGNAL and not message.destination:
        outbox.add(
            topic,
            signal_text(
                *(str(message.sender), str(message.path), str(message.interface), str(message.member)),
                *(message.signature, message.body),
            ),
        )


async def _notify(address: str, topics: Sequence[str], broker: str | None, losses: Losses) -> None:
    bus = await _connected(address)
    try:
        await until_one_ends(_end_of(bus), _show(bus, topics, broker, losses))
    finally:
        bus.disconnect()


async def _show(bus: MessageBus, topics: Sequence[str], broker: str | None, losses: Losses) -> None:
    flood = Flood(time.monotonic())
    own = os.getuid()
    async with await Client.connect(broker) as client:
        say(f"messages on {', '.join(topics)} become notifications")
        async for message in client.subscribe(topics):
            if message.lost:
                losses.add("the desktop takes them slower than they come", message.lost)
            if flood.holds_back(message.owner, time.monotonic()):
                losses.add(f"too many at once of user {message.owner}")
                message.close()
                continue
            # Who is root, or is this user, can make any notification here without us.
            trusted = message.uid in (0, own)
            with message:
                made = notification(message.read(limits.MESSAGE_BYTES), name_of(message.uid), trusted=trusted)
            try:
                await _shown(bus, made)
            except _Failed as error:  # the desktop may start later
                losses.add(str(error))


async def _shown(bus: MessageBus, made: Notification) -> None:
    # Source: Desktop Notifications Specification 1.2, "org.freedesktop.Notifications.Notify"
    replaces, icon, hints = 0, "", {"urgency": Variant("y", made.urgency)}
    actions: list[str] = []
    body = ["fdbroker", replaces, icon, made.summary, made.body, actions, hints, made.expire_ms]
    await _called(bus, _NOTIFICATIONS, "/org/freedesktop/Notifications", "Notify", "susssasa{sv}i", body)
