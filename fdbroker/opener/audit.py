"""Stage audit: one record before a descriptor leaves; a second where the outcome differs. The keeper records refusals.

Runs in: opener. An attacker controls what it asks for and its own `comm`: both are one escaped value each.
"""

from __future__ import annotations

import contextlib
import socket
from collections import deque

from fdbroker.kernel.link import Link
from fdbroker.kernel.records import NotRecorded, Records
from fdbroker.limits import opener as limits
from fdbroker.terms import Grant, Subject
from fdbroker.wire.audit import Record, fields
from fdbroker.wire.keeper import OPENER_TO_KEEPER


class Audit:
    """Writes what must be written before something happens, or is about the service itself.

    Takes `journal`, a connected datagram socket, or None; borrows the link to the keeper, who hears of refusals.
    """

    def __init__(self, journal: socket.socket | None, keeper: Link) -> None:
        self._records = Records(journal)
        self._keeper = keeper
        self._owed: deque[dict[str, str]] = deque()  # one at most for each resource of what was being recorded
        # grants as they were written last, by connection: most programs are granted the same again
        self._prepared: dict[tuple[int, Grant, int], bytes] = {}

    @property
    def owes(self) -> bool:
        """Whether something has yet to be written: call `flush` now and then."""
        return bool(self._owed)

    def grant(self, connection: int, subject: Subject, grant: Grant, count: int) -> None:
        """Write that `count` equal grants are made, before their descriptors leave.

        Raises NotRecorded, also while an earlier undoing is owed.
        """
        if self._owed:
            raise NotRecorded("records are owed")
        record = self._prepared.get((connection, grant, count))
        if record is None:
            asked = grant.rule.where, grant.resource.text, grant.resource.access
            made = Record("granted", "send", connection, subject, "", "", *asked)
            found = {"FDBROKER_RDEV": grant.rdev, "FDBROKER_NAMESPACE": grant.inode}
            record = self._records.prepare(_counted(made, count, found))
            if len(self._prepared) >= limits.KEPT_VALUES:
                self._prepared.clear()
            self._prepared[connection, grant, count] = record
        self._records.put(record)

    def write(self, record: Record) -> None:
        """Write one record. Raises NotRecorded when the journal, or standard error, takes nothing now."""
        self._records.write(fields(record))

    def undo(self, record: Record, count: int) -> None:
        """Say that what was recorded of `count` equal grants did not happen: now, or as soon as it can be written."""
        self._owed.append(_counted(record, count, {}))
        self.flush()

    def flush(self) -> None:
        """Write what is owed, as far as that can be written now."""
        with contextlib.suppress(NotRecorded):
            while self._owed:
                self._records.write(self._owed[0])
                self._owed.popleft()

    def refuse(self, record: Record) -> None:
        """Have the keeper record a refusal, or count it."""
        self._keeper.send(OPENER_TO_KEEPER.encode(record))


def _counted(record: Record, count: int, found: dict[str, str]) -> dict[str, str]:
    """The fields of a record that stands for so many equal descriptors."""
    if count == 1:
        return fields(record, found)
    return fields(record, {**found, "FDBROKER_COUNT": str(count)}, f" ({count} of them)")
