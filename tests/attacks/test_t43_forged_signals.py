"""T43: a program on the bus makes a topic say that another program sent a signal."""

from __future__ import annotations

import json

import pytest
from buses import POLICY, SYSTEM, Listener, Program, bus, carols_bridge, emit, last_member, open_folder
from harness import ALICE, CAROL, as_user, running


@pytest.fixture
def broker(dev):
    with open_folder() as where, running(POLICY) as made:
        made.where = where
        yield made


def test_only_what_matches_and_went_to_all_is_published(broker):
    last = ("org.example.Power", "Last", "", [])
    with carols_bridge(broker, broker.where) as machine, Listener(broker, "power") as listener:
        as_user(ALICE, [], emit, machine.address, ("org.example.Other", "Other", "", []))
        # Anybody may send a signal to the bridge's own name on the bus: no match rule judges that one.
        as_user(ALICE, [], lambda: emit(machine.address, ("org.example.Power", "Forged", "", []), to="all"))
        as_user(ALICE, [], emit, machine.address, ("org.example.Power", "Descriptor", "h", [0]), last)
        assert last_member(listener) == ["Last"]


def test_a_rule_that_names_a_sender_takes_no_other_and_each_message_says_who_sent_it(broker):
    rule = "sender='org.freedesktop.DBus',interface='org.freedesktop.DBus',member='NameOwnerChanged'"
    forged = ("org.freedesktop.DBus", "NameOwnerChanged", "sss", ["forged", "", ""])
    with bus(CAROL, "system", SYSTEM) as (address, _), Listener(broker, "power") as listener:
        words = ("bridge", "dbus", "--bus", address, "--socket", broker.socket, "--match", rule, "--topic", "power")
        with Program(CAROL, broker.where / "bridge", *words) as bridge:
            bridge.wait_for("go to the topic power")
            own = as_user(ALICE, [], emit, address, forged, forged)
            body = []
            while body != [own, own, ""]:  # it has gone
                message = listener.next()
                assert message.uid == CAROL
                said = json.loads(message.payload)
                body = said["body"]
                assert (said["sender"], body[0] == "forged") == ("org.freedesktop.DBus", False)
