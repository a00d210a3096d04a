"""The launcher and children that take their time to end: a stop is a stop, and a process that hangs is a fault."""

from __future__ import annotations

import socket
import subprocess
import sys
import time

import pytest

from fdbroker import limits
from fdbroker.kernel.link import Link
from fdbroker.launcher import service, start
from fdbroker.launcher.ends import main_thread_ended
from fdbroker.policy import names

# the main thread ends when the launcher speaks or goes; another one ends that many seconds later, as one would that
# waits in the kernel, and holds the link's end until then
CHILD = """
import ctypes, os, socket, sys, threading, time
link = socket.socket(fileno=int(sys.argv[1]))
if sys.argv[3] == "told":
    link.recv(100)
threading.Thread(target=lambda: (time.sleep(float(sys.argv[2])), os._exit(0))).start()
ctypes.CDLL(None).pthread_exit(None)
"""
NAMES = ("opener", "inbox")


@pytest.fixture
def launcher(monkeypatch):
    """One that never confined itself; `launcher.start(when, seconds)` gives it children."""
    monkeypatch.setattr(service, "_LOOK_S", 0.2)
    made = service.Launcher(service.Options("policy", "/none", 0o600, None, "/none"))
    made._databases = names.databases()

    def begin(when, seconds):
        for name in NAMES:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                words = [sys.executable, "-c", CHILD, str(theirs.fileno()), str(seconds), when]
                process = subprocess.Popen(words, pass_fds=[theirs.fileno()])
            child = start.Child(name, process, Link(ours), ())
            made._children.append(child)
            made._epoll.register(child.link.fileno())

    made.begin = begin
    yield made
    for child in made._children:
        child.link.close()
        child.process.kill()
        child.process.wait()
    made._notify.close()
    made._epoll.close()
    for number in (made._wake_read, made._wake_write):
        service.os.close(number)


def _until_half_ended(launcher):
    end = time.monotonic() + 60
    while not all(main_thread_ended(child.process.pid) for child in launcher._children):
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("when", ["told", "at once"])
def test_a_child_that_ends_slowly_while_the_service_stops_is_no_fault(launcher, when):
    launcher.begin(when, 1.0)
    launcher._stop()
    for child in launcher._children[1:]:
        child.link.send(b"stop")
    _until_half_ended(launcher)
    began_s = time.monotonic()
    launcher._loop()
    assert time.monotonic() - began_s < limits.STOP_SECONDS
    assert [child.process.poll() for child in launcher._children] == [0, 0]


def test_a_stop_ends_in_time_also_if_a_child_does_not_end(launcher):
    launcher.begin("told", 1000)
    launcher._stop()
    began_s = time.monotonic()
    launcher._loop()
    assert limits.STOP_SECONDS - 1 < time.monotonic() - began_s < limits.STOP_SECONDS + 2  # of a machine with load


def test_a_child_that_stays_without_its_main_thread_ends_the_service(launcher):
    launcher.begin("at once", 1000)
    _until_half_ended(launcher)
    with pytest.raises(service.ServiceFailed, match="has ended, but for a thread that waits in the kernel"):
        launcher._loop()


def test_a_child_that_is_only_on_its_way_out_at_one_look_is_not_said_to_hang(launcher):
    launcher.begin("at once", 1000)
    _until_half_ended(launcher)
    launcher._look()
    launcher._children[0].process.kill()
    launcher._children[0].process.wait()
    with pytest.raises(service.ServiceFailed, match="the inbox has ended, but for a thread"):
        launcher._look()
