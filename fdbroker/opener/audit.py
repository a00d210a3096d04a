"""Stage audit: one record before a descriptor leaves, one for every refusal; a second where the outcome differs.

Runs in: opener. An attacker controls what it asks for and its own `comm`: both are one escaped value each.
The fields stand in docs/operating.md, which a test compares with FIELDS.
"""

from __future__ import annotations

import contextlib
import socket
from collections import deque
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from fdbroker import limits
from fdbroker.kernel.records import NotRecorded, Records
from fdbroker.terms import INVALID_ID, Grant, Resource, Subject, TopicUse, owner_text
from fdbroker.wire.journal import escaped

_REPEAT_S = limits.AUDIT_REPEAT_SECONDS
_REFUSALS = limits.AUDIT_REFUSALS
_USERS = limits.AUDIT_USERS
_CHARACTERS = limits.AUDIT_VALUE_CHARACTERS
_MESSAGE_CHARACTERS = 128

# One MESSAGE_ID for each kind of record: `journalctl MESSAGE_ID=…`. Never changed, never used for another kind.
MESSAGE_IDS = {
    "granted": "6c0b6a1d5fd94b6c8f0d2b5b1f1f7a01",
    "refused": "6c0b6a1d5fd94b6c8f0d2b5b1f1f7a02",
    "undone": "6c0b6a1d5fd94b6c8f0d2b5b1f1f7a03",
    "turned-away": "6c0b6a1d5fd94b6c8f0d2b5b1f1f7a04",
    "stopping": "6c0b6a1d5fd94b6c8f0d2b5b1f1f7a07",
    "violation": "6c0b6a1d5fd94b6c8f0d2b5b1f1f7a05",
    "disconnected": "6c0b6a1d5fd94b6c8f0d2b5b1f1f7a06",
    "slowed": "6c0b6a1d5fd94b6c8f0d2b5b1f1f7a0a",
    "reloading": "6c0b6a1d5fd94b6c8f0d2b5b1f1f7a0b",
}
# syslog(3) levels
_PRIORITIES = {
    "granted": 6,
    "refused": 5,
    "undone": 4,
    "turned-away": 5,
    "stopping": 5,
    "violation": 2,
    "disconnected": 5,
    "slowed": 5,
    "reloading": 5,
}

FIELDS = (
    "MESSAGE",
    "MESSAGE_ID",
    "PRIORITY",
    "SYSLOG_IDENTIFIER",
    "FDBROKER_STAGE",
    "FDBROKER_DECISION",
    "FDBROKER_CAUSE",
    "FDBROKER_REASON",
    "FDBROKER_RULE",
    "FDBROKER_RESOURCE",
    "FDBROKER_RDEV",
    "FDBROKER_NAMESPACE",
    "FDBROKER_ACCESS",
    "FDBROKER_UID",
    "FDBROKER_OWNER",
    "FDBROKER_GID",
    "FDBROKER_PID",
    "FDBROKER_COMM",
    "FDBROKER_LABEL",
    "FDBROKER_CONNECTION",
    "FDBROKER_COUNT",
    "FDBROKER_REPEATED",
)


class Asked(NamedTuple):
    """What a record says of a resource."""

    text: str
    access: str


class Record(NamedTuple):
    """One record. `stage` is where the request ended, `reason` says why it was refused, `rule` is "FILE:LINE".

    `times` is for how many equal descriptors the record stands, `cause` the kind of the reason in a word or two: two
    refusals are alike when they have the same, whatever numbers are in the reason.
    """

    kind: str
    stage: str
    connection: int
    subject: Subject | None
    resource: Resource | TopicUse | Asked | None
    reason: str
    rule: str = ""
    rdev: str = ""
    inode: str = ""
    times: int = 1
    cause: str = ""


