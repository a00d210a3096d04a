"""The input bridge: chosen events of one input device to a topic, so that a hotkey tool needs no group `input`.

Runs in: `fdbroker bridge evdev`. The device controls its events; what was not chosen does not reach this process.
Source: linux/input.h, linux/input-event-codes.h.
"""

from __future__ import annotations

import array
import asyncio
import difflib
import fcntl
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import msgspec
from evdev import ecodes

from fdbroker import errors
from fdbroker.bridges.outbox import Losses, Outbox, say, until_one_ends
from fdbroker.client.aio import Client
from fdbroker.errors import FdbrokerError

# struct input_event: seconds, microseconds, type, code, value
EVENT = struct.Struct("LLHHi")
_EVENTS_PER_READ = 64
_EVIOCGVERSION = 0x80044501  # _IOR('E', 0x01, int)
_EVIOCSMASK = 0x40104593  # _IOW('E', 0x93, struct input_mask)
_INPUT_MASK = struct.Struct("IIQ")  # its type, the size and the address of its codes' bits
_MASK_BYTES = 96  # KEY_CNT (0x300) bits, the most that a type has
# Types that may be chosen whole. Not EV_KEY, which is all that is typed, nor EV_MSC, which has each key's scan code.
_WHOLE = ("EV_REL", "EV_ABS", "EV_SW")
_TYPES = {"KEY": "EV_KEY", "BTN": "EV_KEY", "REL": "EV_REL", "ABS": "EV_ABS", "SW": "EV_SW"}

# (type, code) -> their names
Chosen = Mapping[tuple[int, int], tuple[str, str]]


class DeviceGone(FdbrokerError):
    """The input device was unplugged, or its descriptor revoked."""

    exit_code = errors.EX_TEMPFAIL


class NoInputDevice(FdbrokerError):
    """What was opened is no device of evdev."""

    exit_code = errors.EX_DATAERR


def choose(names: Iterable[str]) -> Chosen:
    """The events that these names mean: a code such as KEY_F13, or a type such as EV_SW for all of its codes.

    Raises ValueError for a name that means none, and for the types that would be everything that is typed.
    """
    chosen: dict[tuple[int, int], tuple[str, str]] = {}
    for name in names:
        kind = _TYPES.get(name.partition("_")[0])
        if name in _WHOLE:
            number = ecodes.ecodes[name]
            for code, found in ecodes.bytype[number].items():
                chosen[number, code] = name, found if isinstance(found, str) else found[0]
        elif kind and name in ecodes.ecodes:
            chosen[ecodes.ecodes[kind], ecodes.ecodes[name]] = kind, name
        elif name == "EV_KEY":
            raise ValueError("EV_KEY would be everything that is typed: name the keys")
        else:
            known = [one for one in ecodes.ecodes if one.partition("_")[0] in _TYPES] + list(_WHOLE)
            near = difflib.get_close_matches(name.upper(), known)
            raise ValueError(f"{name} is no event" + (f"; did you mean {', '.join(near)}?" if near else ""))
    return chosen


def run(device: str, topic: str, chosen: Chosen, address: str | None) -> None:
    """Publish these events until the device or the broker is gone.

    Raises DeviceGone, NoInputDevice, BrokerUnavailable, and as the client's `open` does.
    """
    asyncio.run(_run(device, topic, chosen, address))


async def _run(device: str, topic: str, chosen: Chosen, address: str | None) -> None:
    async with await Client.connect(address) as client:
        descriptor = await client.open(device, "ro")
    with descriptor:
        try:
            fcntl.ioctl(descriptor.fileno(), _EVIOCGVERSION, bytes(4))
        except OSError:
            raise NoInputDevice(f"{device} is no input device") from None
        mask(descriptor.fileno(), chosen)
        losses = Losses()
        outbox = Outbox(address, losses)

        def received(data: bytes) -> None:
            for text in messages(data, device, chosen, losses):
                outbox.add(topic, text)

        say(f"{len(chosen)} events of {device} go to the topic {topic}")
        await until_one_ends(outbox.run(), losses.run(), read_all(descriptor.fileno(), device, received))


def mask(device_fd: int, chosen: Chosen) -> None:
    """Have the kernel keep from this descriptor what was not chosen. Where it cannot, `messages` is alone with that."""
    types = {kind for kind, _ in chosen}
    codes = {kind: [code for one, code in chosen if one == kind] for kind in types}
    for kind, numbers in {ecodes.EV_SYN: sorted(types), **codes}.items():  # the mask of EV_SYN is that of the types
        bits = _bits(numbers)
        address, _ = bits.buffer_info()
        try:
            fcntl.ioctl(device_fd, _EVIOCSMASK, _INPUT_MASK.pack(kind, _MASK_BYTES, address))
        except OSError as error:  # Linux before 4.4
            say(f"the kernel does not filter the device's events: {error.strerror}")
            return


def _bits(numbers: Sequence[int]) -> array.array[int]:
    words = array.array("L", bytes(_MASK_BYTES))
    width = words.itemsize * 8
    for number in numbers:
        words[number // width] |= 1 << number % width
    return words


async def read_all(device_fd: int, device: str, received: Callable[[bytes], None]) -> None:
    """Call `received` with whole events of `device_fd`, which is borrowed and non-blocking. Ends by DeviceGone."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()

    def read() -> None:
        try:
            data = os.read(device_fd, EVENT.size * _EVENTS_PER_READ)
            why = "it gives no events" if not data or len(data) % EVENT.size else ""
        except BlockingIOError:
            return
        except OSError as error:  # ENODEV: unplugged, or revoked
            data, why = b"", str(error.strerror)
        if why:
            loop.remove_reader(device_fd)
            ended.set_exception(DeviceGone(f"{device} is gone: {why}"))
        else:
            received(data)

    loop.add_reader(device_fd, read)
    try:
        await ended
    finally:
        loop.remove_reader(device_fd)


def messages(data: bytes, device: str, chosen: Chosen, losses: Losses) -> Iterator[str]:
    """The chosen ones of these events, each as JSON text, and nothing of the others."""
    for seconds, micros, kind, code, value in EVENT.iter_unpack(data):
        if (kind, code) == (ecodes.EV_SYN, ecodes.SYN_DROPPED):
            losses.add("the kernel's queue of events was full")
        names = chosen.get((kind, code))
        if names is None:
            continue
        said = {"device": device, "type": names[0], "code": names[1], "value": value}
        yield msgspec.json.encode({**said, "time_us": seconds * 1_000_000 + micros}).decode()
