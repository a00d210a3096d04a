"""The D-Bus bridge between users, with a real broker and real message buses."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from buses import (
    POLICY,
    RULE,
    SESSION,
    SYSTEM,
    Listener,
    Program,
    bob_session,
    bus,
    carols_bridge,
    desktop,
    emit,
    last_member,
    open_folder,
    send,
)
from dbus_fast import Variant
from harness import ALICE, BOB, CAROL, Broker, as_user, folder, running

from fdbroker import errors
from fdbroker.bridges import dbus


@pytest.fixture
def where(root):
    with open_folder() as made:
        yield made


@pytest.fixture
def broker(dev, where):
    with running(POLICY) as made:
        yield made


@pytest.fixture
def session(broker, where):
    with bob_session(broker, where) as made:
        yield made


def test_a_message_of_one_user_appears_on_the_desktop_of_another(broker, session):
    as_user(ALICE, [], send, broker.socket, "the build is done ✓\nall <b>green</b> & fast ✓")
    (found,) = session.after(1)
    # Source: Desktop Notifications Specification 1.2, "org.freedesktop.Notifications.Notify"
    assert found == [
        *("susssasa{sv}i", "fdbroker", 0, ""),
        f"fdbroker-test-{ALICE}: the build is done ✓",
        "all &lt;b&gt;green&lt;/b&gt; &amp; fast ✓",
        [],
        {"urgency": ["y", 1]},
        -1,
    ]


def test_without_a_desktop_the_bridge_says_so_and_goes_on(broker, session, where):
    os.kill(session.desktop.pid, signal.SIGKILL)
    session.desktop.wait()
    as_user(ALICE, [], send, broker.socket, "to nobody")
    session.bridge.wait_for("dropped: org.freedesktop.DBus.Error.ServiceUnknown")
    address = f"unix:path={next(Path('/mnt').glob('*/bus/socket'))}"
    with Program(BOB, where / "desktop", action=desktop(address, session.path)) as shown:
        shown.wait_for("ready")
        as_user(ALICE, [], send, broker.socket, "to somebody")
        assert session.after(1)[0][4] == f"fdbroker-test-{ALICE}: to somebody"


@pytest.fixture
def impatient(monkeypatch):
    """What is asked of the bus has a second for its answer."""
    monkeypatch.setattr(dbus, "BUS_SECONDS", 1)


def test_a_desktop_that_hangs_is_waited_for_a_while(impatient, broker, session):
    """BUS_SECONDS, here one."""
    os.kill(session.desktop.pid, signal.SIGSTOP)
    as_user(ALICE, [], send, broker.socket, "one", "two")
    session.bridge.wait_for("1 message was dropped: org.freedesktop.Notifications does not answer")
    os.kill(session.desktop.pid, signal.SIGCONT)
    as_user(ALICE, [], send, broker.socket, "three")
    assert [one[4] for one in session.after(3)] == [
        f"fdbroker-test-{ALICE}: {word}" for word in ("one", "two", "three")
    ]


@pytest.mark.parametrize("busy", [False, True])
def test_the_bridge_ends_when_the_bus_does(broker, session, busy):
    if busy:  # it waits for an answer meanwhile
        os.kill(session.desktop.pid, signal.SIGSTOP)
        as_user(ALICE, [], send, broker.socket, "no answer")
        time.sleep(0.3)
    session.daemon.kill()
    assert session.bridge.ended() == errors.EX_UNAVAILABLE
    assert "fdbroker: the bus is gone" in session.bridge.text()
    assert "Traceback" not in session.bridge.text()


def test_the_bridge_outlives_the_broker(broker, session):
    """It waits for the next one at the same address, however long that takes."""
    assert broker.stop() == 0
    again = Broker(broker.folder, broker.policy.read_text())
    try:
        again.wait_ready()
        end = time.monotonic() + 20
        while not session.all():
            as_user(ALICE, [], send, again.socket, "hello again")
            assert time.monotonic() < end, session.bridge.text()
            time.sleep(0.2)
        assert again.stop() == 0
    finally:
        again.process.kill()
        again.process.wait()
    assert "Traceback" not in session.bridge.text()


def test_who_may_not_subscribe_gets_no_notifications(broker, where):
    with bus(ALICE, "session", SESSION) as (address, _):
        words = ("bridge", "dbus", "--bus", address, "--notify", "notifications", "--socket", broker.socket)
        with Program(ALICE, where / "bridge", *words) as bridge:
            assert bridge.ended() == errors.EX_NOPERM
            assert "topic notifications: denied" in bridge.text()


# ---- signals to topics


@pytest.fixture
def machine(broker, where):
    with carols_bridge(broker, where) as made:
        yield made


def test_a_signal_of_one_user_is_a_message_of_the_bridge(broker, machine):
    with Listener(broker, "power") as listener:
        body = ["é", {"a": ["v", 1]}]
        own = as_user(ALICE, [], emit_variants, machine.address, body)
        message = listener.next()
    assert (message.topic, message.uid) == ("power", CAROL)
    assert json.loads(message.payload) == {
        "sender": own,
        "path": "/org/example",
        "interface": "org.example.Power",
        "member": "Sleep",
        "signature": "sa{sv}ayd",
        "body": ["é", {"a": [1, [2, "x"]]}, [0, 255], None],
    }


def emit_variants(address, _):
    value = Variant("(i(is))", [1, [2, "x"]])
    body = ["é", {"a": value}, b"\0\xff", float("nan")]
    return emit(address, ("org.example.Power", "Sleep", "sa{sv}ayd", body))


def test_a_broker_that_limits_the_rate_is_waited_for(where, dev):
    limited = f"{CAROL}: {{limits: {{burst: 2, requests_per_second: 20}}, send"
    policy = POLICY.replace(f"{CAROL}: {{send", limited)
    with running(policy) as broker, bus(CAROL, "system", SYSTEM) as (address, _):
        words = ("bridge", "dbus", "--bus", address, "--socket", broker.socket, "--match", RULE, "--topic", "power")
        with Program(CAROL, where / "bridge", *words) as bridge, Listener(broker, "power") as listener:
            bridge.wait_for("go to the topic power")
            members = [f"M{number}" for number in range(10)] + ["Last"]
            as_user(ALICE, [], lambda: emit(address, *(("org.example.Power", one, "", []) for one in members)))
            assert last_member(listener) == members


def test_the_bridge_outlives_a_restart_of_the_broker(where, dev):
    with bus(CAROL, "system", SYSTEM) as (address, _), folder() as place:
        socket = str(place / "socket")
        words = ("bridge", "dbus", "--bus", address, "--socket", socket, "--match", RULE, "--topic", "power")
        last = ("org.example.Power", "Last", "", [])
        with running(POLICY, "--socket", socket) as broker:
            broker.socket = socket
            bridge = Program(CAROL, where / "bridge", *words)
            with Listener(broker, "power") as listener:
                bridge.wait_for("go to the topic power")
                as_user(ALICE, [], emit, address, last)
                assert last_member(listener) == ["Last"]
        with bridge:
            with running(POLICY, "--socket", socket) as broker:
                broker.socket = socket
                with Listener(broker, "power") as listener:
                    as_user(ALICE, [], emit, address, last)
                    assert last_member(listener) == ["Last"]
            as_user(ALICE, [], emit, address, last)
            assert bridge.ended() == errors.EX_UNAVAILABLE


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("--match", "type='nonsense'", "--topic", "power"), errors.EX_DATAERR, "MatchRuleInvalid"),
        (("--match", "interface='x", "--topic", "power"), errors.EX_DATAERR, "the bus does not take the match rule"),
        (("--match", RULE), errors.EX_USAGE, "each --match needs its --topic"),
        ((), errors.EX_USAGE, "nothing to do"),
    ],
)
def test_a_wrong_command_line_is_said(broker, machine, where, words, code, text):
    user = CAROL if code == errors.EX_DATAERR else 0  # click loads what only root may read in a checkout of root's
    with Program(
        user, where / "second", "bridge", "dbus", "--bus", machine.address, "--socket", broker.socket, *words
    ) as bridge:
        assert bridge.ended() == code
        assert text in bridge.text()


@pytest.mark.parametrize("address", ["unix:path=/nonexistent", "nonsense", "unix:abstract=fdbroker-none", "session"])
def test_without_a_bus_there_it_ends(broker, where, address):
    with Program(BOB, where / "log", "bridge", "dbus", "--bus", address, "--notify", "notifications") as bridge:
        assert bridge.ended() == errors.EX_UNAVAILABLE
        assert "bus" in bridge.text()
        assert "Traceback" not in bridge.text()


@pytest.mark.parametrize(
    ("words", "module", "text"),
    [
        (("dbus", "--notify", "x"), "dbus_fast", "python3-dbus-fast"),
        (("evdev", "/dev/null", "x", "--event", "KEY_F13"), "evdev", "python3-evdev"),
    ],
)
def test_a_missing_library_is_named(where, monkeypatch, words, module, text):
    for name in [one for one in sys.modules if one.split(".")[0] == module or one.startswith("fdbroker.bridges.")]:
        monkeypatch.delitem(sys.modules, name)
    import fdbroker.bridges

    for name in ("dbus", "evdev"):
        monkeypatch.delattr(fdbroker.bridges, name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Without(module), *sys.meta_path])
    with Program(0, where / "log", "bridge", *words) as bridge:  # it looks for the library in the checkout
        assert bridge.ended() == errors.EX_UNAVAILABLE
        assert "pip install 'fdbroker[bridges]'" in bridge.text()
        assert text in bridge.text()


class Without:
    """An import system that has no such module."""

    def __init__(self, module):
        self.module = module

    def find_spec(self, name, path=None, target=None):
        if name == self.module:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


# ---- input devices


def test_what_is_no_input_device_or_denied_is_said(dev, where):
    policy = "version: 1\ntopics: {keys: {}}\neveryone: {devices: [{path: /dev/null, access: rw}], send: [keys]}\n"
    with running(policy) as broker:
        for device, code, text in (
            ("/dev/null", errors.EX_DATAERR, "/dev/null is no input device"),
            ("/dev/zero", errors.EX_NOPERM, "denied"),
            ("/dev/null/x", errors.EX_NOPERM, "denied"),
        ):
            words = ("bridge", "evdev", device, "keys", "--event", "KEY_F13", "--socket", broker.socket)
            with Program(ALICE, where / "log", *words) as bridge:
                assert bridge.ended() == code, bridge.text()
                assert text in bridge.text()