def fields(record: Record, repeated: int = 0) -> dict[str, str]:
    """The journal fields of a record; those without a value are left out."""
    reason = shown(record.reason)
    values = {
        "MESSAGE_ID": MESSAGE_IDS[record.kind],
        "PRIORITY": str(_PRIORITIES[record.kind]),
        "SYSLOG_IDENTIFIER": "fdbroker",
        "FDBROKER_STAGE": record.stage,
        "FDBROKER_DECISION": "allow" if record.kind in ("granted", "stopping", "reloading") else "deny",
        "FDBROKER_CAUSE": record.cause,
        "FDBROKER_REASON": reason,
        "FDBROKER_RULE": record.rule,
        "FDBROKER_RDEV": record.rdev,
        "FDBROKER_NAMESPACE": record.inode,
        "FDBROKER_CONNECTION": str(record.connection),
        "FDBROKER_COUNT": str(record.times) if record.times > 1 else "",
        "FDBROKER_REPEATED": str(repeated) if repeated else "",
    }
    who = what = ""
    if record.subject is not None:
        one = record.subject
        of = "" if one.owner == one.uid else f" of {owner_text(one.owner)}"
        if one.uid == INVALID_ID:
            values["FDBROKER_OWNER"] = owner_text(one.owner)
            who = f"uids{of} "
        else:
            values |= _subject_fields(one.uid, one.owner, one.gid, one.pid, one.comm, one.label)
            who = f"uid {one.uid}{of} pid {one.pid} "
    if record.resource is not None:
        text = shown(record.resource.text)
        values["FDBROKER_RESOURCE"] = text
        values["FDBROKER_ACCESS"] = record.resource.access
        what = f" {record.resource.access} {cut(text, _MESSAGE_CHARACTERS)}"
    why = f" by {record.rule}" if record.rule else ""
    why += f": {cut(reason, _MESSAGE_CHARACTERS)}" if reason else ""
    again = f" ({repeated} times more)" if repeated else f" ({record.times} of them)" if record.times > 1 else ""
    values["MESSAGE"] = f"{who}{record.kind}{what}{why}{again}"
    return {name: value for name, value in values.items() if value}


@lru_cache(maxsize=_USERS)
def _subject_fields(uid: int, owner: int, gid: int, pid: int, comm: str, label: str) -> dict[str, str]:
    """The same for all that a connection asks. Without its groups, which would stay here when it has ended."""
    return {
        "FDBROKER_UID": str(uid),
        "FDBROKER_OWNER": owner_text(owner),
        "FDBROKER_GID": str(gid),
        "FDBROKER_PID": str(pid),
        "FDBROKER_COMM": escaped(comm),
        "FDBROKER_LABEL": escaped(label),
    }


def shown(text: str) -> str:
    """What a client wrote, harmless, and not more of it than a record has: escaping all of 64 KiB would take 20 ms."""
    return cut(escaped(cut(text, _CHARACTERS)), _CHARACTERS)


def cut(text: str, characters: int) -> str:
    """At most so many characters, the last of them … where some are missing."""
    return text if len(text) <= characters else text[: characters - 1] + "…"


def _others(last: Record) -> Record:
    """Of all that was not written one by one: of who and what that was, the owner alone is known any more."""
    subject = last.subject and last.subject._replace(uid=INVALID_ID, gid=INVALID_ID, pid=0, comm="", label="")
    reason = "other refusals of this owner, not written one by one"
    return Record("refused", "", 0, subject, None, reason, cause="others")


class _Window:
    """The refusals of one owner in AUDIT_REPEAT_SECONDS: what was written, how often it came again, what else came."""

    __slots__ = ("first", "others", "until_s")

    def __init__(self, until_s: float) -> None:
        self.until_s = until_s
        self.first: dict[tuple[object, ...], tuple[Record, int]] = {}
        self.others = 0


def _nobody(_owner: int, _now_s: float) -> None:
    """Before the accounts are there, nobody is charged."""


