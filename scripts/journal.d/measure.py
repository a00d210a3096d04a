"""Runs in the machine that scripts/journal boots: writes records and looks how the journal's files grow."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from fdbroker.limits import every as limits
from fdbroker.terms import Subject
from fdbroker.wire.audit import Record, fields
from fdbroker.wire.journal import encode_fields

COUNT, LENGTHS = 30_000, (0, 1024, 32_768)
BYTES = 30_000_000  # of long messages fewer are written
DAY_S = 86_400
_PATIENCE_S = 60  # a journald that hangs is said, not waited for
GIB = 2**30
RULE = "/etc/fdbroker/policy.yaml:10"


def size() -> int:
    """Bytes of all journal files, as far as they are used: they grow in large steps.

    Source: systemd, src/libsystemd/sd-journal/journal-def.h, struct Header.
    """
    subprocess.run(["journalctl", "--sync"], check=True, timeout=_PATIENCE_S)
    places = [Path(place) for place in ("/var/log/journal", "/run/log/journal")]
    return sum(_used(file) for place in places for file in place.rglob("*.journal"))


def _used(file: Path) -> int:
    with file.open("rb") as journal:
        header = journal.read(144)
    return int.from_bytes(header[136:], "little")  # tail_object_offset


def measured(sock: socket.socket, make: Callable[[int], bytes], length: int = 0) -> float:
    """Bytes of one record; journald's files grow in steps, so many are written."""
    count = min(COUNT, BYTES // (length + 1000))
    for number in range(100):  # a new file is not empty
        sock.send(make(number))
    before = size()
    for number in range(100, count + 100):
        sock.send(make(number))
    return (size() - before) / count


def first_grant(number: int) -> bytes:
    """The first grant's record of a connection: the user varies its uid, its pid, its program's name, and the node."""
    return grant(number, number)


def further_grant(number: int) -> bytes:
    """Another one's, of the same few connections."""
    return grant(number % 1000, number)


def _subject(connection: int) -> Subject:
    uid = 100_000 + connection % 65_536
    comm = f"{connection * 0x9E3779B97F4A7 % 2**52:014x}"
    return Subject(uid, frozenset(), uid, connection, comm, "", foreign=False, owner=1000)


def grant(connection: int, number: int) -> bytes:
    """A grant's record, of one of 64 nodes."""
    subject = _subject(connection)
    path = f"/dev/snd/pcmC{number % 64}D0p"
    record = Record("granted", "send", connection, subject, "", "", RULE, path, "rw")
    return encode_fields(fields(record, {"FDBROKER_RDEV": "116:2"}))


def refusal(number: int) -> bytes:
    """A refusal's record, for which the user varies all that it can, and makes it as long as it can."""
    return encode_fields(fields(_refused(number)))


def count(number: int) -> bytes:
    """The record that it came again."""
    return encode_fields(fields(_refused(number), {"FDBROKER_REPEATED": str(number)}, f" ({number} times more)"))


def _refused(number: int) -> Record:
    subject = _subject(number)
    made = random.Random(number)
    path = "/dev/" + "".join(map(chr, made.choices(range(0x20000, 0x2A000), k=limits.AUDIT_VALUE_CHARACTERS)))
    return Record("refused", "authorize", number, subject, "a deny rule for everyone", "policy", RULE, path, "rw")


def message(length: int, *, first: bool) -> Callable[[int], bytes]:
    """A message's record of so many random characters, as inbox/topics.py writes it; `first` of its connection."""

    def make(number: int) -> bytes:
        connection = number if first else number % 1000
        uid = 100_000 + connection % 65_536
        values = {"MESSAGE": f"message {number} on topic inbox from uid {uid}", "MESSAGE_ID": f"{7:032x}"}
        values |= {"PRIORITY": "6", "SYSLOG_IDENTIFIER": "fdbroker", "FDBROKER_TOPIC": "inbox"}
        values |= {"FDBROKER_NUMBER": str(number), "FDBROKER_UID": str(uid), "FDBROKER_GID": str(uid)}
        values |= {"FDBROKER_PID": str(connection), "FDBROKER_OWNER": "1000"}
        return encode_fields({**values, "FDBROKER_PAYLOAD": os.urandom(length // 2).hex()})

    return make


def of_refusals(lines: list[str], sock: socket.socket) -> float:
    """A day's: at once, and then one in some seconds, each with its count, and the count of all others."""
    first, again = measured(sock, refusal, 2000), measured(sock, count, 2000)
    most = limits.AUDIT_BURST + DAY_S / limits.AUDIT_SECONDS_PER_REFUSAL
    windows = DAY_S / limits.AUDIT_REPEAT_SECONDS
    day = most * (first + again) + windows * again
    lines.append(f"its refusals: {most:,.0f}, the first {first:.0f} bytes, its count {again:.0f}")
    lines.append(f"    a day: {day / GIB:.2f} GiB")
    return day


def main() -> int:
    """Write the table to the file that is named. Returns 1 when a day is over the 4 GiB that journald keeps at most."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.settimeout(_PATIENCE_S)
    sock.connect("/run/systemd/journal/socket")
    rate, burst = (limits.USER_LIMITS[name].default for name in ("records_per_second", "record_burst"))
    records = rate * DAY_S + burst
    lines = [f"records a day: {records:,}"]

    def most(name: str, first: float, further: float, cost: int, more: int) -> float:
        day = max(records / more * first, records / cost * further)
        lines.append(f"{name}: the first {first:.0f} bytes for {more} records, a further one {further:.0f} for {cost}")
        lines.append(f"    a day: {day / GIB:.2f} GiB")
        return day

    sums = most(
        "a connection's grants",
        measured(sock, first_grant),
        measured(sock, further_grant),
        1,
        1 + limits.RECORDS_PER_CONNECTION,
    )
    of_messages = 0.0
    for length in LENGTHS:
        first, further = (measured(sock, message(length, first=one), length) for one in (True, False))
        cost = limits.RECORDS_PER_MESSAGE + length // limits.BYTES_PER_RECORD
        of_messages = max(of_messages, most(f"its messages of {length:,} bytes", first, further, cost, cost))
    sums += of_messages
    sums += of_refusals(lines, sock)
    lines.append(f"one owner's day, grants, messages, and refusals: {sums / GIB:.2f} GiB")
    Path(sys.argv[1]).write_text("\n".join(lines) + "\n")
    return 0 if sums < 4 * GIB else 1


if __name__ == "__main__":
    sys.exit(main())
