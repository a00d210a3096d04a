"""T45: something is granted of which there is no record: the journal is full, or gone."""

from __future__ import annotations

import os
import socket
import time

import harness
import pytest
from harness import running

GIVES = "version: 1\neveryone: {devices: [{path: /dev/null, access: rw}]}\n"
JOURNAL = "/run/systemd/journal/socket"


@pytest.fixture
def run_folder():
    """An empty /run, in which a journal can come and go."""
    harness.mount("run", "/run", "tmpfs", 0, "mode=0755")
    try:
        os.makedirs(os.path.dirname(JOURNAL))
        yield
    finally:
        harness.unmount("/run")


def journal():
    """A journal in its place, where anybody may write."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.settimeout(30)
    sock.bind(JOURNAL)
    os.chmod(JOURNAL, 0o666)
    return sock


def test_what_the_journal_does_not_take_is_not_granted_and_one_with_a_new_socket_is_found(dev, run_folder):
    first = journal()
    with running(GIVES) as broker, harness.Raw(broker.socket) as client:
        assert "error" not in client.open("/dev/null")
        os.close(client.take())
        assert b"granted ro /dev/null" in first.recv(65536)
        # it is there, and reads nothing
        count = 0
        while "error" not in (reply := client.open("/dev/null")):
            os.close(client.take())
            count += 1
            assert count < 100_000
        assert reply["error"] == "io.fdbroker.Broker.RateLimited"
        first.setblocking(False)
        kept = 0
        with pytest.raises(BlockingIOError):
            while True:
                kept += b"granted" in first.recv(65536)
        assert kept == count
        first.close()
        for _ in range(3):
            assert client.open("/dev/null")["error"] == "io.fdbroker.Broker.RateLimited"
        os.unlink(JOURNAL)
        with journal() as second:
            end_s = time.monotonic() + 30
            while "error" in client.open("/dev/null"):
                assert time.monotonic() < end_s
                time.sleep(0.2)
            os.close(client.take())
            assert b"granted ro /dev/null" in second.recv(65536)
        assert client.descriptors == []