class Audit:
    """Writes records of what is granted and refused.

    Takes `journal`, a connected datagram socket, or None. `charge` is called with owner and time for each refusal that
    has been written.
    """

    def __init__(self, journal: socket.socket | None) -> None:
        self.charge: Callable[[int, float], None] = _nobody
        self._records = Records(journal)
        self._windows: dict[int, _Window] = {}  # by owner, -1 for unknown
        self._owed: deque[Record] = deque(maxlen=_USERS)
        # grants as they were written last, by connection: most programs are granted the same again
        self._prepared: dict[tuple[int, Grant, int], bytes] = {}

    @property
    def counting(self) -> bool:
        """Whether something may have to be written later: call `flush` now and then."""
        return bool(self._windows or self._owed)

    def grant(self, connection: int, subject: Subject, grant: Grant, count: int) -> None:
        """Write that `count` equal grants are made, before their descriptors leave.

        Raises NotRecorded, also while an earlier undoing is owed.
        """
        if self._owed:
            raise NotRecorded("records are owed")
        record = self._prepared.get((connection, grant, count))
        if record is None:
            rule, rdev, inode = grant.rule.where, grant.rdev, grant.inode
            made = Record("granted", "send", connection, subject, grant.resource, "", rule, rdev, inode, count)
            record = self._records.prepare(fields(made))
            if len(self._prepared) >= limits.KEPT_VALUES:
                self._prepared.clear()
            self._prepared[connection, grant, count] = record
        self._records.put(record)

    def write(self, record: Record, repeated: int = 0) -> None:
        """Write one record. Raises NotRecorded when the journal, or standard error, takes nothing now."""
        self._records.write(fields(record, repeated))

    def undo(self, record: Record) -> None:
        """Say that what was recorded did not happen: now, or as soon as it can be written."""
        try:
            self.write(record)
        except NotRecorded:
            self._owed.append(record)

    def refuse(self, record: Record, now_s: float) -> None:
        """Write a refusal, or only count it: when it came before within AUDIT_REPEAT_SECONDS, or many others did.

        Whatever a client varies in its requests, it makes AUDIT_REFUSALS records in that time and no more. A refusal
        that cannot be recorded stays a refusal.
        """
        owner = record.subject.owner if record.subject is not None else -1
        window = self._windows.get(owner)
        if window is None:
            if len(self._windows) >= _USERS:
                self.flush(now_s, everything=True)
            window = self._windows[owner] = _Window(now_s + _REPEAT_S)
        text = record.resource.text if record.resource is not None else ""
        uid = record.subject.uid if record.subject is not None else -1
        access = record.resource.access if record.resource is not None else ""
        key = (record.kind, record.stage, record.cause or record.reason, hash(text), access, uid)
        if key in window.first:
            first, repeated = window.first[key]
            window.first[key] = (first, repeated + 1)
        elif len(window.first) >= _REFUSALS:
            window.others += 1
        else:
            if record.resource is not None:  # of which no more is kept, either
                record = record._replace(resource=Asked(cut(text, _CHARACTERS), access))
            try:
                self.write(record)
                window.first[key] = (record, 0)
                self.charge(owner, now_s)
            except NotRecorded:
                window.first[key] = (record, 1)  # the count at the end says it

    def flush(self, now_s: float, *, everything: bool = False) -> None:
        """Write what is owed, and the counts of the windows whose time is over, or of all."""
        with contextlib.suppress(NotRecorded):
            while self._owed:
                self.write(self._owed[0])
                self._owed.popleft()
        for owner, window in list(self._windows.items()):
            if everything or now_s >= window.until_s:
                try:
                    self._write_counts(owner, window, now_s)
                except NotRecorded:
                    if not everything:
                        continue  # the next time
                del self._windows[owner]

    def _write_counts(self, owner: int, window: _Window, now_s: float) -> None:
        """Write what was counted, and forget each count as it is written."""
        last = None
        for key, (last, repeated) in window.first.items():
            if repeated:
                self.write(last, repeated)
                self.charge(owner, now_s)
                window.first[key] = (last, 0)
        if window.others and last is not None:
            self.write(_others(last), window.others)
            window.others = 0
