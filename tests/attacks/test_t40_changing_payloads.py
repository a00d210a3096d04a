"""T40: a large payload changes while it is read."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os

import pytest
from harness import ALICE, as_user, folder, running
from messaging import NOT_SEALED, half_sealed, raw_send, sealed, subscribed, unsealed

from fdbroker.kernel.sealed import sealed_memfd

POLICY = """
version: 1
topics: {inbox: {}}
everyone: {send: ["*"], subscribe: ["*"]}
"""
WRITE_SEALS = {"shrink": fcntl.F_SEAL_SHRINK, "grow": fcntl.F_SEAL_GROW, "write": fcntl.F_SEAL_WRITE}
LARGE = {"topic": "inbox", "fileDescriptor": 0}


@pytest.fixture
def broker(dev):
    with running(POLICY) as made:
        yield made
        made.wait_idle()


def _without(name):
    """A memfd with all these seals but one."""
    number = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.write(number, b"text")
    seals = sum(bit for other, bit in WRITE_SEALS.items() if other != name)
    fcntl.fcntl(number, fcntl.F_ADD_SEALS, seals)
    return [number]


def _file():
    with folder() as where, open(where / "file", "wb+") as file:
        file.write(b"text")
        file.flush()
        return [os.dup(file.fileno())]


def _pipe():
    reading, writing = os.pipe()
    os.write(writing, b"text")
    os.close(writing)
    return [reading]


NOT_FIXED = {
    "no seal": unsealed,
    "sealed against writing later": half_sealed,  # what is mapped already may still be written
    **{f"no seal {name}": lambda name=name: _without(name) for name in WRITE_SEALS},
    "a pipe": _pipe,
    "a device": lambda: [os.open("/dev/zero", os.O_RDONLY)],
    "a folder": lambda: [os.open("/", os.O_RDONLY)],
    "a name": lambda: [os.open("/dev/zero", os.O_PATH)],
}


def test_nothing_that_its_sender_can_still_change_passes(broker):
    def send_all(address):
        return [raw_send(address, LARGE, make) for make in NOT_FIXED.values()]

    found = as_user(ALICE, [], send_all, broker.socket)
    assert found == [["DescriptorsRefused", NOT_SEALED]] * len(NOT_FIXED)
    assert raw_send(broker.socket, LARGE, _file) == ["DescriptorsRefused", NOT_SEALED]
    assert as_user(ALICE, [], raw_send, broker.socket, LARGE, sealed) == ["granted", {}]


def _change(number):
    """What a sender may try with its own copy, once it is sent; the names of what worked."""
    worked = []

    def attempt(name, action):
        with contextlib.suppress(OSError):
            action()
            worked.append(name)

    attempt("write", lambda: os.pwrite(number, b"evil", 0))
    attempt("truncate", lambda: os.ftruncate(number, 1))
    attempt("grow", lambda: os.ftruncate(number, 100))
    attempt("map", lambda: mmap.mmap(number, 4, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE).close())
    attempt("punch", lambda: os.posix_fallocate(number, 0, 100))
    attempt("again", lambda: os.close(os.open(f"/proc/self/fd/{number}", os.O_RDWR | os.O_TRUNC)))
    attempt("unseal", lambda: fcntl.fcntl(number, fcntl.F_ADD_SEALS, 0))
    return worked


def test_what_passed_is_the_same_for_every_reader_whatever_its_sender_does(broker):
    def send_and_change(address):
        number = sealed_memfd("x", b"the text")
        assert raw_send(address, LARGE, lambda: [os.dup(number)]) == ["granted", {}]
        worked = _change(number)
        os.close(number)
        return worked

    with subscribed(broker, "inbox") as first, subscribed(broker, "inbox") as second:
        assert as_user(ALICE, [], send_and_change, broker.socket) == []
        with next(first) as one, next(second) as other:
            assert _change(one.file.fileno()) == []  # nor can a reader, for the next one
            assert (one.read(), other.read()) == (b"the text", b"the text")


def test_a_writable_mapping_from_before_the_seals_is_none(root):
    """The kernel does not seal what is mapped so: that is why the seal WRITE is enough."""
    number = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.write(number, b"text")
    with mmap.mmap(number, 4, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE), pytest.raises(OSError, match="busy"):
        fcntl.fcntl(number, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    os.close(number)
