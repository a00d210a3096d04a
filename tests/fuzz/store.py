"""The file of stored messages, damaged anywhere: it opens and then works, or is set aside, or is refused; nothing else.

An input is a list of changes to a file with messages in it: where (two bytes), how many bytes follow (one), these.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
from collections.abc import Iterator
from functools import cache

from fdbroker.errors import QueueFull
from fdbroker.inbox.store import NotStored, Store, Stored, opened
from fdbroker.limits import every as limits

WORDS = (
    b"CREATE TABLE",
    b"INTEGER",
    b"STRICT",
    b"messages",
    b"waiting",
    b"data BLOB",
    b"\x05\0\0\0",
    b"\x0d\0\0\0",
    b"\x0a\0\0\0",
)
_QUICK = "/dev/shm"  # a file system in memory: each input is a file, and is synchronized
_NAME = "messages.sqlite"
_FAR_US = 1 << 60
_TOPICS = frozenset({"news"})


@cache
def whole() -> bytes:
    """A file with three messages of two senders for three users."""
    with tempfile.TemporaryDirectory() as folder:
        store, _ = opened(folder)
        for number, sender in ((1, 9), (2, 9), (3, 8)):
            store.put(Stored(number, sender, "news", _FAR_US, b'{"payload":"%d"}' % number), frozenset({5, 6, 7}))
        store.commit()
        store.acknowledge(5, _TOPICS, [1])
        store.commit()
        store.close()
        with open(os.path.join(folder, _NAME), "rb") as file:
            return file.read()


def seeds() -> Iterator[bytes]:
    data = whole()
    yield b""
    for needle, becomes in (
        (b"SQLite", b"SQLate"),
        (b"STRICT", b"      "),
        (b"payload", b"\xff\xff\xff"),
        (b"news", b"mail"),
    ):
        at = data.rindex(needle)
        yield at.to_bytes(2, "big") + bytes([len(becomes)]) + becomes
    yield (18).to_bytes(2, "big") + b"\2\xff\1"  # a format that may only be read
    yield (60).to_bytes(2, "big") + b"\4\0\0\0\2"  # user_version


def damaged(data: bytes) -> bytes:
    file = bytearray(whole())
    while len(data) > 3:
        at, size, data = int.from_bytes(data[:2], "big") % len(file), data[2], data[3:]
        change, data = data[:size][: len(file) - at], data[size:]
        file[at : at + len(change)] = change
    return bytes(file)


def target(data: bytes) -> None:
    with tempfile.TemporaryDirectory(dir=_QUICK if os.path.isdir(_QUICK) else None) as folder:
        with open(os.path.join(folder, _NAME), "wb") as file:
            file.write(damaged(data))
        try:
            store, said = opened(folder)
        except sqlite3.OperationalError as error:
            if "another version" not in str(error):  # what a newer broker wrote is its own
                raise
            return
        try:
            if said:  # what was there is kept beside it
                assert any(".damaged-" in name for name in os.listdir(folder))
                assert not store._used
            use(store)
        finally:
            store.close()


def use(store: Store) -> None:
    """As the inbox does: each call does what it says, or raises what it says."""
    last = store.last_number
    assert 0 <= last < 1 << 63
    for uid in (5, 6, 7):
        for number, message in store.waiting(uid, _TOPICS, 0, 10):
            assert type(number) is int
            assert isinstance(message, bytes)
    number = min(last + 1, (1 << 63) - 1)
    try:
        store.check(9, 10, 1000, 1 << 30)
        store.put(Stored(number, 9, "news", _FAR_US, b"{}"), frozenset({5}))
        store.commit()
    except (QueueFull, NotStored):
        return
    assert (number, b"{}") in store.waiting(5, _TOPICS, number - 1, limits.RECEIVED_MESSAGES)
    try:
        store.acknowledge(5, _TOPICS, [number])
        store.commit()
    except NotStored:
        return
    assert not store.waiting(5, _TOPICS, number - 1, 10)
