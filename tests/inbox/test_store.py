"""The stored queue on a real file: what a commit keeps, whose quota counts, and what a damaged file costs."""

from __future__ import annotations

import sqlite3
import time

import pytest
from harness import MS_BIND, mount, need_root, unmount

from fdbroker.errors import QueueFull
from fdbroker.inbox import store as module
from fdbroker.inbox.store import NotStored, Stored, opened
from fdbroker.limits import every as limits

MS_RDONLY, MS_REMOUNT = 1, 32  # sys/mount.h

FAR_US = 1 << 60
ALL = frozenset({"news", "mail"})


@pytest.fixture
def folder(tmp_path):
    return str(tmp_path)


@pytest.fixture
def store(folder):
    made, said = opened(folder)
    assert said == ""
    yield made
    made.close()


def put(store, number, recipients=(1,), sender=9, topic="news", expires_us=FAR_US, data=b"{}"):
    store.put(Stored(number, sender, topic, expires_us, data), frozenset(recipients))


def numbers(store, uid, topics=ALL, after=0, most=1000):
    return [number for number, _ in store.waiting(uid, topics, after, most)]


def test_what_is_committed_survives_and_what_is_not_does_not(folder):
    store, _ = opened(folder)
    put(store, 1, data=b'{"payload":"\\u0000"}')
    store.commit()
    put(store, 2)
    assert numbers(store, 1) == [1]  # nobody gets what may still be lost
    store.close()
    store, said = opened(folder)
    assert said == ""
    assert store.waiting(1, ALL, 0, 10) == [(1, b'{"payload":"\\u0000"}')]
    assert store.last_number == 1
    store.close()


def test_each_recipient_acknowledges_for_itself_and_the_last_one_removes_it(store):
    put(store, 1, (1, 2))
    put(store, 2, (2,))
    store.commit()
    store.acknowledge(1, ALL, [1, 2, 77, (1 << 63) - 1])  # 2 is not its own
    store.commit()
    assert (numbers(store, 1), numbers(store, 2)) == ([], [1, 2])
    store.acknowledge(2, ALL, [1, 2])
    store.commit()
    assert numbers(store, 2) == []
    assert store._database.execute("SELECT count(*) FROM messages").fetchone() == (0,)
    store.acknowledge(2, ALL, [1])
    store.commit()


def test_who_may_not_read_a_topic_acknowledges_nothing_of_it(store):
    """Another program of the same user, without the group or the label that the topic is for."""
    put(store, 1, topic="mail")
    put(store, 2, topic="news")
    store.commit()
    store.acknowledge(1, frozenset({"news"}), [1, 2])
    store.acknowledge(1, frozenset(), [1, 2])
    store.commit()
    assert numbers(store, 1) == [1]


def test_only_what_one_may_have_comes_in_order_as_much_as_fits(store):
    size = limits.RECEIVED_BYTES // 4
    for number in range(1, 7):
        put(store, number, topic="mail" if number == 2 else "news", data=b"x" * size)
    put(store, 7, data=b"x" * (limits.RECEIVED_BYTES + 1))
    store.commit()
    assert numbers(store, 1, {"news"}) == [1, 3, 4, 5]
    assert numbers(store, 1, {"news"}, after=5) == [6]
    assert numbers(store, 1, {"news"}, after=6) == [7]  # one always fits
    assert numbers(store, 1, most=2) == [1, 2]
    assert numbers(store, 1, most=0) == []
    assert numbers(store, 2) == []


def test_a_senders_share_is_its_own_and_comes_back(store):
    for number in (1, 2):
        store.check(9, 10, 2, 100)
        put(store, number, (1, 2), data=b"x" * 10)
    with pytest.raises(QueueFull, match="limit stored_messages is reached, maximum 2"):
        store.check(9, 10, 2, 100)
    store.check(8, 10, 2, 100)
    store.check(9, 80, 3, 100)
    with pytest.raises(QueueFull, match="limit stored_bytes is reached, maximum 100"):
        store.check(9, 81, 3, 100)
    store.commit()
    store.acknowledge(1, ALL, [1])
    store.commit()
    with pytest.raises(QueueFull):  # the other recipient still has not got it
        store.check(9, 10, 2, 100)
    store.acknowledge(2, ALL, [1])
    store.commit()
    store.check(9, 10, 2, 100)


