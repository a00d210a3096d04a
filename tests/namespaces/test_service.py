"""The worker's children: whatever happens to them, nothing of theirs stays."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import time

import pytest

from fdbroker.kernel.link import Link
from fdbroker.namespaces import service
from fdbroker.namespaces.service import Worker
from fdbroker.refusals import OpenFailed
from fdbroker.terms import Namespace
from fdbroker.wire import worker


@pytest.mark.parametrize("end", ["time", "killed", "stop"])
def test_what_a_child_has_started_ends_with_it(monkeypatch, end):
    """Abroad the kernel clears the signal of a parent's death: a child's own child, stopped there, stayed for good."""
    reading, writing = os.pipe()

    def answers_never(*_):
        child = os.fork()
        if child == 0:
            signal.pause()
        os.write(writing, b"%d %d" % (os.getpid(), child))
        signal.pause()

    monkeypatch.setattr(service, "answer", answers_never)
    monkeypatch.setattr(service, "_CHILD_S", 60.0 if end == "stop" else 1.0)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = os.fork()
    if process == 0:
        ours.close()
        Worker(Link(theirs), frozenset()).serve()
        os._exit(0)
    theirs.close()
    opener = Link(ours)
    opener.send(worker.TO_WORKER.encode(worker.Ask(1, 5, 5, (worker.Wanted(Namespace("net")),))))
    child, grandchild = map(int, os.read(reading, 100).split())
    os.kill(grandchild, signal.SIGSTOP)
    pidfd = os.pidfd_open(grandchild)
    try:
        if end == "killed":
            os.kill(child, signal.SIGKILL)
        if end == "stop":
            opener.close()
        else:
            data = ours.recv(1000)
            failed = worker.FROM_WORKER.decode(data)
            assert isinstance(failed.refusal, OpenFailed)
            assert failed.refusal.number in (errno.ETIMEDOUT, errno.EIO)  # its own child holds the link, too
        limit = time.monotonic() + 5
        while not _is_over(pidfd):
            assert time.monotonic() < limit, "it is still there"
            time.sleep(0.02)
    finally:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        for number in (pidfd, reading, writing):
            os.close(number)
        opener.close()


def _is_over(pidfd):
    try:
        signal.pidfd_send_signal(pidfd, 0)
    except ProcessLookupError:
        return True
    with open(f"/proc/self/fdinfo/{pidfd}") as file:
        return any(line.split() == ["Pid:", "-1"] for line in file)
