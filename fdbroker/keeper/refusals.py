"""What is written of refusals: the same once and then how often it came, of one owner no more than there is room for.

Runs in: keeper. An attacker controls what it asks for, how often, and its own `comm`. A taken-over opener or inbox
controls what was refused.
"""

from __future__ import annotations

import socket

from fdbroker.bucket import Bucket
from fdbroker.kernel.records import NotRecorded, Records
from fdbroker.limits import keeper as limits
from fdbroker.limits.opener import AUDIT_USERS, AUDIT_VALUE_CHARACTERS
from fdbroker.terms import OTHERS, owner_text
from fdbroker.wire.audit import Record, cut, fields

_REPEAT_S = limits.AUDIT_REPEAT_SECONDS
_REFUSALS = limits.AUDIT_REFUSALS
_USERS = AUDIT_USERS
_CHARACTERS = AUDIT_VALUE_CHARACTERS
_COST = limits.AUDIT_SECONDS_PER_REFUSAL
_BURST = limits.AUDIT_BURST * _COST
_BUCKETS_KEPT = 1024
_UNKNOWN = -1  # an owner
_RETRY_S = 1.0  # when the journal has taken no count


class _Window:
    """The refusals of one owner in AUDIT_REPEAT_SECONDS: what was written, how often it came again, what else came."""

    __slots__ = ("first", "others", "owner", "until_s")

    def __init__(self, owner: int, until_s: float) -> None:
        self.owner = owner
        self.until_s = until_s
        self.first: dict[tuple[object, ...], tuple[Record, int]] = {}
        self.others = 0


class Refusals:
    """Counts refusals, and writes records of them.

    Takes `journal`, a connected datagram socket, or None. A refusal that cannot be recorded stays a refusal.
    """

    def __init__(self, journal: socket.socket | None) -> None:
        self._records = Records(journal)
        self._windows: dict[int, _Window] = {}  # by owner, or _UNKNOWN
        self._buckets: dict[int, Bucket] = {}  # likewise

    def timeout_s(self, now_s: float) -> float:
        """In how many seconds `flush` has something to write; -1 for never."""
        ends_s = [window.until_s for window in self._windows.values()]
        return max(0.0, min(ends_s) - now_s) if ends_s else -1

    def add(self, record: Record, now_s: float) -> None:
        """Write a refusal, or only count it: when it came before within AUDIT_REPEAT_SECONDS, or many others did.

        Whatever a client varies in its requests, it makes AUDIT_REFUSALS records in that time and no more; and when
        AUDIT_BURST are used up, one in AUDIT_SECONDS_PER_REFUSAL.
        """
        owner = record.subject.owner if record.subject is not None else _UNKNOWN
        window = self._windows.get(owner)
        if window is None:
            if len(self._windows) >= _USERS:
                self.flush(now_s, everything=True)
            window = self._windows[owner] = _Window(owner, now_s + _REPEAT_S)
        uid = record.subject.uid if record.subject is not None else -1
        key = (record.kind, record.stage, record.cause or record.reason, hash(record.resource), record.access, uid)
        if key in window.first:
            first, repeated = window.first[key]
            window.first[key] = (first, repeated + 1)
        elif len(window.first) >= _REFUSALS or self._bucket(owner, now_s).take(1, _BURST, now_s, _COST):
            window.others += 1
        else:
            record = record._replace(resource=cut(record.resource, _CHARACTERS))  # of which no more is kept, either
            try:
                self._records.write(fields(record))
                window.first[key] = (record, 0)
            except NotRecorded:
                window.first[key] = (record, 1)  # the count at the end says it

    def _bucket(self, owner: int, now_s: float) -> Bucket:
        """A token a second; a refusal costs several, for the record of it and that of its count."""
        bucket = self._buckets.get(owner)
        if bucket is None:
            if len(self._buckets) >= _BUCKETS_KEPT:  # those that are full again say nothing
                lacking = {
                    one: _BURST - kept.tokens - (now_s - kept.refilled_at_s) for one, kept in self._buckets.items()
                }
                self._buckets = {one: kept for one, kept in self._buckets.items() if lacking[one] > 0}
            bucket = self._buckets[owner] = Bucket(_BURST, now_s)
        return bucket

    def flush(self, now_s: float, *, everything: bool = False) -> None:
        """Write the counts of the windows whose time is over, or of all, which is tried once."""
        for owner, window in list(self._windows.items()):
            if everything or now_s >= window.until_s:
                try:
                    self._write_counts(window)
                except NotRecorded:
                    if not everything:
                        window.until_s = now_s + _RETRY_S
                        continue
                del self._windows[owner]

    def _write_counts(self, window: _Window) -> None:
        """Write what was counted, and forget each count as it is written."""
        for key, (record, repeated) in window.first.items():
            if repeated:
                self._records.write(fields(record, {"FDBROKER_REPEATED": str(repeated)}, f" ({repeated} times more)"))
                window.first[key] = (record, 0)
        if window.others:
            self._records.write(_others(window.owner, window.others))
            window.others = 0


def _others(owner: int, count: int) -> dict[str, str]:
    """Of all that was not written one by one: of who and what that was, the owner alone is known any more."""
    why = "other refusals of this owner, not written one by one"
    found = {"FDBROKER_REPEATED": str(count)}
    who = ""
    if owner != _UNKNOWN:
        found["FDBROKER_OWNER"] = owner_text(owner)
        who = "uids " if owner == OTHERS else f"uids of {owner_text(owner)} "
    values = fields(Record("refused", "", 0, None, why, "others"), found, f" ({count} times more)")
    return values | {"MESSAGE": who + values["MESSAGE"]}