def test_what_nobody_acknowledges_goes_when_its_time_is_over(store, monkeypatch):
    put(store, 1, expires_us=1000)
    put(store, 2, expires_us=FAR_US)
    store.commit()
    assert numbers(store, 1) == [2]
    monkeypatch.setattr(module.time, "monotonic", lambda: 1e9)
    store.check(9, 10, 2, 100)  # full with the one that is over
    store.expire()
    assert store._database.execute("SELECT number FROM messages").fetchall() == [(2,)]
    assert store._database.execute("SELECT number FROM waiting").fetchall() == [(2,)]


def test_what_is_over_of_others_is_not_removed_where_a_message_is_taken(store, monkeypatch):
    """Its sender paid for that work, and paused."""
    put(store, 1, expires_us=1000)
    store.commit()
    monkeypatch.setattr(module.time, "monotonic", lambda: 1e9)
    store.check(8, 1, 10, 100)
    assert store._database.execute("SELECT number FROM messages").fetchall() == [(1,)]
    store.expire()
    assert store._database.execute("SELECT number FROM messages").fetchall() == []


def test_what_is_over_of_a_sender_is_no_reason_to_refuse_it(store, monkeypatch):
    """Others' older ones were removed first: it was refused for 45 seconds."""
    for number in range(1, 301):
        put(store, number, expires_us=1000)
    put(store, 301, range(500), sender=8, expires_us=2000)
    put(store, 302, sender=8)
    store.commit()
    store.check(8, 1, 2, 10000)
    with pytest.raises(QueueFull):
        store.check(8, 1, 1, 10000)  # that one is not over


def test_a_full_disk_stores_none_of_a_commits_messages_and_the_next_one_may_pass(store):
    put(store, 1)
    store.commit()
    (pages,) = store._database.execute("PRAGMA page_count").fetchone()
    store._database.execute(f"PRAGMA max_page_count = {pages + 3}")
    put(store, 2, sender=8)
    put(store, 3, data=b"x" * 60_000)
    store.acknowledge(1, ALL, [1])
    with pytest.raises(NotStored, match="full"):
        store.commit()
    assert numbers(store, 1) == []  # what was acknowledged is
    assert store._used == {}
    put(store, 4)
    store.commit()
    assert numbers(store, 1) == [4]


def test_a_full_disk_while_the_expired_are_removed_keeps_the_count(store, monkeypatch):
    put(store, 1, expires_us=1000)
    store.commit()
    put(store, 2)
    monkeypatch.setattr(module.time, "monotonic", lambda: 1e9)

    def fail(*_):
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(store, "_remove", fail)
    store.expire()
    with pytest.raises(QueueFull):
        store.check(9, 1, 2, 100)
    assert store._used == {9: (2, 4)}
    monkeypatch.undo()
    store.commit()
    assert numbers(store, 1) == [2]


@pytest.mark.parametrize("where", ["header", "format", "page", "log", "index"])
def test_a_damaged_file_is_set_aside_and_said(folder, tmp_path, where):
    store, _ = opened(folder)
    for number in range(1, 500):
        put(store, number, (1, 2), data=b"x" * 300)
        if number == 250:
            store.commit()
            store._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    store.commit()
    path = tmp_path / "messages.sqlite"
    if where == "index":
        store._database.execute("PRAGMA writable_schema = ON")
        store._database.execute("DELETE FROM sqlite_schema WHERE name = 'waiting_by_number'")
        store._database.execute("PRAGMA writable_schema = OFF")
        store.close()
        data = bytearray(path.read_bytes())
    else:
        store._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        store.close()
        data = bytearray(path.read_bytes())
        # byte 18 is the format of who may write: by one that SQLite does not know the file may only be read
        first = {"header": 0, "format": 18, "page": 4096 * 3, "log": len(data) // 2}[where]
        becomes = b"\xaa\1" if where == "format" else b"\xaa" * 4096
        data[first : first + len(becomes)] = becomes
    path.write_bytes(data)
    store, said = opened(folder)
    try:
        aside = [name.name for name in tmp_path.iterdir() if "damaged" in name.name]
        assert len(aside) == 1
        assert f"kept as {folder}/{aside[0]}; the queues are empty now" in said
        assert (tmp_path / aside[0]).read_bytes() == data
        assert numbers(store, 1) == []
        put(store, 600)
        store.commit()
    finally:
        store.close()


@pytest.mark.parametrize(
    ("what", "becomes"),
    [
        ("TABLE messages", "T\xffBLE messages"),  # SQLite's word for it is no text then
        ("topic TEXT", "\xffopic TEXT"),
        ("topic TEXT", "tapic TEXT"),
        ("data BLOB", "data TEXT"),
        ("uid INTEGER", "gid INTEGER"),
    ],
)
def test_a_damaged_description_of_the_tables_is_noticed_at_the_start(folder, tmp_path, what, becomes):
    store, _ = opened(folder)
    put(store, 1)
    store.commit()
    store.close()
    path = tmp_path / "messages.sqlite"
    data, old, new = path.read_bytes(), what.encode(), becomes.encode("latin-1")
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))
    store, said = opened(folder)
    assert "the stored messages are damaged" in said
    assert numbers(store, 1) == []
    put(store, 2)
    store.commit()
    store.close()


