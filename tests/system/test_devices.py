"""Real sound and input devices, in a virtual machine with Linux 6.1, through a broker that was started by hand."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.lab

MEMBER = 4001
EV_KEY, KEY_F13 = 1, 183  # linux/input-event-codes.h


@pytest.fixture(scope="module")
def facts(vm: Callable[..., Any]) -> Any:
    return vm("devices.py")


def test_started(facts):
    """It starts on a kernel without SO_PEERPIDFD and SO_PASSRIGHTS, without its system users and without a journal."""
    assert tuple(map(int, facts["started"]["kernel"].split(".")[:2])) < (6, 5)


def test_nodes(facts):
    """Only root may open the nodes that the other tests are about."""
    assert set(facts["started"]["devices"].values()) == {"0o20600"}
    assert facts["keyboard"]["node"] == "0o20600"
    assert facts["sound_refused"]["itself"]["code"] != 0
    assert facts["keyboard"]["itself"]["code"] != 0


def test_sound(facts):
    """A tone that a user plays through one granted descriptor is recorded, with its pitch, through another."""
    found = facts["sound"]
    assert found["code"] == 0, found["stderr"]
    assert found["uid"] == MEMBER
    assert found["hertz"] == pytest.approx(1000, rel=0.01)
    assert found["loudest"] == pytest.approx(12000, rel=0.05)


def test_sound_refused(facts):
    """Another node of the same card, which no rule names, is denied."""
    assert facts["sound_refused"]["control"]["code"] == 77


def test_static_node(facts):
    """A node whose driver is not loaded: refused while there is none to load, then opened and judged by its class."""
    found = facts["static_node"]
    assert found["without"]["code"] == 75
    assert "no driver is loaded for its number" in found["without"]["stderr"]
    assert "no driver is loaded for 10:223" in facts["stopped"]["records"]
    assert found["with"]["code"] == 0, found["with"]["stderr"]
    assert found["class"] == "misc"


def test_keyboard(facts):
    """A user reads which keys are pressed through a granted descriptor."""
    found = facts["keyboard"]
    assert found["reader"]["name"] == "lab keyboard"
    assert found["reader"]["uid"] == MEMBER
    assert found["read"] == found["typed"]


def test_namespaces_where_the_kernel_does_not_say_which_process_asks(facts):
    """Named ones, those of the caller's processes and sockets are served; new ones are refused for what they are."""
    found = facts["namespaces"]
    assert found["code"] == 0, found["stderr"]
    assert found["named"] == [found["inode"], None]
    assert found["absent"] == ["NoSuchResource", 0]
    assert found["mine"] == [found["own"], None]
    assert found["foreign"] == ["Denied", 0]
    assert found["new"] == ["OpenFailed", errno.EOPNOTSUPP]
    assert found["through"] == "through"


def test_keyboard_read_only(facts):
    """Asked for ro, the descriptor is read-only; rw is more than the rule gives."""
    found = facts["keyboard"]
    assert found["reader"]["access"] == os.O_RDONLY
    assert found["write"]["code"] == 77


def test_keyboard_other(facts):
    """Another user, who may connect as well, is denied."""
    assert facts["keyboard"]["other"]["code"] == 77


def test_hotkeys_unplugged(facts):
    """When the keyboard goes, the bridge ends with 75 and says so."""
    found = facts["hotkeys"]
    assert found["code"] == 75
    assert f"fdbroker: {found['node']} is gone: No such device" in found["said"]


def test_stopped(facts):
    """SIGTERM ends it with 0, its socket is removed, and every grant stands in the record."""
    found = facts["stopped"]
    assert found["code"] == 0
    assert found["socket"] is False
    for resource in ("/dev/snd/pcmC0D0p", "/dev/snd/pcmC0D1c", "/dev/input/event"):
        assert f'"FDBROKER_RESOURCE": "{resource}' in found["records"]


def test_clock_numbers_increase(facts):
    """Whatever the clock does, a later message has a larger number, after a restart too."""
    found = facts["clock"]["numbers"]
    assert found == sorted(set(found))
    assert found[0] > 0


def test_clock_jumps_delay_nobody(facts):
    """Devices and messages are served at once after each jump, and the broker stops in order."""
    found = facts["clock"]
    assert found["opened"] == 3
    assert max(found["waits_s"]) < 20  # seconds are what it takes in software emulation, a wrong clock would take hours
    assert found["codes"] == [0, 0]
    assert "Traceback" not in found["said"]


def test_clock_what_is_stored_is_kept_by_the_clock_on_the_wall(facts):
    """Nothing is lost before `keep` is over by that clock; who sets it forward ends what is older than that."""
    found = facts["clock"]
    mails = ["first", "1800", "-7200", "-18000"]
    assert found["kept"] == [mails[0], "short", *mails[1:]]
    assert found["later"] == [*mails, "last"]
    # set back, the clock may show again what was over and not yet removed
    assert [text for text in found["restarted"] if text != "short"] == [*mails, "last", "after the restart"]
    assert found["left"] == 0
