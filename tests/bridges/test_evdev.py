"""Only what was chosen leaves the input bridge, and it ends in words when the device does."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest
from evdev import ecodes
from hypothesis import given
from hypothesis import strategies as st

from fdbroker.bridges.evdev import _TYPES, _WHOLE, EVENT, DeviceGone, _bits, choose, messages, read_all
from fdbroker.bridges.outbox import Losses

KEY, SYN, SW = ecodes.EV_KEY, ecodes.EV_SYN, ecodes.EV_SW


def event(kind, code, value=1):
    return EVENT.pack(1700000000, 42, kind, code, value)


def said(data, *names):
    lines = []
    found = [json.loads(text) for text in messages(data, "/dev/input/event0", choose(names), Losses(tell=lines.append))]
    return found, lines


def test_a_chosen_event_is_one_object():
    found, _ = said(event(KEY, ecodes.KEY_F13), "KEY_F13")
    assert found == [
        {
            "device": "/dev/input/event0",
            "type": "EV_KEY",
            "code": "KEY_F13",
            "value": 1,
            "time_us": 1700000000000042,
        }
    ]


def test_the_documentation_shows_what_is_said():
    (text,) = messages(event(KEY, ecodes.KEY_F13), "/dev/input/event0", choose(["KEY_F13"]), Losses())
    document = (Path(__file__).parents[2] / "docs/bridges.md").read_text()
    assert f"```json\n{text}\n```" in document
    assert "`KEY_`, `BTN_`, `REL_`, `ABS_` or `SW_`; or `EV_REL`, `EV_ABS` or `EV_SW`" in document
    assert list(_TYPES) == ["KEY", "BTN", "REL", "ABS", "SW"]
    assert _WHOLE == ("EV_REL", "EV_ABS", "EV_SW")


def test_nothing_but_the_chosen_events_is_said():
    typed = [ecodes.KEY_A, ecodes.KEY_F13, ecodes.KEY_ENTER]
    data = b"".join(event(ecodes.EV_MSC, ecodes.MSC_SCAN, code) + event(KEY, code) + event(SYN, 0, 0) for code in typed)
    found, lines = said(data + event(SW, ecodes.KEY_F13), "KEY_F13", "SW_LID")
    assert [(one["type"], one["code"]) for one in found] == [("EV_KEY", "KEY_F13")]
    assert lines == []


@given(st.lists(st.tuples(st.integers(0, 31), st.integers(0, 0x2FF), st.integers(-(2**31), 2**31 - 1))))
def test_whatever_comes_only_what_was_chosen_is_said(events):
    found, _ = said(b"".join(event(*one) for one in events), "KEY_F13", "BTN_LEFT", "EV_SW")
    wanted = [
        (kind, code)
        for kind, code, _ in events
        if (kind == KEY and code in (ecodes.KEY_F13, ecodes.BTN_LEFT)) or (kind == SW and code in ecodes.SW)
    ]
    assert [(ecodes.ecodes[one["type"]], ecodes.ecodes[one["code"]]) for one in found] == wanted


def test_events_that_the_kernel_dropped_are_counted():
    found, lines = said(event(SYN, ecodes.SYN_DROPPED, 0) + event(KEY, ecodes.KEY_F13), "KEY_F13")
    assert len(found) == 1
    assert lines == ["1 message was dropped: the kernel's queue of events was full"]


def test_a_whole_type_has_each_of_its_codes_once():
    chosen = choose(["EV_SW"])
    assert chosen[SW, ecodes.SW_LID] == ("EV_SW", "SW_LID")
    assert {kind for kind, _ in chosen} == {SW}
    assert all(isinstance(code, str) for _, code in chosen.values())


def test_a_name_among_several_of_a_code_is_the_one_that_was_asked_for():
    assert choose(["KEY_MUTE"]) == {(KEY, ecodes.KEY_MUTE): ("EV_KEY", "KEY_MUTE")}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("EV_KEY", "EV_KEY would be everything that is typed: name the keys"),
        ("EV_MSC", "EV_MSC is no event"),
        ("MSC_SCAN", "MSC_SCAN is no event"),
        ("EV_SYN", "EV_SYN is no event"),
        ("KEY", "KEY is no event"),
        ("", " is no event"),
        ("key_f13", "key_f13 is no event; did you mean KEY_F13"),
        ("KEY_VOLUMUP", "KEY_VOLUMUP is no event; did you mean KEY_VOLUMEUP"),
        ("30", "30 is no event"),
    ],
)
def test_what_cannot_be_chosen(name, text):
    with pytest.raises(ValueError) as raised:
        choose([name])
    assert str(raised.value).startswith(text)


def test_the_bits_of_a_mask_are_those_of_the_codes():
    data = bytes(_bits([0, 30, 0x2FF]))
    assert len(data) == 96
    assert [at for at in range(768) if data[at // 8] >> at % 8 & 1] == [0, 30, 0x2FF]


def read_from(*chunks):
    """What is received of a pipe that has these, and the text of its end."""
    reading, writing = os.pipe2(os.O_NONBLOCK | os.O_DIRECT)  # each write is one read
    got = []

    async def run():
        task = asyncio.ensure_future(read_all(reading, "/dev/x", got.append))
        for chunk in chunks:
            os.write(writing, chunk)
        while len(got) < len(chunks) and not task.done():  # noqa: ASYNC110 -- no event to wait for
            await asyncio.sleep(0.001)
        os.close(writing)
        await task

    with pytest.raises(DeviceGone) as raised:
        asyncio.run(run())
    os.close(reading)
    return got, str(raised.value)


def test_reading_goes_on_until_the_device_ends():
    first, second = event(KEY, 30) * 2, event(KEY, 31)
    assert read_from(first, second) == ([first, second], "/dev/x is gone: it gives no events")


def test_half_an_event_ends_it():
    assert read_from(event(KEY, 30)[:-1]) == ([], "/dev/x is gone: it gives no events")


def test_a_device_that_was_unplugged_ends_it(monkeypatch):
    import errno

    reading, writing = os.pipe2(os.O_NONBLOCK)

    def gone(*_):
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr("fdbroker.bridges.evdev.os.read", gone)
    os.write(writing, b"x")
    with pytest.raises(DeviceGone, match="/dev/x is gone: No such device"):
        asyncio.run(read_all(reading, "/dev/x", lambda _: None))
    os.close(reading)
    os.close(writing)
