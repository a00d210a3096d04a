"""The D-Bus bridge between users, with a real broker and real message buses."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from dbus_fast import Message, MessageType, Variant
from dbus_fast.aio import MessageBus
from harness import ALICE, BOB, CAROL, MS_BIND, Broker, as_user, cannot, folder, mount, running, unmount

import fdbroker
from fdbroker import errors, limits
from fdbroker.cli import commands

POLICY = f"""
version: 1
topics: {{notifications: {{}}, power: {{}}, short: {{maximum_bytes: 100}}}}
users:
  {ALICE}: {{send: [notifications]}}
  {BOB}: {{subscribe: [notifications]}}
  {CAROL}: {{send: [power, short]}}
  0: {{send: ["*"], subscribe: ["*"]}}
"""
BUS = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-BUS Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>{type}</type>
  <listen>unix:path={path}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">{rules}</policy>
</busconfig>
"""
# as /usr/share/dbus-1/session.conf and system.conf have them
SESSION = '<allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/><allow own="*"/>'
SYSTEM = """<allow user="*"/><deny own="*"/><deny send_type="method_call"/><allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/><allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/><allow receive_type="method_return"/><allow receive_type="error"/>
    <allow receive_type="signal"/>
    <allow send_destination="org.freedesktop.DBus" send_interface="org.freedesktop.DBus"/>"""
RULE = "interface='org.example.Power'"


@contextlib.contextmanager
def bus(uid, kind, rules):
    """A message bus of that user; its address, and the daemon."""
    if shutil.which("dbus-daemon") is None:
        cannot("no dbus-daemon: install the package dbus")
    with folder() as where:
        own = where / "bus"
        own.mkdir()
        os.chown(own, uid, uid)
        config = where / "bus.conf"
        config.write_text(BUS.format(type=kind, path=own / "socket", rules=rules))
        command = ("dbus-daemon", f"--config-file={config}", "--nofork", "--nosyslog", "--print-address")
        daemon = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, user=uid, group=uid, extra_groups=[], env={}, cwd="/"
        )
        try:
            address = daemon.stdout.readline().strip()
            assert address
            yield address.partition(",")[0], daemon
        finally:
            daemon.kill()
            daemon.wait()
            daemon.stdout.close()


class Program:
    """`fdbroker` with these words in a process of that user; `text` is what it says on standard error."""

    def __init__(self, uid, log, *words, action=commands.run):
        self.log = Path(log)
        self.code = None
        self.log.write_text("")
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                os.dup2(os.open(self.log, os.O_WRONLY | os.O_APPEND), 2)
                sys.stderr = open(2, "w", buffering=1, closefd=False)
                sys.argv = ["fdbroker", *words]
                os.environ.pop("DBUS_SESSION_BUS_ADDRESS", None)
                os.environ.pop("XDG_RUNTIME_DIR", None)
                os.setgroups([])
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
                code = action()
            finally:
                os._exit(code)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.code is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def text(self):
        return self.log.read_text()

    def wait(self):
        self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code

    def ended(self, seconds=15.0):
        """Its exit code, once it ends by itself."""
        end = time.monotonic() + seconds
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            assert time.monotonic() < end, self.text()
            time.sleep(0.02)
        return self.code

    def wait_for(self, text, seconds=15.0):
        end = time.monotonic() + seconds
        while text not in self.text():
            assert time.monotonic() < end, f"no {text!r} in: {self.text()}"
            time.sleep(0.02)


def desktop(address, notes):
    """A service that owns org.freedesktop.Notifications and writes down each Notify."""

    async def serve():
        connection = await MessageBus(bus_address=address).connect()

        def received(message):
            if message.message_type is MessageType.METHOD_CALL and message.member == "Notify":
                *before, hints, expire = message.body
                said = {name: [one.signature, one.value] for name, one in hints.items()}
                with open(notes, "a") as file:
                    file.write(json.dumps([message.signature, *before, said, expire]) + "\n")
                return Message.new_method_return(message, "u", [1])
            return None

        connection.add_message_handler(received)
        await connection.request_name("org.freedesktop.Notifications")
        sys.stderr.write("ready\n")
        sys.stderr.flush()
        await connection.wait_for_disconnect()

    return lambda: asyncio.run(serve())


def send(address, *payloads):
    with fdbroker.connect(address) as client:
        for payload in payloads:
            client.send("notifications", payload)


