"""What a record of the audit says: its kind, its fields, and how much of what a client wrote.

Runs in: opener (grants, and what is about itself), keeper (refusals). An attacker controls what it asks for and its own
`comm`: both are one escaped value each. docs/operating.md describes kinds and fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

from fdbroker.limits import opener as limits
from fdbroker.terms import Subject, owner_text
from fdbroker.wire.journal import escaped

_CHARACTERS = limits.AUDIT_VALUE_CHARACTERS
_MESSAGE_CHARACTERS = 128

# Of each kind of record the MESSAGE_ID, never changed and never used for another kind: `journalctl MESSAGE_ID=…`; and
# the syslog(3) level.
KINDS = {
    "granted": ("6c0b6a1d5fd94b6c8f0d2b5b1f1f7a01", 6),
    "refused": ("6c0b6a1d5fd94b6c8f0d2b5b1f1f7a02", 5),
    "undone": ("6c0b6a1d5fd94b6c8f0d2b5b1f1f7a03", 4),
    "turned-away": ("6c0b6a1d5fd94b6c8f0d2b5b1f1f7a04", 5),
    "stopping": ("6c0b6a1d5fd94b6c8f0d2b5b1f1f7a07", 5),
    "violation": ("6c0b6a1d5fd94b6c8f0d2b5b1f1f7a05", 2),
    "disconnected": ("6c0b6a1d5fd94b6c8f0d2b5b1f1f7a06", 5),
    "slowed": ("6c0b6a1d5fd94b6c8f0d2b5b1f1f7a0a", 5),
    "reloading": ("6c0b6a1d5fd94b6c8f0d2b5b1f1f7a0b", 5),
}


class Record(NamedTuple):
    """One record. `stage` is where the request ended, `reason` says why it was refused, `rule` is "FILE:LINE".

    `cause` is the kind of the reason in a word or two: two refusals are alike when they have the same, whatever numbers
    are in the reason. `resource` and `access` say what was asked for, as on the command line.
    """

    kind: str
    stage: str
    connection: int
    subject: Subject | None
    reason: str
    cause: str = ""
    rule: str = ""
    resource: str = ""
    access: str = ""


def fields(record: Record, more: Mapping[str, str] | None = None, again: str = "") -> dict[str, str]:
    """The journal fields of a record, and `more`; those without a value are left out. MESSAGE ends with `again`."""
    reason, resource = shown(record.reason), shown(record.resource)
    number, priority = KINDS[record.kind]
    values = {
        "MESSAGE_ID": number,
        "PRIORITY": str(priority),
        "SYSLOG_IDENTIFIER": "fdbroker",
        "FDBROKER_STAGE": record.stage,
        "FDBROKER_DECISION": "allow" if record.kind in ("granted", "stopping", "reloading") else "deny",
        "FDBROKER_CAUSE": record.cause,
        "FDBROKER_REASON": reason,
        "FDBROKER_RULE": record.rule,
        "FDBROKER_RESOURCE": resource,
        "FDBROKER_ACCESS": record.access,
        "FDBROKER_CONNECTION": str(record.connection),
        **(more or {}),
    }
    who = ""
    if record.subject is not None:
        one = record.subject
        of = "" if one.owner == one.uid else f" of {owner_text(one.owner)}"
        values |= _subject_fields(one.uid, one.owner, one.gid, one.pid, one.comm, one.label)
        who = f"uid {one.uid}{of} pid {one.pid} "
    what = f" {record.access} {cut(resource, _MESSAGE_CHARACTERS)}" if record.access else ""
    why = f" by {record.rule}" if record.rule else ""
    why += f": {cut(reason, _MESSAGE_CHARACTERS)}" if reason else ""
    values["MESSAGE"] = f"{who}{record.kind}{what}{why}{again}"
    return {name: value for name, value in values.items() if value}


@lru_cache(maxsize=limits.AUDIT_USERS)
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
