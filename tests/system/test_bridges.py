"""The bridges' shipped units under a real systemd, between real login sessions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MEMBER, OTHER = 4001, 4002
UNITS = Path(__file__).resolve().parents[2] / "units"
SYSTEM = ("fdbroker-dbus@lab.service", "fdbroker-evdev@lab.service")


@pytest.fixture(scope="module")
def facts(nspawn: Callable[..., Any]) -> Any:
    return nspawn("bridges.py")


def test_users(facts):
    """The users of the units are made by sysusers, and the folder of what they do is root's."""
    found = facts["started"]
    assert all(shell.endswith("nologin") for shell in found["shells"].values())
    assert found["folder"] == [0, "0o40755"]


@pytest.mark.parametrize("unit", [*SYSTEM, "user"])
def test_verified(facts, unit):
    """Systemd-analyze verify finds nothing in a unit."""
    found = facts["notified"]["verified"] if unit == "user" else facts["verified"][unit]
    assert (found["code"], found["stderr"]) == (0, "")


def test_a_signal_of_the_system_bus_is_a_message(facts):
    """By the unit, as its own user; and a signal of somebody else with the same name is none."""
    found = facts["signals"]
    assert found["begun"]["code"] == found["emitted"]["code"] == found["session"]["code"] == 0, found
    assert {one["uid"] for one in found["received"]} == {found["uid"]}
    assert all('"member":"SessionNew"' in one["payload"] for one in found["received"])
    assert not [one for one in found["received"] if "forged" in one["payload"]]
    assert found["state"] == {"ActiveState": "active", "NRestarts": "0"}


def test_a_message_sent_from_one_login_session_appears_on_the_bus_of_another(facts):
    """By the user unit: it says who sent it, and what markup it brings is shown as text."""
    found = facts["notified"]
    assert found["begun"]["code"] == found["bridge"]["code"] == found["sent"]["code"] == 0, found
    text = "&lt;b&gt;all&lt;/b&gt; of it"
    assert found["note"] == ["fdbroker", "", f"lab-{MEMBER}: the build is done", text, [], 1, ["urgency"], -1]
    assert found["uid"] == MEMBER
    assert found["buses"] == [OTHER, True]
    assert found["confined"] == "NoNewPrivileges=yes"
    sender, receiver = found["sessions"]
    assert sender
    assert receiver
    assert sender != receiver


def test_the_session_of_a_message_and_of_its_record_is_its_senders_own(facts):
    """Not that of who became another user in it, and not one that a user has made in what is delegated to it."""
    found = facts["placed"]
    assert [one["code"] for one in found["done"]] == [0, 0], found
    kinds = {text.partition(" ")[0]: (text.partition(" ")[2], *said) for text, said in found["messages"].items()}
    session, uid, said = kinds["own"]
    assert (uid, said) == (MEMBER, session)
    session, uid, said = kinds["root"]
    assert (uid, said) == (0, session)
    assert kinds["another"] == (session, MEMBER, "")
    place, uid, said = kinds["forged"]
    assert (uid, said) == (MEMBER, "")
    assert place.startswith(f"/user.slice/user-{MEMBER}.slice/user@{MEMBER}.service/")
    assert place.endswith("/session-9.scope")
    assert found["records"] == found["messages"]


def test_the_bridge_is_started_again_when_its_bus_was(facts):
    """It ends when the bus does, with a code after which systemd tries again."""
    assert facts["bus_ends"]["restarts"] in ("NRestarts=1", "NRestarts=2")


def test_what_is_no_input_device_is_not_tried_again(facts):
    """The words of the unit's file arrive; 65 is final."""
    found = facts["no_input_device"]
    assert (found["ExecMainStatus"], found["NRestarts"]) == ("65", "0")
    assert "fdbroker: /dev/lab/zero is no input device" in found["said"]


@pytest.mark.parametrize("unit", SYSTEM)
def test_exposure(facts, unit):
    """As systemd-analyze security counts, from 0, nothing, to 10."""
    assert facts["security"][unit] <= 1.0


def test_stopped(facts):
    """A stop is in order."""
    found = facts["stopped"]
    assert (found["Result"], found["ActiveState"]) == ("success", "inactive")


def test_the_units_confine_alike():
    """What both system units take away is the same, word by word."""
    texts = [(UNITS / unit.replace("lab", "")).read_text() for unit in SYSTEM]
    begin = "# It has the rights of an ordinary client."
    first, second = (
        [line for line in begin_and_rest(text, begin).splitlines() if not line.startswith("#")] for text in texts
    )
    assert first == second
    assert len(first) > 30


def test_the_units_try_again_but_not_after_what_the_documentation_says():
    """64, 65, 76 and 77 are final."""
    for name in ("fdbroker-dbus@.service", "fdbroker-evdev@.service", "user/fdbroker-notify.service"):
        lines = (UNITS / name).read_text().splitlines()
        assert {"Restart=on-failure", "RestartPreventExitStatus=64 65 76 77", "StartLimitIntervalSec=0"} <= set(lines)
    assert "not after 64, 65, 76 or 77" in (UNITS.parent / "docs/bridges.md").read_text()


def begin_and_rest(text: str, begin: str) -> str:
    assert begin in text
    return text.partition(begin)[2]