@pytest.fixture
def where(root):
    """A folder in which everybody may write; and the users have names, which dbus-daemon wants of its own."""
    names = "".join(f"lab-{uid}:x:{uid}:{uid}::/:/usr/sbin/nologin\n" for uid in (ALICE, BOB, CAROL))
    with folder() as path:
        os.chmod(path, 0o777)
        (path / "passwd").write_text(Path("/etc/passwd").read_text() + names)
        mount(str(path / "passwd"), "/etc/passwd", "none", MS_BIND)
        try:
            yield path
        finally:
            unmount("/etc/passwd")


@pytest.fixture
def broker(dev, where):
    with running(POLICY) as made:
        yield made


class Notes:
    """What the desktop of the other user showed."""

    def __init__(self, path):
        self.path = path
        path.touch()
        os.chmod(path, 0o666)

    def all(self):
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def after(self, count, seconds=15.0):
        """All of them, once there are so many."""
        end = time.monotonic() + seconds
        while len(found := self.all()) < count:
            assert time.monotonic() < end, found
            time.sleep(0.02)
        return found


@pytest.fixture
def session(broker, where):
    """A session of bob's: his bus, its desktop, and the bridge; gives what the desktop shows, and the bridge."""
    notes = Notes(where / "notes")
    with bus(BOB, "session", SESSION) as (address, daemon):
        words = ("bridge", "dbus", "--bus", address, "--notify", "notifications", "--socket", broker.socket)
        with (
            Program(BOB, where / "desktop", action=desktop(address, notes.path)) as shown,
            Program(BOB, where / "bridge", *words) as bridge,
        ):
            shown.wait_for("ready")
            while not notes.all():  # subscribing is not answered: this one shows that it is in force
                as_user(0, [], send, broker.socket, "are you there")
                time.sleep(0.05)
                assert "ended" not in bridge.text()
            while True:  # those that went before it
                count = len(notes.all())
                time.sleep(0.3)
                if len(notes.all()) == count:
                    break
            notes.path.write_text("")
            notes.desktop, notes.bridge, notes.daemon = shown, bridge, daemon
            yield notes


def test_a_message_of_one_user_appears_on_the_desktop_of_another(broker, session):
    as_user(ALICE, [], send, broker.socket, "the build is done ✓\nall <b>green</b> & fast ✓")
    (found,) = session.after(1)
    # Source: Desktop Notifications Specification 1.2, "org.freedesktop.Notifications.Notify"
    assert found == [
        *("susssasa{sv}i", "fdbroker", 0, ""),
        f"lab-{ALICE}: the build is done ✓",
        "all &lt;b&gt;green&lt;/b&gt; &amp; fast ✓",
        [],
        {"urgency": ["y", 1]},
        -1,
    ]


def test_an_object_says_more_and_a_foreign_one_is_neither_critical_nor_there_for_ever(broker, session):
    asked = {"summary": "x\u202e\n<i>", "body": "<img src='/x'>", "urgency": "critical", "expire_ms": 0}
    as_user(ALICE, [], send, broker.socket, json.dumps(asked))
    as_user(0, [], send, broker.socket, json.dumps({**asked, "expire_ms": 5000}))
    first, second = session.after(2)
    assert first[4:] == [f"lab-{ALICE}: x <i>", "&lt;img src='/x'&gt;", [], {"urgency": ["y", 1]}, 1000]
    assert second[4:] == ["root: x <i>", "&lt;img src='/x'&gt;", [], {"urgency": ["y", 2]}, 5000]


def test_a_flood_of_one_user_is_dropped_and_counted(broker, session):
    burst = limits.NOTIFICATIONS_PER_USER_BURST
    as_user(ALICE, [], send, broker.socket, *map(str, range(burst + 50)))
    session.bridge.wait_for(f"dropped: too many at once of user {ALICE}")
    as_user(0, [], send, broker.socket, "of another")
    found = session.after(burst + 1)
    assert found[-1][4] == "root: of another"
    assert burst + 1 <= len(found) <= burst + 5


def test_without_a_desktop_the_bridge_says_so_and_goes_on(broker, session, where):
    os.kill(session.desktop.pid, signal.SIGKILL)
    session.desktop.wait()
    as_user(ALICE, [], send, broker.socket, "to nobody")
    session.bridge.wait_for("dropped: org.freedesktop.DBus.Error.ServiceUnknown")
    address = f"unix:path={next(Path('/mnt').glob('*/bus/socket'))}"
    with Program(BOB, where / "desktop", action=desktop(address, session.path)) as shown:
        shown.wait_for("ready")
        as_user(ALICE, [], send, broker.socket, "to somebody")
        assert session.after(1)[0][4] == f"lab-{ALICE}: to somebody"


