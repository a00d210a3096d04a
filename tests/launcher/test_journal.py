"""The journal's socket: one for all processes, connected again when the journal has another one."""

from __future__ import annotations

import os
import socket

import pytest

from fdbroker.launcher.journal import Journal
from fdbroker.limits import launcher as limits


class Place:
    """A journal that comes and goes at an address."""

    def __init__(self, address):
        self.address = address

    def comes(self):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(self.address)

    def goes(self):
        self.sock.close()
        os.unlink(self.address)


@pytest.fixture
def place(tmp_path):
    made = Place(str(tmp_path / "socket"))
    made.comes()
    yield made
    made.sock.close()


def test_a_journal_that_comes_back_is_written_to_by_who_was_connected(place):
    journal = Journal(place.address)
    assert journal.connect()
    with socket.socket(fileno=os.dup(journal.sock.fileno())) as child:  # as a process that inherited it
        child.send(b"a")
        journal.look()
        child.send(b"b")
        assert [place.sock.recv(10) for _ in range(2)] == [b"a", b"b"]
        place.goes()
        journal.look()
        with pytest.raises(ConnectionRefusedError):
            child.send(b"c")
        place.comes()
        with pytest.raises(OSError, match="not connected"):
            child.send(b"d")
        journal.look()
        child.send(b"e")
        assert place.sock.recv(10) == b"e"
    journal.close()


def test_without_a_journal_there_is_nothing_to_look_at(place):
    place.goes()
    journal = Journal(place.address)
    assert not journal.connect()
    journal.look()
    assert journal.sock is None
    journal.close()


@pytest.mark.parametrize("kind", ["file", "null", "null by hand", "null and a journal"])
def test_without_a_journal_and_a_standard_error_there_is_no_place_for_records(place, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(limits, "START_SECONDS", 0)
    if kind != "null and a journal":
        place.goes()
    if kind == "null by hand":
        monkeypatch.delenv("INVOCATION_ID", raising=False)
    else:
        monkeypatch.setenv("INVOCATION_ID", "0" * 32)
    before = os.dup(2)
    other = os.open(tmp_path / "log" if kind == "file" else os.devnull, os.O_RDWR | os.O_CREAT)
    os.dup2(other, 2)
    journal = Journal(place.address)
    try:
        found = journal.await_place()
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(other)
        journal.close()
    assert found is (kind != "null")
