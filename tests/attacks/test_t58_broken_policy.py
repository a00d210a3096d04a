"""T58: clients that wait while the policy is broken start the service until its socket is taken away."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from unittest import mock

import pytest
from floods import FIRST
from harness import ALICE, BOB, EVERYONE_NULL, PATIENCE_S, as_user, ask, folder
from lingering import Lingering
from subordinate import being

from fdbroker.kernel.jobs import Jobs
from fdbroker.limits import every as limits
from fdbroker.refuser.__main__ import refuse_all
from fdbroker.wire import frame

BROKEN = "version: 1\nbroken: here\n"
# As the service manager does it: descriptor 3 listens, and this very process is meant.
ACTIVATED = """
import os, sys
os.environ["LISTEN_FDS"], os.environ["LISTEN_PID"] = "1", str(os.getpid())
os.execv(sys.executable, [sys.executable, "-I", "-W", "error", "-m", "fdbroker", "serve", "--policy", sys.argv[1]])
"""
LOOK_S = limits.BROKEN_LOOK_SECONDS


class Activated:
    """A listening socket, and a service that is started by it with a policy."""

    def __init__(self, where):
        self.policy = where / "policy.yaml"
        self.log = where / "log"
        self.address = str(where / "socket")
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.address)
        os.chmod(self.address, 0o666)
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.listener.listen(100)
        self.process = None

    def start(self, policy):
        self.policy.write_text(policy)
        listener = self.listener.fileno()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", ACTIVATED, str(self.policy)],
                preexec_fn=lambda: os.dup2(listener, 3),
                pass_fds=(3,),
                stdin=subprocess.DEVNULL,
                stderr=log,
                cwd="/",
            )

    def text(self):
        return self.log.read_text()


@pytest.fixture
def activated(dev):
    with folder() as where:
        made = Activated(where)
        yield made
        if made.process is not None:
            made.process.kill()
            made.process.wait()
        made.listener.close()


def _refused(address):
    """What a client hears that has asked nothing yet."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(address)
        return sock.recv(1000).decode() + sock.recv(1).decode()


def test_every_client_is_told_and_a_mended_policy_serves_the_next(activated):
    """It looks at the files before it refuses, at most once in BROKEN_LOOK_SECONDS."""
    waiting = [socket.socket(socket.AF_UNIX) for _ in range(3)]
    for sock in waiting:
        sock.settimeout(20)
        sock.connect(activated.address)
    waiting[1].sendall(frame.encode_frame(frame.PING))
    activated.start(BROKEN)
    for sock in waiting:
        assert b'"io.fdbroker.Broker.PolicyBroken"' in sock.recv(1000)
        with contextlib.suppress(ConnectionResetError):  # what it sent was not read
            assert sock.recv(1) == b""
        sock.close()
    assert "unknown key 'broken'" in activated.text()
    for _ in range(30):
        assert "PolicyBroken" in as_user(ALICE, [], _refused, activated.address)
    activated.policy.write_text(EVERYONE_NULL)
    time.sleep(LOOK_S)
    assert as_user(ALICE, [], ask, activated.address, "/dev/null") == "granted"
    assert activated.process.poll() is None
    activated.process.terminate()
    assert activated.process.wait(PATIENCE_S) == 0
    assert "Traceback" not in activated.text()


def test_it_ends_a_while_after_the_last_client(activated):
    """BROKEN_SECONDS, with what is wrong as the exit code says; and not while clients come."""
    activated.start(BROKEN)
    end_s = time.monotonic() + limits.BROKEN_SECONDS * 1.3
    while time.monotonic() < end_s:
        assert "PolicyBroken" in _refused(activated.address)
        time.sleep(0.2)
    assert activated.process.poll() is None
    last_s = time.monotonic()
    assert activated.process.wait(limits.BROKEN_SECONDS * 2) == 78
    assert time.monotonic() - last_s >= limits.BROKEN_SECONDS - LOOK_S
    assert activated.text().count("unknown key 'broken'") == 2  # at the start and at the end, not for each client


def test_a_reload_meanwhile_looks_at_the_files_and_nobody_has_to_ask(activated):
    """By SIGHUP: what is still wrong is said, also when it was said before; a mended policy is served."""

    def reload_until(text, count):
        end_s = time.monotonic() + PATIENCE_S
        while activated.text().count(text) < count:
            assert time.monotonic() < end_s, activated.text()
            assert activated.process.poll() is None, activated.text()
            # more often than BROKEN_SECONDS: then it would look of itself
            activated.process.send_signal(signal.SIGHUP)
            time.sleep(1)

    activated.start(BROKEN)
    assert "PolicyBroken" in _refused(activated.address)
    reload_until("unknown key 'broken'", 2)
    activated.policy.write_text(BROKEN.replace("broken", "other"))
    reload_until("unknown key 'other'", 1)
    assert "PolicyBroken" in _refused(activated.address)
    activated.policy.write_text(EVERYONE_NULL)
    reload_until("serving with", 1)
    assert as_user(ALICE, [], ask, activated.address, "/dev/null") == "granted"
    activated.process.terminate()
    assert activated.process.wait(PATIENCE_S) == 0
    assert "Traceback" not in activated.text()