@pytest.mark.parametrize(
    ("sequence", "said_or_last"), [("1", 7), ("'x'", 7), ("NULL", 7), ("1 << 62", ""), ("1e300", "")]
)
def test_a_damaged_sequence_never_gives_a_number_twice_nor_one_that_cannot_be_stored(folder, sequence, said_or_last):
    store, _ = opened(folder)
    put(store, 7)
    store.commit()
    store._database.execute(f"UPDATE sqlite_sequence SET seq = {sequence}")
    store.close()
    store, said = opened(folder)
    if said_or_last:
        assert (said, store.last_number) == ("", said_or_last)
    else:
        assert "the stored messages are damaged (the last number)" in said
    store.close()


def test_a_torn_end_of_the_log_costs_what_was_not_committed_whole(folder, tmp_path):
    store, _ = opened(folder)
    put(store, 1)
    store.commit()
    log = (tmp_path / "messages.sqlite-wal").read_bytes()
    put(store, 2)
    store.commit()
    torn = (tmp_path / "messages.sqlite-wal").read_bytes()
    data = (tmp_path / "messages.sqlite").read_bytes()
    store.close()
    (tmp_path / "messages.sqlite").write_bytes(data)
    (tmp_path / "messages.sqlite-wal").write_bytes(torn[: len(log) + 100])
    store, said = opened(folder)
    assert (said, numbers(store, 1)) == ("", [1])
    store.close()


def test_what_is_not_damaged_is_not_set_aside(folder, tmp_path):
    store, _ = opened(folder)
    with pytest.raises(sqlite3.OperationalError, match="locked"):  # another broker
        opened(folder)
    store._database.execute("PRAGMA user_version = 2")
    store.close()
    with pytest.raises(sqlite3.OperationalError, match="of another version: 2, this is 1"):
        opened(folder)
    with pytest.raises(sqlite3.OperationalError):
        opened(str(tmp_path / "none"))
    assert not [name for name in tmp_path.iterdir() if "damaged" in name.name]


def test_a_file_system_that_may_only_be_read_is_no_damage(folder, tmp_path):
    need_root()
    opened(folder)[0].close()
    mount(folder, folder, "none", MS_BIND)
    mount("none", folder, "none", MS_BIND | MS_REMOUNT | MS_RDONLY)
    try:
        with pytest.raises(sqlite3.OperationalError, match="disk I/O error"):
            opened(folder)
    finally:
        unmount(folder)
    assert not [name for name in tmp_path.iterdir() if "damaged" in name.name]


def test_what_was_acknowledged_does_not_stay_on_the_disk(folder, tmp_path):
    store, _ = opened(folder)
    put(store, 1, data=b"a secret word")
    store.commit()
    store.acknowledge(1, ALL, [1])
    store.commit()
    store.close()
    assert b"a secret word" not in (tmp_path / "messages.sqlite").read_bytes()
    assert not (tmp_path / "messages.sqlite-wal").exists()


def test_the_clock_of_the_test_is_the_real_one():
    assert abs(module.time.time_ns() - time.time_ns()) < 10**10


def test_numbers_are_remembered_when_their_messages_are_gone(folder):
    store, _ = opened(folder)
    put(store, 1 << 60)
    store.commit()
    store.acknowledge(1, ALL, [1 << 60])
    store.commit()
    store.close()
    store, _ = opened(folder)
    assert store.last_number == 1 << 60
    store.close()


@pytest.mark.parametrize(("messages", "recipients"), [(240, 1), (3, 80), (1, 240)])
def test_what_is_over_is_removed_in_pieces(store, monkeypatch, messages, recipients):
    """However many recipients a message has: all others wait meanwhile."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    for number in range(1, messages + 1):
        put(store, number, range(recipients), expires_us=1000)
    store.commit()
    left = []
    for _ in range(4):
        now[0] += 1
        store.expire()
        left.append(store._database.execute("SELECT count(*) FROM waiting").fetchone()[0])
    assert left == [140, 40, 0, 0]
    assert store._used == {}
