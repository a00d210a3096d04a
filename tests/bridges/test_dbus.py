"""Where the bus is, and which library may write to it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from dbus_fast import Message, MessageType
from dbus_fast.__version__ import __version__

from fdbroker.bridges.dbus import _LEAST_VERSION, BusUnavailable, LibraryTooOld, bus_address, check_version

TOP = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("bus", "environment", "address"),
    [
        ("system", {}, "unix:path=/run/dbus/system_bus_socket"),
        ("system", {"DBUS_SYSTEM_BUS_ADDRESS": "unix:path=/a"}, "unix:path=/a"),
        ("session", {"XDG_RUNTIME_DIR": "/run/user/5"}, "unix:path=/run/user/5/bus"),
        ("session", {"XDG_RUNTIME_DIR": "/run/user/5", "DBUS_SESSION_BUS_ADDRESS": "unix:path=/b"}, "unix:path=/b"),
        ("unix:path=/c", {"DBUS_SESSION_BUS_ADDRESS": "unix:path=/b"}, "unix:path=/c"),
    ],
)
def test_addresses(bus, environment, address):
    assert bus_address(bus, environment) == address


def test_without_a_session_bus_no_other_is_guessed():
    with pytest.raises(BusUnavailable, match="XDG_RUNTIME_DIR"):
        bus_address("session", {"DISPLAY": ":0", "HOME": "/"})


@pytest.mark.parametrize("version", ["1.84.2", "2.11.0"])
def test_a_library_that_writes_wrong_lengths_is_refused(version):
    with pytest.raises(LibraryTooOld, match=r"needs 2\.11\.1 or later"):
        check_version(version)


def test_the_library_that_is_here_counts_bytes():
    check_version(__version__)
    check_version("2.11.1")
    text = "é" * 3
    sent = Message(None, "/a", "a.b", "C", MessageType.SIGNAL, signature="s", body=[text], serial=1)
    assert bytes(sent._marshall(False)).endswith(b"\x06\0\0\0" + text.encode() + b"\0")


def test_the_version_stands_in_one_number_everywhere():
    least = ".".join(map(str, _LEAST_VERSION))
    assert re.findall(r'"dbus-fast>=([\d.]+)"', (TOP / "pyproject.toml").read_text()) == [least]
    assert f"dbus-fast {least} or later" in " ".join((TOP / "docs/bridges.md").read_text().split())
