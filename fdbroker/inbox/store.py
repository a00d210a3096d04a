"""The stored queue: messages for users who are not there, in SQLite, until they have acknowledged them.

Runs in: inbox, the only process that has the file open. An attacker controls payloads; all else comes from us.

Nothing is done until `commit`: one for all that one turn of the loop brought. A message is stored once, with a row for
each recipient; it counts for its sender until the last of these has acknowledged it, or its time is over. So nobody
can fill another sender's share.

Even removing needs room on the disk, for SQLite writes down first what it changes. Where there is none, it is done in
the room of the reserve, piece by piece; until the reserve is there again nothing new is stored.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from fdbroker.errors import QueueFull
from fdbroker.inbox.reserve import Reserve
from fdbroker.limits import inbox as limits
from fdbroker.terms import INVALID_ID

_NAME = "messages.sqlite"
_T = TypeVar("_T")
_VERSION = 1
_PAGE_BYTES = 4096
_EXPIRE_S = 0.1  # how often we look for messages whose time is over,
_OWN_TIMES = 10  # as often, one after the other, of a sender that has no room
_EXPIRE_AT_ONCE = 100  # and for how many recipients they are removed then: all others wait for that
_RETRY_S = 1.0  # without a reserve: how often we try to have it again
_PIECE = 16  # messages that are removed at once there: of the longest, 2 MiB are written first
# One connection in exclusive mode needs no shared memory file; FULL: a commit is on the disk, not only in the kernel.
_SETTINGS = f"""
    PRAGMA page_size = {_PAGE_BYTES};
    PRAGMA locking_mode = EXCLUSIVE;
    PRAGMA journal_mode = WAL;
    PRAGMA synchronous = FULL;
    PRAGMA max_page_count = {limits.STORE_BYTES // _PAGE_BYTES};
    PRAGMA secure_delete = ON;
    PRAGMA trusted_schema = OFF;
    PRAGMA cell_size_check = ON;
    PRAGMA temp_store = MEMORY;
"""
_SCHEMA = f"""
    BEGIN;
    CREATE TABLE messages (
        number INTEGER PRIMARY KEY AUTOINCREMENT, sender INTEGER NOT NULL, topic TEXT NOT NULL,
        expires_us INTEGER NOT NULL, data BLOB NOT NULL
    ) STRICT;
    CREATE INDEX messages_by_expiry ON messages (expires_us);
    CREATE TABLE waiting (
        uid INTEGER NOT NULL, number INTEGER NOT NULL, PRIMARY KEY (uid, number)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX waiting_by_number ON waiting (number);
    PRAGMA user_version = {_VERSION};
    COMMIT;
"""

# as they were made; in hexadecimal, for in a damaged file a name may be no text
_COLUMNS = """
    SELECT hex(tables.name), hex(columns.name), hex(columns.type), columns.pk
    FROM sqlite_schema AS tables, pragma_table_xinfo(tables.name) AS columns WHERE tables.type = 'table'
    ORDER BY tables.name, columns.cid
"""
_LAST_NUMBER = """
    SELECT max(
        (SELECT ifnull(max(CAST(seq AS INTEGER)), 0) FROM sqlite_sequence WHERE name = 'messages'),
        (SELECT ifnull(max(number), 0) FROM messages)
    )
"""
_NUMBER_MAX = 1 << 62  # in microseconds since 1970, 146,000 years

_REMOVE = """
    DELETE FROM messages WHERE number = ? AND NOT EXISTS (SELECT 1 FROM waiting WHERE number = messages.number)
    RETURNING sender, length(data)
"""
_OLD = """
    SELECT messages.number, uid FROM messages LEFT JOIN waiting ON waiting.number = messages.number
    WHERE expires_us <= ? AND sender BETWEEN ? AND ? ORDER BY expires_us LIMIT ?
"""
_WAITING = """
    SELECT number, data FROM waiting JOIN messages USING (number)
    WHERE uid = ? AND number > ? AND expires_us > ? AND topic IN (SELECT value FROM json_each(?))
    ORDER BY number LIMIT ?
"""


class Stored(NamedTuple):
    """A message to be stored: `data` is the JSON object that its recipients get."""

    number: int
    sender: int
    topic: str
    expires_us: int
    data: bytes


class _Done(NamedTuple):
    """That user has that message, if it is on one of these topics."""

    uid: int
    number: int
    topics: frozenset[str]


class NotStored(Exception):
    """The disk is full or broken: no message that was to be committed is stored.

    `acknowledged`: what was to be acknowledged is.
    """

    def __init__(self, why: str, *, acknowledged: bool = False) -> None:
        super().__init__(why)
        self.acknowledged = acknowledged


def _columns(database: sqlite3.Connection) -> list[tuple[Any, ...]]:
    return database.execute(_COLUMNS).fetchall()


def _made_columns() -> list[tuple[Any, ...]]:
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        database.executescript(_SCHEMA)
        return _columns(database)


class Store:
    """The messages in the file `path`, whose folder must be ours alone, as `reserve`'s. Raises sqlite3.Error."""

    def __init__(self, path: str, reserve: Reserve) -> None:
        self._database = sqlite3.connect(path, isolation_level=None, timeout=0)
        self._new: list[tuple[Stored, frozenset[int]]] = []
        self._done: list[_Done] = []
        self._removed: list[tuple[int, int]] = []  # in this transaction: sender, bytes
        self._expire_at_s = 0.0
        self._reserve = reserve
        self._reserve_at_s = 0.0
        try:
            self._database.executescript(_SETTINGS)
            (version,) = self._database.execute("PRAGMA user_version").fetchone()
            if version not in (0, _VERSION):
                raise sqlite3.OperationalError(f"a file of another version: {version}, this is {_VERSION}")
            (said,) = self._database.execute("PRAGMA integrity_check(1)").fetchone()
            if said != "ok":
                raise sqlite3.DatabaseError(said)
            if version == 0:
                self._database.executescript(_SCHEMA)
            elif _columns(self._database) != _made_columns():
                raise sqlite3.DatabaseError("its tables are not ours")
            if not 0 <= self.last_number < _NUMBER_MAX:
                raise sqlite3.DatabaseError("the last number")
            rows = self._database.execute("SELECT sender, count(*), sum(length(data)) FROM messages GROUP BY sender")
            self._used = {sender: (messages, size) for sender, messages, size in rows}
        except BaseException:
            self._database.close()
            raise
        self._reserve.take()

    @property
    def last_number(self) -> int:
        """The largest number that was ever stored, 0 for none."""
        # CAST: this table is SQLite's own, which checks no types in it
        (number,) = self._database.execute(_LAST_NUMBER).fetchone()
        return int(number)

    def _add(self, sender: int, messages: int, size: int) -> None:
        """Count for a sender, or, with negative numbers, count no more."""
        messages_before, size_before = self._used.get(sender, (0, 0))
        if messages_before + messages:
            self._used[sender] = (messages_before + messages, size_before + size)
        else:
            self._used.pop(sender, None)

    # ---- writing

    def check(self, sender: int, size: int, messages_max: int, bytes_max: int) -> None:
        """Raises QueueFull when one message more of that size is too much for its sender."""
        times = 0
        while (full := self._full(sender, size, messages_max, bytes_max)) is not None:
            if times == _OWN_TIMES or not self._expire(sender):
                raise full
            times += 1

    def _full(self, sender: int, size: int, messages_max: int, bytes_max: int) -> QueueFull | None:
        messages, used = self._used.get(sender, (0, 0))
        if messages >= messages_max:
            return QueueFull("stored_messages", messages_max)
        return QueueFull("stored_bytes", bytes_max) if used + size > bytes_max else None

    def put(self, message: Stored, recipients: frozenset[int]) -> None:
        """Store a message, with the next commit, for these users."""
        self._new.append((message, recipients))
        self._add(message.sender, 1, len(message.data))

    def acknowledge(self, uid: int, topics: frozenset[str], numbers: Iterable[int]) -> None:
        """That user has these, with the next commit. Numbers that do not wait for it on these topics are left alone."""
        self._done += [_Done(uid, number, topics) for number in numbers]

    def commit(self) -> None:
        """Write it down. Raises NotStored when the messages cannot be: then none of them is, as if it never came."""
        new, self._new = self._new, []
        done, self._done = self._done, []
        if new:
            try:
                self._insert(new, done)
            except NotStored as error:
                for message, _ in new:
                    self._add(message.sender, -1, -len(message.data))
                self._remove_all(done, self._acknowledged)
                error.acknowledged = True
                raise
        else:
            self._remove_all(done, self._acknowledged)

    def _insert(self, new: list[tuple[Stored, frozenset[int]]], done: list[_Done]) -> None:
        if not self._reserve.held and not self._take_reserve():
            raise NotStored("the disk is full: there is no room for the reserve")
        with self._transaction():
            for message, recipients in new:
                self._database.execute("INSERT INTO messages VALUES (?, ?, ?, ?, ?)", message)
                rows = [(uid, message.number) for uid in recipients]
                self._database.executemany("INSERT INTO waiting VALUES (?, ?)", rows)
            for one in done:
                self._acknowledged(one)

    def expire(self) -> None:
        """From time to time, remove what was not acknowledged in time, whoever had sent it.

        Not where a message is taken: there its sender would pay for the work.
        """
        if time.monotonic() >= self._expire_at_s:
            self._expire_at_s = time.monotonic() + _EXPIRE_S
            self._expire()

    def _expire(self, sender: int | None = None) -> int:
        """Remove what has not been acknowledged in time, of one sender or of all, some of it: nobody waits for all.

        Returns for how many recipients.
        """
        of = (0, INVALID_ID) if sender is None else (sender, sender)
        gone = self._database.execute(_OLD, (time.time_ns() // 1000, *of, _EXPIRE_AT_ONCE)).fetchall()
        with contextlib.suppress(NotStored):
            self._remove_all(gone, self._expired)
        return len(gone)

    def _acknowledged(self, one: _Done) -> None:
        topic = self._database.execute("SELECT topic FROM messages WHERE number = ?", (one.number,)).fetchone()
        if topic is None or topic[0] not in one.topics:  # it could not have read it
            return
        if self._database.execute("DELETE FROM waiting WHERE uid = ? AND number = ?", (one.uid, one.number)).rowcount:
            self._remove(one.number)

    def _expired(self, one: tuple[int, int | None]) -> None:
        number, uid = one
        self._database.execute("DELETE FROM waiting WHERE uid = ? AND number = ?", (uid, number))
        self._remove(number)

    def _remove(self, number: int) -> None:
        """Remove a message for which nobody waits any more."""
        self._removed += self._database.execute(_REMOVE, (number,)).fetchall()

    def _remove_all(self, those: Sequence[_T], remove: Callable[[_T], None]) -> None:
        """`remove` each of them: at once, or where the disk is full piece by piece, which may end in the middle."""
        if not those:
            return
        try:
            with self._transaction():
                for one in those:
                    remove(one)
        except NotStored:
            if not self._reserve.held and not self._take_reserve():
                raise
        else:
            return
        self._reserve.give()
        try:
            for first in range(0, len(those), _PIECE):
                self._checkpoint()
                with self._transaction():
                    for one in those[first : first + _PIECE]:
                        remove(one)
        finally:
            self._reserve_at_s = 0.0
            self._take_reserve()

    def _take_reserve(self) -> bool:
        """Have the reserve again, where there is room for it now."""
        if time.monotonic() >= self._reserve_at_s:
            self._reserve_at_s = time.monotonic() + _RETRY_S
            self._checkpoint()
            self._reserve.take()
        return self._reserve.held

    def _checkpoint(self) -> None:
        """Bring what was committed to its place: then the log, which had it until now, takes no room at all."""
        with contextlib.suppress(sqlite3.OperationalError):  # no room for that either
            self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._removed = []
        try:
            self._database.execute("BEGIN IMMEDIATE")
            yield
            self._database.execute("COMMIT")
        except sqlite3.OperationalError as error:
            if self._database.in_transaction:  # some errors have ended it already
                self._database.execute("ROLLBACK")
            raise NotStored(str(error)) from None
        for sender, size in self._removed:
            self._add(sender, -1, -size)

    # ---- reading

    def waiting(self, uid: int, topics: Iterable[str], after: int, messages_max: int) -> list[tuple[int, bytes]]:
        """What waits for that user on these topics, with numbers above `after`: (number, data), in order.

        At most `messages_max` and RECEIVED_BYTES, but always one.
        """
        found: list[tuple[int, bytes]] = []
        room = limits.RECEIVED_BYTES
        names = json.dumps(sorted(topics))
        rows = self._database.execute(_WAITING, (uid, after, time.time_ns() // 1000, names, messages_max))
        for number, data in rows:
            room -= len(data)
            if room < 0 and found:
                break
            found.append((number, data))
        rows.close()
        return found

    def close(self) -> None:
        """Close the file; what is not committed is forgotten."""
        self._database.close()


def opened(folder: str) -> tuple[Store, str]:
    """The store in `folder`, which must be ours alone; a damaged one is set aside first: then what to tell the admin.

    Raises sqlite3.OperationalError when it cannot be read at all, such as when another broker has it.
    """
    path = os.path.join(folder, _NAME)
    try:
        return Store(path, Reserve(f"{path}-reserve")), ""
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        # But for SQLITE_ERROR, which says that a table is not what it was made as, and for SQLITE_READONLY where we may
        # write, which the header says: no access, another process, no room, a newer version; nothing is wrong with the
        # file. What is no text stands in a schema that SQLite quotes.
        code = getattr(error, "sqlite_errorcode", None)
        damaged = code == sqlite3.SQLITE_ERROR or (code == sqlite3.SQLITE_READONLY and os.access(path, os.W_OK))
        if isinstance(error, sqlite3.OperationalError) and not damaged:
            raise
        aside = f"{path}.damaged-{time.time_ns() // 1000}"
        for end in ("", "-wal"):
            if os.path.exists(path + end):
                os.rename(path + end, aside + end)
        return Store(
            path, Reserve(f"{path}-reserve")
        ), f"the stored messages are damaged ({error}): kept as {aside}; the queues are empty now"
