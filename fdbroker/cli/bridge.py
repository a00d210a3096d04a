"""`fdbroker bridge dbus | evdev`: programs that pass on between topics and what is no client of the broker.

Runs in: a process of its own for each, with an ordinary client's rights.
"""

from __future__ import annotations

from typing import NoReturn

import click

from fdbroker import errors
from fdbroker.cli.words import Group
from fdbroker.errors import FdbrokerError
from fdbroker.wire.journal import escaped

_socket = click.option(
    "--socket", "address", metavar="PATH", help="Default: $FDBROKER_SOCKET, else /run/fdbroker/socket."
)


class LibraryMissing(FdbrokerError):
    """A library that only the bridges need is not installed."""

    exit_code = errors.EX_UNAVAILABLE


@click.group("bridge", cls=Group)
def group() -> None:
    """Pass on between topics and D-Bus or input devices, as an ordinary client."""


def _missing(error: ModuleNotFoundError, module: str, project: str, package: str) -> NoReturn:
    if error.name != module:
        raise error
    raise LibraryMissing(
        f"this bridge needs the library {project}: pip install 'fdbroker[bridges]', or Debian's package {package}"
    ) from None


@group.command()
@click.option(
    "--bus", default="session", show_default=True, metavar="BUS", help="session, system, or the address of a bus."
)
@click.option("--match", "rules", multiple=True, metavar="RULE", help="Signals that match go to its --topic.")
@click.option("--topic", "topics", multiple=True, metavar="TOPIC", help="One for each --match, in their order.")
@click.option("--notify", multiple=True, metavar="TOPIC", help="Show messages on TOPIC as desktop notifications.")
@_socket
def dbus(
    bus: str, rules: tuple[str, ...], topics: tuple[str, ...], notify: tuple[str, ...], address: str | None
) -> None:
    """Signals of a D-Bus bus to topics, and topics to its desktop.

    RULE is a match rule of D-Bus, such as "sender='org.freedesktop.login1',member='PrepareForSleep'". Name the sender
    in it, or every program on the bus can make such a signal.
    """
    if len(rules) != len(topics):
        raise click.UsageError("each --match needs its --topic")
    if not rules and not notify:
        raise click.UsageError("nothing to do: give --match with --topic, or --notify")
    try:
        from fdbroker.bridges import dbus as bridge  # noqa: PLC0415 -- a library that only this command needs
    except ModuleNotFoundError as error:
        _missing(error, "dbus_fast", "dbus-fast", "python3-dbus-fast")
    bridge.run(bus, list(zip(rules, topics, strict=True)), notify, address)


@group.command()
@click.argument("device")
@click.argument("topic")
@click.option(
    "--event", "names", multiple=True, required=True, metavar="NAME", help="KEY_F13, SW_LID, … or a whole type: EV_SW."
)
@_socket
def evdev(device: str, topic: str, names: tuple[str, ...], address: str | None) -> None:
    """Chosen events of an input device to a topic.

    DEVICE is opened by the broker, as the policy allows. No other events than these leave this program, and there is
    no word for all keys.
    """
    try:
        from fdbroker.bridges import evdev as bridge  # noqa: PLC0415 -- a library that only this command needs
    except ModuleNotFoundError as error:
        _missing(error, "evdev", "evdev", "python3-evdev")
    try:
        chosen = bridge.choose(names)
    except ValueError as error:
        raise click.BadParameter(escaped(str(error)), param_hint="--event") from None
    bridge.run(device, topic, chosen, address)
