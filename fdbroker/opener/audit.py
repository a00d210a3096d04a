"""Stage audit: one record before a descriptor leaves, one for every refusal; a second where the outcome differs.

Runs in: opener. An attacker controls the asked path and its own `comm`: both are one escaped value each.
The fields stand in docs/operating.md, which a test compares with FIELDS.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
from typing import NamedTuple

from fdbroker import limits
from fdbroker.terms import Resource, Subject
from fdbroker.wire.journal import encode_fields, escaped

_REPEAT_S = limits.AUDIT_REPEAT_SECONDS
_REPEAT_KINDS = limits.AUDIT_REPEAT_KINDS

# One MESSAGE_ID for each kind of record: `journalctl MESSAGE_ID=…`. Never changed, never used for another kind.
MESSAGE_IDS = {
    "granted": "6c0b6a1d5fd94b6c8f0d2b5b1f1f7a01",
    "refused": "6c0b6a1d5fd94b6c8f0d2b5b1f1f7a02",
    "undone": "6c0b6a1d5fd94b6c8f0d2b5b1f1f7a03",
    "turned-away": "6c0b6a1d5fd94b6c8f0d2b5b1f1f7a04",
    "violation": "6c0b6a1d5fd94b6c8f0d2b5b1f1f7a05",
    "disconnected": "6c0b6a1d5fd94b6c8f0d2b5b1f1f7a06",
}
# syslog(3) levels
_PRIORITIES = {"granted": 6, "refused": 5, "undone": 4, "turned-away": 5, "violation": 2, "disconnected": 5}

FIELDS = (
    "MESSAGE",
    "MESSAGE_ID",
    "PRIORITY",
    "SYSLOG_IDENTIFIER",
    "FDBROKER_STAGE",
    "FDBROKER_DECISION",
    "FDBROKER_REASON",
    "FDBROKER_RULE",
    "FDBROKER_RESOURCE",
    "FDBROKER_RDEV",
    "FDBROKER_ACCESS",
    "FDBROKER_UID",
    "FDBROKER_GID",
    "FDBROKER_PID",
    "FDBROKER_COMM",
    "FDBROKER_LABEL",
    "FDBROKER_CONNECTION",
    "FDBROKER_REPEATED",
)


class Record(NamedTuple):
    """One record. `stage` is where the request ended, `reason` says why it was refused, `rule` is "FILE:LINE"."""

    kind: str
    stage: str
    connection: int
    subject: Subject | None
    resource: Resource | None
    reason: str
    rule: str = ""
    rdev: str = ""


class NotRecorded(Exception):
    """The record could not be written now; nothing may be granted on it."""


def fields(record: Record, repeated: int = 0) -> dict[str, str]:
    """The journal fields of a record; those without a value are left out."""
    reason = escaped(record.reason)
    values = {
        "MESSAGE_ID": MESSAGE_IDS[record.kind],
        "PRIORITY": str(_PRIORITIES[record.kind]),
        "SYSLOG_IDENTIFIER": "fdbroker",
        "FDBROKER_STAGE": record.stage,
        "FDBROKER_DECISION": "allow" if record.kind == "granted" else "deny",
        "FDBROKER_REASON": reason,
        "FDBROKER_RULE": record.rule,
        "FDBROKER_RDEV": record.rdev,
        "FDBROKER_CONNECTION": str(record.connection),
        "FDBROKER_REPEATED": str(repeated) if repeated else "",
    }
    who = what = ""
    if record.subject is not None:
        subject = record.subject
        values["FDBROKER_UID"] = str(subject.uid)
        values["FDBROKER_GID"] = str(subject.gid)
        values["FDBROKER_PID"] = str(subject.pid)
        values["FDBROKER_COMM"] = escaped(subject.comm)
        values["FDBROKER_LABEL"] = escaped(subject.label)
        who = f"uid {subject.uid} pid {subject.pid} "
    if record.resource is not None:
        path = escaped(record.resource.path)
        values["FDBROKER_RESOURCE"] = path
        values["FDBROKER_ACCESS"] = record.resource.access
        what = f" {record.resource.access} {path}"
    why = f" by {record.rule}" if record.rule else f": {reason}"
    again = f" ({repeated} times more)" if repeated else ""
    values["MESSAGE"] = f"{who}{record.kind}{what}{why}{again}"
    return {name: value for name, value in values.items() if value}


class Audit:
    """Writes records to the journal's socket, or to standard error as JSON lines where there is none.

    Takes `journal`, a connected datagram socket, or None.
    """

    def __init__(self, journal: socket.socket | None) -> None:
        self._journal = journal
        self._seen: dict[Record, tuple[float, int]] = {}  # refusal without its connection -> (until, repeated)

    @property
    def counting(self) -> bool:
        """Whether repeated refusals may have to be written later: call `flush` now and then."""
        return bool(self._seen)

    def write(self, record: Record, repeated: int = 0) -> None:
        """Write one record. Raises NotRecorded when the journal, or standard error, takes nothing now."""
        values = fields(record, repeated)
        try:
            if self._journal is not None:
                self._journal.send(encode_fields(values), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            else:
                line = (json.dumps(values) + "\n").encode()
                if os.write(2, line) != len(line):
                    raise NotRecorded
        except OSError as error:
            raise NotRecorded(errno.errorcode.get(error.errno or 0, "?")) from None

    def refuse(self, record: Record, now_s: float) -> None:
        """Write a refusal, or only count it when the same one was written within AUDIT_REPEAT_SECONDS.

        A refusal that cannot be recorded stays a refusal.
        """
        key = record._replace(connection=0)
        until_s, repeated = self._seen.get(key, (0.0, 0))
        if now_s < until_s:
            self._seen[key] = (until_s, repeated + 1)
            return
        if len(self._seen) >= _REPEAT_KINDS:
            self.flush(now_s, everything=True)
        self._seen[key] = (now_s + _REPEAT_S, 0)
        with contextlib.suppress(NotRecorded):
            self.write(record, repeated)

    def flush(self, now_s: float, *, everything: bool = False) -> None:
        """Write the counts of the repeated refusals whose time is over, or of all."""
        for key, (until_s, repeated) in list(self._seen.items()):
            if everything or now_s >= until_s:
                del self._seen[key]
                if repeated:
                    with contextlib.suppress(NotRecorded):
                        self.write(key, repeated)
