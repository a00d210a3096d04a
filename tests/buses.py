"""What the tests of the bridges share: message buses, a desktop, programs of other users, and who listens."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from dbus_fast import Message, MessageType
from dbus_fast.aio import MessageBus
from harness import ALICE, BOB, CAROL, as_user, cannot, folder

import fdbroker
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


@contextlib.contextmanager
def open_folder():
    """A folder in which everybody may write."""
    with folder() as path:
        os.chmod(path, 0o777)
        yield path


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


@contextlib.contextmanager
def bob_session(broker, where):
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


@contextlib.contextmanager
def carols_bridge(broker, where):
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


def last_member(listener):
    """The members that come, to the one named Last."""
    found = []
    while found[-1:] != ["Last"]:
        found.append(json.loads(listener.next().payload)["member"])
    return found