@pytest.fixture
def impatient(monkeypatch):
    """What is asked of the bus has a second for its answer."""
    monkeypatch.setattr(limits, "BUS_SECONDS", 1, raising=False)


def test_a_desktop_that_hangs_is_waited_for_a_while(impatient, broker, session):
    os.kill(session.desktop.pid, signal.SIGSTOP)
    as_user(ALICE, [], send, broker.socket, "one", "two")
    session.bridge.wait_for("1 message was dropped: org.freedesktop.Notifications does not answer")
    os.kill(session.desktop.pid, signal.SIGCONT)
    as_user(ALICE, [], send, broker.socket, "three")
    assert [one[4] for one in session.after(3)] == [f"lab-{ALICE}: {word}" for word in ("one", "two", "three")]


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
    """A bus for all users, and carol's bridge for one rule on it."""
    with bus(CAROL, "system", SYSTEM) as (address, _):
        words = ("bridge", "dbus", "--bus", address, "--socket", broker.socket)
        matches = ("--match", RULE, "--topic", "power", "--match", "interface='org.example.Long'", "--topic", "short")
        with Program(CAROL, where / "bridge", *words, *matches) as bridge:
            bridge.wait_for("go to the topic power")
            bridge.wait_for("go to the topic short")
            bridge.address = address
            yield bridge


def emit(address, *signals, to=None):
    """Send these signals, (interface, member, signature, body) each; to everybody by name when `to` says so."""

    async def talk():
        connection = await MessageBus(bus_address=address, negotiate_unix_fd=True).connect()
        names = [None]
        if to:
            asked = Message("org.freedesktop.DBus", "/", "org.freedesktop.DBus", "ListNames")
            names = [one for one in (await connection.call(asked)).body[0] if one.startswith(":")]
        for interface, member, signature, body in signals:
            for name in names:
                descriptors = [0] if "h" in signature else []
                sent = Message(
                    *(name, "/org/example", interface, member, MessageType.SIGNAL),
                    signature=signature,
                    body=body,
                    unix_fds=descriptors,
                )
                await connection.send(sent)
        # answered once the bus has taken what was sent before
        await connection.call(Message("org.freedesktop.DBus", "/", "org.freedesktop.DBus", "GetId"))
        own = connection.unique_name
        connection.disconnect()
        return own

    return asyncio.run(talk())


class Listener:
    """Who has subscribed to a topic."""

    def __init__(self, broker, topic):
        self.client = fdbroker.connect(broker.socket, timeout_s=15)
        self.messages = self.client.subscribe([topic])
        self.topic = topic
        with fdbroker.connect(broker.socket) as sender:
            import threading

            thread = threading.Thread(target=lambda: next(self.messages))
            thread.start()
            while thread.is_alive():
                sender.send(topic, "are you there")
                thread.join(0.05)

    def next(self):
        while True:
            message = next(self.messages)
            if message.payload != b"are you there":
                return message

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.messages.close()
        self.client.close()


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


def last_member(listener):
    """The members that come, to the one named Last."""
    found = []
    while found[-1:] != ["Last"]:
        found.append(json.loads(listener.next().payload)["member"])
    return found


def test_only_what_matches_and_went_to_all_is_published(broker, machine):
    last = ("org.example.Power", "Last", "", [])
    with Listener(broker, "power") as listener:
        as_user(ALICE, [], emit, machine.address, ("org.example.Other", "Other", "", []))
        # Anybody may send a signal to the bridge's own name on the bus: no match rule judges that one.
        as_user(ALICE, [], lambda: emit(machine.address, ("org.example.Power", "Forged", "", []), to="all"))
        as_user(ALICE, [], emit, machine.address, ("org.example.Power", "Descriptor", "h", [0]), last)
        assert last_member(listener) == ["Last"]


def test_what_is_too_long_or_refused_is_dropped_and_the_bridge_goes_on(broker, machine):
    with Listener(broker, "power") as listener:
        long = ("org.example.Power", "Long", "ay", [bytes(70000)])
        refused = ("org.example.Long", "Refused", "s", ["x" * 200])
        as_user(ALICE, [], lambda: emit(machine.address, long, refused, ("org.example.Power", "Last", "", [])))
        assert last_member(listener) == ["Last"]
    machine.wait_for("1 message was dropped: longer than 65536 bytes")
    assert "Traceback" not in machine.text()


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
