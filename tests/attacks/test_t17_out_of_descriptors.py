"""T17: running out of descriptors at accept ends or spins the service."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import socket
import threading
import time

import harness
import pytest
from harness import EVERYONE_NULL, RATES, Raw, ask, outcome, running

from fdbroker.limits import every as limits
from fdbroker.opener.accept import Acceptor, OutOfDescriptors
from fdbroker.opener.close import Closing


def _cpu_s(pid):
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def test_accepting_pauses_nothing_spins_and_service_comes_back(dev):
    maximum = limits.DESCRIPTORS_RESERVED + 30
    with running(EVERYONE_NULL + "limits: {connections: 20000}\n", descriptors=maximum) as broker:
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(Raw(broker.socket)) for _ in range(60)]
            outcomes = [outcome(client.open("/dev/null")) for client in clients[:30]]
            assert outcomes == ["granted"] * 30
            broker.wait_for("no descriptors left")
            assert outcome(clients[30].reply()) == "QuotaExceeded"
            before = {name: _cpu_s(pid) for name, pid in broker.pids.items()}
            time.sleep(1)
            for name, pid in broker.pids.items():
                assert _cpu_s(pid) - before[name] < 0.5, name
            assert outcome(clients[0].open("/dev/null")) == "granted"
        deadline = time.monotonic() + 20
        while ask(broker.socket, "/dev/null") != "granted":
            assert time.monotonic() < deadline
            time.sleep(0.1)
        broker.wait_idle()


def test_at_emfile_the_reserve_says_the_refusal():
    """EMFILE as the kernel says it."""

    def starve(path):
        with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
            listener.bind(path)
            listener.listen()
            listener.setblocking(False)
            acceptor = Acceptor(listener, Closing())
            client.settimeout(3)
            client.connect(path)
            soft = max(map(int, os.listdir("/proc/self/fd"))) + 1
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, soft))
            held = []
            with contextlib.suppress(OSError):
                while True:
                    held.append(os.dup(0))
            refused = 0
            try:
                acceptor.accept()
            except OutOfDescriptors:
                refused += 1
            text = client.recv(1000).decode()
            for number in held:
                os.close(number)
            return [refused, text, acceptor.accept() is None]

    with harness.folder() as where:
        refused, text, nobody_waits = harness.as_user(os.getuid(), [], starve, str(where / "s"), gid=os.getgid())
    assert refused == 1
    assert "QuotaExceeded" in text
    assert '"descriptors"' in text
    assert nobody_waits


class Lacking(socket.socket):
    """A listening socket that lacks something once."""

    lacks = 0

    def accept(self):
        if self.lacks:
            number, self.lacks = self.lacks, 0
            raise OSError(number, os.strerror(number))
        return super().accept()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
def test_whatever_accept_lacks_one_client_is_told_and_the_next_is_served(number):
    """ENFILE, all descriptors of the machine, is said by the test, for nobody else should have to do without them."""
    with Lacking(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind("")
        listener.listen()
        listener.setblocking(False)
        acceptor = Acceptor(listener, Closing())
        try:
            first.settimeout(10)
            first.connect(listener.getsockname())
            listener.lacks = number
            with pytest.raises(OutOfDescriptors):
                acceptor.accept()
            assert b'"limit":"descriptors"' in first.recv(1000)
            assert first.recv(1) == b""
            with socket.socket(socket.AF_UNIX) as second:
                second.connect(listener.getsockname())
                accepted = acceptor.accept()
                assert accepted is not None
                accepted.close()
            assert acceptor.accept() is None
            listener.lacks = errno.EINVAL  # a fault of ours is no lack
            with pytest.raises(OSError, match="Invalid argument"):
                acceptor.accept()
        finally:
            acceptor.close()


def test_the_refusal_is_said(dev):
    with running(EVERYONE_NULL + "limits: {connections: 3}\n") as broker, contextlib.ExitStack() as stack:
        held = [stack.enter_context(Raw(broker.socket)) for _ in range(3)]
        assert [outcome(client.open("/dev/null")) for client in held] == ["granted"] * 3
        with Raw(broker.socket) as refused:
            reply = refused.open("/dev/null")
            assert outcome(reply) == "QuotaExceeded"
            assert reply["parameters"] == {"limit": "connections", "maximum": 3}
            assert refused.reply() is None
        held[0].close()
        time.sleep(0.2)
        assert ask(broker.socket, "/dev/null") == "granted"


def test_a_limit_that_leaves_none_for_clients_is_said_at_the_start(root):
    with harness.folder() as where:
        broker = harness.Broker(where, EVERYONE_NULL, descriptors=limits.DESCRIPTORS_RESERVED)
        assert broker.process.wait(60) == 70
        assert "leave none for clients" in broker.text()


def test_a_connect_storm_is_served_whole(dev):
    with (
        running(EVERYONE_NULL + f"limits: {{connections: 5000, {RATES}}}\n") as broker,
        contextlib.ExitStack() as stack,
    ):
        clients = [stack.enter_context(Raw(broker.socket)) for _ in range(1500)]
        assert {outcome(client.open("/dev/null")) for client in clients} == {"granted"}
        for client in clients:
            client.close()
        broker.wait_idle()


def test_while_the_inbox_stands_still_clients_wait_and_are_served_afterwards(dev):
    with (
        running(EVERYONE_NULL + "limits: {connections: 5000, burst: 5000}\n") as broker,
        contextlib.ExitStack() as stack,
    ):
        os.kill(broker.pids["inbox"], signal.SIGSTOP)
        clients = []

        def connect():
            for _ in range(600):
                clients.append(stack.enter_context(Raw(broker.socket)))
                clients[-1].send_call("io.fdbroker.Broker.Open", {"resources": [{"device": "/dev/null"}]})

        connecting = threading.Thread(target=connect)  # waits when the link of the inbox and the backlog are full
        connecting.start()
        while len(clients) < 100:
            time.sleep(0.01)
        before = _cpu_s(broker.pids["opener"])
        time.sleep(1)
        assert _cpu_s(broker.pids["opener"]) - before < 0.5
        os.kill(broker.pids["inbox"], signal.SIGCONT)
        connecting.join()
        assert {outcome(client.reply()) for client in clients} <= {"granted", "QuotaExceeded"}
        assert outcome(clients[0].open("/dev/null")) == "granted"
