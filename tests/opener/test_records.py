"""Refusals: whose each record is; and standard error in the journal's place."""

from __future__ import annotations

import json
import select
import subprocess
import sys
import time

import pytest

from fdbroker import limits
from fdbroker.opener.audit import Audit, Record
from fdbroker.terms import Device, Namespace, Socket, Subject, TopicUse

PROGRAM = """
from fdbroker.kernel.records import Records
records = Records(None)
for _ in range(40):
    try:
        records.write({"MESSAGE": "m", "FDBROKER_PAYLOAD": %r * 20_000})
    except Exception as error:
        print(type(error).__name__)
        break
"""


def test_refusals_of_other_uids_of_an_owner_and_of_other_access_are_records_of_their_own():
    audit, written = Audit(None), []
    audit.write = written.append
    for uid, access in ((100_001, "ro"), (100_002, "ro"), (100_002, "rw"), (100_002, "rw")):
        subject = Subject(uid, frozenset(), uid, 1, "", "", foreign=True, owner=1000)
        audit.refuse(Record("refused", "authorize", 1, subject, Device("/dev/x", access), "no", cause="policy"), 0.0)
    assert [(one.subject.uid, one.resource.access) for one in written] == [
        (100_001, "ro"),
        (100_002, "ro"),
        (100_002, "rw"),
    ]


@pytest.mark.parametrize(
    "make",
    [
        lambda text: Namespace("net", text),
        lambda text: Socket(text, "inet", "stream"),
        lambda text: TopicUse("send", text),
        lambda text: Device(text, "ro"),
    ],
)
def test_of_a_long_name_no_more_is_kept_or_escaped_than_a_record_has(make):
    """65,000 characters that cannot be printed took 22 ms to escape, for each of 32 records in ten seconds."""
    audit, written = Audit(None), []
    audit._records.put = written.append
    subject = Subject(5, frozenset(), 5, 1, "", "", foreign=True, owner=5)
    began_s = time.thread_time()
    for number in range(30):
        record = Record("refused", "authorize", 1, subject, make(f"{number}" + "\x7f" * 65_000), "no", cause="policy")
        audit.refuse(record, 0.0)
        audit.refuse(record, 0.0)
    assert time.thread_time() - began_s < 0.1
    assert len(written) == 30
    assert {len(json.loads(line)["FDBROKER_RESOURCE"]) for line in written} == {limits.AUDIT_VALUE_CHARACTERS}
    kept = [record for record, _ in audit._windows[5].first.values()]
    assert max(len(record.resource.text) for record in kept) <= limits.AUDIT_VALUE_CHARACTERS
    assert {record.resource.access for record in kept} == {make("x").access}


def test_a_pipe_in_the_journals_place_is_never_waited_for_and_a_long_record_is_cut():
    child = subprocess.Popen([sys.executable, "-c", PROGRAM % "x"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout.read() == b"NotRecorded\n"  # the pipe is full, and nobody has read
    lines = child.stderr.read().splitlines(keepends=True)
    child.wait()
    child.stdout.close()
    child.stderr.close()
    assert len(lines) > 1
    for line in lines:
        said = json.loads(line)
        assert (len(line) <= select.PIPE_BUF, said["MESSAGE"], said["FDBROKER_CUT"]) == (True, "m", "1")
        assert len(said["FDBROKER_PAYLOAD"]) > 1000


def test_no_character_of_a_record_commands_a_terminal(capfd):
    wild = "\x1b[2J\x9b1m\x7f\u202e\u2028€"
    subprocess.run(
        [sys.executable, "-c", f"from fdbroker.kernel.records import Records; Records(None).write({{'A': {wild!r}}})"],
        check=True,
    )
    line = capfd.readouterr().err
    assert line.strip().isprintable()
    assert json.loads(line) == {"A": wild}
