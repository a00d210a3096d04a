"""T31: who owns a connected namespace attacks its neighbours on the bridge."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import subprocess
import time

import pytest
from harness import (
    ALICE,
    BOB,
    CLONE_NEWNET,
    LIBC,
    Raw,
    as_user,
    become_root_of_user_namespace,
    ip,
    outcome,
    own_network,
    private_dev,
    running,
)

RULE = "{type: net, create: true, link: {bridge: BRIDGE, address: 10.88.0.0/28}}"
POLICY = f"version: 1\neveryone: {{namespaces: [{RULE}]}}\n"
NEW = {"namespace": {"type": "net", "create": True}}
FORGED = bytes.fromhex("020000c0ffee")
ETH_P_ALL = 3


@pytest.fixture
def machine(root):
    with own_network(), private_dev():
        ip("link", "add", "br0", "type", "bridge")
        ip("addr", "add", "10.88.0.1/28", "dev", "br0")
        ip("link", "set", "br0", "up")
        yield


def _enter(address):
    """Have a connected namespace made and go there; its own address."""
    become_root_of_user_namespace()
    with Raw(address) as client:
        assert outcome(client.ask(NEW)) == "granted"
        assert LIBC.setns(client.descriptors[0], CLONE_NEWNET) == 0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("10.88.0.1", 9))
        return probe.getsockname()[0]


def _everything(sock, seconds):
    """Whether anything of the attacker's comes to this packet socket meanwhile."""
    end = time.monotonic() + seconds
    sock.settimeout(0.1)
    while time.monotonic() < end:
        with contextlib.suppress(TimeoutError):
            if FORGED in sock.recv(2000):
                return True
    return False


def _victim(address, out, stop):
    """A server, and whoever listens on the wire, in BOB's namespace."""
    own = _enter(address)
    with (
        socket.create_server((own, 8080)) as server,
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as wire,
    ):
        os.write(out, own.encode())
        heard = False
        while not os.path.exists(stop):
            heard |= _everything(wire, 0.2)
        server.setblocking(False)
        try:
            server.accept()[0].close()
        except BlockingIOError:
            return [False, heard]
        return [True, heard]


def _frame(to, kind, body):
    return (to + FORGED + struct.pack("!H", kind) + body).ljust(60, b"\0")


def _arp(sender, target):
    """Says to all that `sender` is at the forged address."""
    body = struct.pack("!HHBBH", 1, 0x800, 6, 4, 1) + FORGED + socket.inet_aton(sender)
    return _frame(b"\xff" * 6, 0x806, body + bytes(6) + socket.inet_aton(target))


def _attack(address, victim):
    """As root of the other namespace: what is forged there, and whether the victim's server answers."""
    own = _enter(address)
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as wire:
        wire.bind(("eth0", 0))
        for _ in range(20):
            for frame in (_arp(victim, "10.88.0.1"), _arp(victim, victim), _frame(b"\xff" * 6, 0x800, FORGED * 8)):
                wire.send(frame)
            time.sleep(0.01)
    with socket.socket(socket.AF_INET) as sock:
        sock.settimeout(2)
        return [own, sock.connect_ex((victim, 8080)) == 0]


def test_it_reaches_no_neighbour_and_the_bridge_believes_nothing_of_it(machine):
    with running(POLICY.replace("BRIDGE", "br0")) as broker:
        reading, writing = os.pipe()
        stop = f"{broker.folder}/stop"
        child = os.fork()
        if child == 0:
            code = 1
            with contextlib.suppress(BaseException):
                code = 0 if as_user(BOB, [], _victim, broker.socket, writing, stop) == [False, False] else 2
            os._exit(code)
        try:
            victim = os.read(reading, 100).decode()
            own, reached = as_user(ALICE, [], _attack, broker.socket, victim)
            assert own != victim
            assert not reached
            learned = subprocess.run(
                ["bridge", "-j", "fdb", "show", "br", "br0"], capture_output=True, check=True
            ).stdout
            assert FORGED.hex(":") not in {one["mac"] for one in json.loads(learned)}
        finally:
            open(stop, "w").close()
            status = os.waitpid(child, 0)[1]
            os.close(reading)
            os.close(writing)
        assert os.waitstatus_to_exitcode(status) == 0


def _ask(address):
    with Raw(address) as client:
        return outcome(client.ask(NEW))


def test_a_bridge_that_is_none_is_refused(machine):
    for bridge in ("lo", "none"):
        with running(POLICY.replace("BRIDGE", bridge)) as broker:
            assert as_user(ALICE, [], _ask, broker.socket) == "NotWhatItWas"