def test_it_can_be_stopped_meanwhile(activated):
    activated.start(BROKEN)
    assert "PolicyBroken" in _refused(activated.address)
    activated.process.send_signal(signal.SIGTERM)
    assert activated.process.wait(PATIENCE_S) == 0


def test_what_refuses_everybody_holds_no_right(activated):
    activated.start(BROKEN)
    assert "PolicyBroken" in _refused(activated.address)
    pid = activated.process.pid
    children = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
    assert len(children) == 1, activated.text()
    (child,) = children
    with open(f"/proc/{child}/status") as file:
        status = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
    assert status["CapPrm"] == status["CapBnd"] == f"{0:016x}"
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert "0" not in status["Uid"].split("\t")


def test_a_policy_that_this_service_may_not_serve_is_the_same(activated):
    """Without the capability that it needs, the service cannot run either, and would be started again and again."""
    activated.start("version: 1\neveryone: {namespaces: [{type: net, create: true}]}\n")
    time.sleep(0.5)
    activated.process.kill()
    activated.process.wait()
    wrapped = ACTIVATED.replace(
        "os.execv(sys.executable, [sys.executable,",
        'os.execvp("setpriv", ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", sys.executable,',
    )
    with activated.log.open("ab") as log:
        listener = activated.listener.fileno()
        activated.process = subprocess.Popen(
            [sys.executable, "-c", wrapped, str(activated.policy)],
            preexec_fn=lambda: os.dup2(listener, 3),
            pass_fds=(3,),
            stdin=subprocess.DEVNULL,
            stderr=log,
        )
    assert "PolicyBroken" in _refused(activated.address)
    assert "CAP_SYS_ADMIN" in activated.text()
    assert "namespaces.conf" in activated.text()


@pytest.mark.parametrize(
    ("data", "flags"), [(frame.encode_frame(frame.PING), 0), (b"x", socket.MSG_OOB)], ids=["plain", "urgent"]
)
def test_what_a_client_sent_that_is_slow_to_close_holds_up_nobody_else(activated, data, flags):
    """It came before the client was accepted; a mended policy is served while it is still being closed."""
    with socket.socket(socket.AF_UNIX) as sock, contextlib.ExitStack() as stack:
        sock.settimeout(60)
        sock.connect(activated.address)
        for other in Lingering(600).give(sock, data, flags):
            stack.enter_context(other)
        activated.start(BROKEN)
        assert b"PolicyBroken" in sock.recv(1000)
        assert "PolicyBroken" in as_user(ALICE, [], _refused, activated.address)
        activated.policy.write_text(EVERYONE_NULL)
        time.sleep(LOOK_S)
        assert as_user(ALICE, [], ask, activated.address, "/dev/null") == "granted"
        activated.process.terminate()
        assert activated.process.wait(PATIENCE_S) == 0


def test_a_policy_that_was_mended_after_the_last_client_is_served(activated):
    """Nobody comes any more until the service would end: it looks once more."""
    activated.start(BROKEN)
    assert "PolicyBroken" in _refused(activated.address)
    activated.policy.write_text(EVERYONE_NULL)
    time.sleep(limits.BROKEN_SECONDS + 2)
    assert activated.process.poll() is None
    assert as_user(ALICE, [], ask, activated.address, "/dev/null") == "granted"


def test_many_are_refused_and_some_at_a_time():
    """REFUSED_AT_ONCE: in between, the launcher is heard. Who has sent nothing needs no thread to be let go."""
    closing = Jobs(1)
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as stack:
        listener.bind("")
        listener.listen(200)
        listener.setblocking(False)
        clients = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(limits.REFUSED_AT_ONCE + 5)]
        for sock in clients:
            sock.connect(listener.getsockname())
            sock.setblocking(False)
        with mock.patch.object(closing, "put") as put:
            refuse_all(listener, closing)
            heard = [_heard(sock) for sock in clients]
            assert heard == [True] * limits.REFUSED_AT_ONCE + [False] * 5
            refuse_all(listener, closing)
            assert [_heard(sock) for sock in clients[-5:]] == [True] * 5
        assert put.call_args_list == []


def test_all_subordinate_uids_are_one_owner_of_what_is_slow_to_close():
    """Nobody knows whose they are without a policy: one user's had, each of them, a quarter of the stuck threads."""
    closing, uids = Jobs(1), [FIRST + number for number in range(8)]
    with folder() as where, socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as stack:
        listener.bind(f"{where}/socket")
        os.chmod(f"{where}/socket", 0o666)
        listener.listen(20)
        listener.setblocking(False)
        for uid in (ALICE, *uids, ALICE, BOB):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            with being(uid):
                sock.connect(f"{where}/socket")
            sock.sendall(b"x")
        with mock.patch.object(closing, "put", side_effect=lambda _, close: close()) as put:
            refuse_all(listener, closing)
        first, *others, last, another = [called.args[0] for called in put.call_args_list]
        assert (first, last, another, len(others)) == (ALICE, ALICE, BOB, len(uids))
        assert len({*others}) == 1
        assert not {*others} & {ALICE, BOB}


def _heard(sock):
    try:
        return b"PolicyBroken" in sock.recv(1000)
    except BlockingIOError:
        return False
