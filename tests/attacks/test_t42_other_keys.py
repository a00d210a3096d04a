"""T42: the input bridge tells more than the chosen keys. With a keyboard, so in a virtual machine."""

from __future__ import annotations

import time

import pytest

pytestmark = pytest.mark.lab

MEMBER = 4001
EV_KEY, KEY_F13 = 1, 183  # linux/input-event-codes.h


@pytest.fixture(scope="module")
def facts(vm):
    return vm("devices.py")


def test_of_the_keys_that_are_typed_only_the_chosen_one_is_a_message(facts):
    """Of the keys that are typed only the chosen one is a message, whose sender is in no group `input`."""
    found = facts["hotkeys"]
    assert {(one["device"], one["type"], one["code"]) for one in found["messages"]} == {
        (found["node"], "EV_KEY", "KEY_F13")
    }
    values = [one["value"] for one in found["messages"]]
    pressed = values.index(1)  # the subscriber may have come after the first one
    assert values[pressed : pressed + 2] == [1, 0]
    assert {one["uid"] for one in found["messages"]} == {MEMBER}
    assert set(found["groups"].split()) == {"4000", "4100"}
    assert all(abs(one["time_us"] / 1e6 - time.time()) < 600 for one in found["messages"])


def test_the_kernel_keeps_the_others_from_the_bridge(facts):
    """The kernel itself keeps what was not chosen from the bridge's descriptor."""
    assert facts["hotkeys"]["reaches"] == {"types": [EV_KEY], "keys": [KEY_F13]}
