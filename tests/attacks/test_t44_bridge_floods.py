"""T44: a flood of signals grows a bridge, or one message ends it."""

from __future__ import annotations

import pytest
from buses import POLICY, RULE, SYSTEM, Listener, Program, bus, carols_bridge, emit, last_member, open_folder
from harness import ALICE, CAROL, as_user, resident_bytes, running

from fdbroker.limits import every as limits


@pytest.fixture
def broker(dev):
    with open_folder() as where, running(POLICY) as made:
        made.where = where
        yield made


def test_what_is_too_long_or_refused_is_dropped_and_the_bridge_goes_on(broker):
    with carols_bridge(broker, broker.where) as machine, Listener(broker, "power") as listener:
        long = ("org.example.Power", "Long", "ay", [bytes(70000)])
        refused = ("org.example.Long", "Refused", "s", ["x" * 200])
        as_user(ALICE, [], lambda: emit(machine.address, long, refused, ("org.example.Power", "Last", "", [])))
        assert last_member(listener) == ["Last"]
        machine.wait_for("1 message was dropped: longer than 65536 bytes")
        assert "Traceback" not in machine.text()


def test_what_comes_faster_than_it_goes_is_dropped_the_oldest_first_and_counted(dev):
    """The broker lets the bridge send twenty a second; ALICE sends twelve megabytes at once."""
    limited = f"{CAROL}: {{limits: {{burst: 2, requests_per_second: 20}}, send"
    with (
        open_folder() as where,
        running(POLICY.replace(f"{CAROL}: {{send", limited)) as broker,
        bus(CAROL, "system", SYSTEM) as (address, _),
    ):
        words = ("bridge", "dbus", "--bus", address, "--socket", broker.socket, "--match", RULE, "--topic", "power")
        with Program(CAROL, where / "bridge", *words) as bridge, Listener(broker, "power") as listener:
            bridge.wait_for("go to the topic power")
            before = resident_bytes(bridge.pid)
            signals = [("org.example.Power", f"M{number}", "s", ["x" * 60000]) for number in range(200)]
            as_user(ALICE, [], emit, address, *signals, ("org.example.Power", "Last", "", []))
            members = last_member(listener)
            assert len(members) < 100
            assert members[-2:] == ["M199", "Last"]
            assert "dropped: the broker takes them slower than they come" in bridge.text()
            assert resident_bytes(bridge.pid) - before < 8 * limits.BRIDGE_BYTES
