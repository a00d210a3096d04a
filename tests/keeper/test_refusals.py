"""What is written of refusals: which are the same, when counts are written, and how many records one owner makes."""

from __future__ import annotations

import contextlib
import json
import socket
import time

import pytest

from fdbroker.keeper.refusals import Refusals
from fdbroker.kernel.records import NotRecorded
from fdbroker.limits import every as limits
from fdbroker.terms import Device, Namespace, Socket, Subject
from fdbroker.topics import TopicUse
from fdbroker.wire.audit import Record, fields

REPEAT_S = limits.AUDIT_REPEAT_SECONDS
ALICE = Subject(5, frozenset(), 5, 7, "program", "label", foreign=True, owner=5)
REFUSED = Record("refused", "authorize", 1, ALICE, "why", "", "", "/dev/a", "ro")


class Journal:
    """Stands for the records; takes none while it is `full`."""

    def __init__(self):
        self.full = False
        self.written = []

    def write(self, values):
        if self.full:
            raise NotRecorded("EAGAIN")
        self.written.append(values)

    def counts(self):
        """How often each came again, None for the first one; those written since the last time."""
        written, self.written = self.written, []
        return [record.get("FDBROKER_REPEATED") for record in written]


@pytest.fixture
def refusals():
    one = Refusals(None)
    one._records = Journal()
    return one


def different(number):
    return REFUSED._replace(resource=f"/dev/{number}")


def test_the_same_is_written_once_and_its_count_when_its_time_is_over(refusals):
    journal = refusals._records
    for _ in range(4):
        refusals.add(REFUSED, 100.0)
    (first,) = journal.written
    assert first == fields(REFUSED)
    assert journal.counts() == [None]
    assert refusals.timeout_s(103.0) == REPEAT_S - 3
    refusals.flush(105.0)
    assert journal.counts() == []
    refusals.flush(100.0 + limits.AUDIT_REPEAT_SECONDS)
    (count,) = journal.written
    assert count == first | {"FDBROKER_REPEATED": "3", "MESSAGE": f"{first['MESSAGE']} (3 times more)"}
    assert refusals.timeout_s(200.0) == -1


def test_what_came_once_has_no_count_and_is_new_in_the_next_window(refusals):
    for at_s in (100.0, 100.0 + REPEAT_S):
        refusals.flush(at_s)
        refusals.add(REFUSED, at_s)
    refusals.flush(300.0)
    assert refusals._records.counts() == [None, None]


def test_above_so_many_different_ones_only_their_number_and_owner_is_said(refusals):
    journal = refusals._records
    for number in range(limits.AUDIT_REFUSALS + 5):
        refusals.add(different(number), 100.0)
    assert journal.counts() == [None] * limits.AUDIT_REFUSALS
    refusals.flush(100.0, everything=True)
    (others,) = journal.written
    # nothing that is of one of them alone, for it would be said of all
    named = {"FDBROKER_RESOURCE", "FDBROKER_UID", "FDBROKER_PID", "FDBROKER_COMM", "FDBROKER_STAGE", "FDBROKER_RULE"}
    assert not named & others.keys()
    assert (others["FDBROKER_OWNER"], others["FDBROKER_CAUSE"], others["FDBROKER_REPEATED"]) == ("5", "others", "5")
    assert others["MESSAGE"].startswith("uids of 5 refused: other refusals of this owner")


def test_refusals_of_other_uids_of_an_owner_and_of_other_access_are_records_of_their_own(refusals):
    for uid, access in ((100_001, "ro"), (100_002, "ro"), (100_002, "rw"), (100_002, "rw")):
        subject = ALICE._replace(uid=uid, owner=1000)
        refusals.add(REFUSED._replace(subject=subject, resource="/dev/x", access=access), 0.0)
    assert [(one["FDBROKER_UID"], one["FDBROKER_ACCESS"]) for one in refusals._records.written] == [
        ("100001", "ro"),
        ("100002", "ro"),
        ("100002", "rw"),
    ]


def test_numbers_in_a_reason_make_no_other_refusal_where_it_has_a_cause(refusals):
    for number in range(3):
        refusals.add(REFUSED._replace(reason=f"in {number} ms", cause="rate"), 0.0)
        refusals.add(REFUSED._replace(reason=f"in {number} ms"), 0.0)
    assert refusals._records.counts() == [None] * 4


def test_who_is_unknown_has_a_window_as_an_owner_has(refusals):
    for number in range(limits.AUDIT_REFUSALS + 2):
        refusals.add(REFUSED._replace(subject=None, reason=f"{number}"), 0.0)
    refusals.add(REFUSED, 0.0)
    refusals.flush(0.0, everything=True)
    assert refusals._records.counts() == [None] * limits.AUDIT_REFUSALS + [None, "2"]


def test_one_owner_makes_no_more_records_in_a_day_than_there_is_room_for(refusals):
    """Of whatever flood: each second a hundred refusals that are all different."""
    journal, now_s, seconds = refusals._records, 1000.0, 3600
    for second in range(seconds):
        for number in range(100):
            refusals.add(different((second, number)), now_s + second)
            refusals.add(different((second, number)), now_s + second)
        refusals.flush(now_s + second)
    refusals.flush(now_s + seconds, everything=True)
    firsts = sum("FDBROKER_REPEATED" not in one for one in journal.written)
    most = limits.AUDIT_BURST + seconds / limits.AUDIT_SECONDS_PER_REFUSAL
    assert most - 2 <= firsts <= most + 1
    assert len(journal.written) <= 2 * firsts + seconds / REPEAT_S + 1
    counted = sum(int(one.get("FDBROKER_REPEATED", "0")) for one in journal.written)
    assert firsts + counted == seconds * 200  # and each is in a count


def test_one_owners_flood_uses_up_no_others_records(refusals):
    for number in range(limits.AUDIT_BURST * 2):
        refusals.add(different(number), 100.0 + number // limits.AUDIT_REFUSALS * REPEAT_S / 50)
        refusals.flush(1e6, everything=True)
    refusals._records.counts()
    refusals.add(different("x"), 100.0)
    assert refusals._records.counts() == []
    refusals.add(REFUSED._replace(subject=ALICE._replace(owner=6)), 100.0)
    assert refusals._records.counts() == [None]


def test_only_buckets_that_are_full_again_are_forgotten(refusals, monkeypatch):
    monkeypatch.setattr("fdbroker.keeper.refusals._BUCKETS_KEPT", 3)
    for owner, at_s in ((1, 100.0), (2, 100.0), (2, 100.0), (3, 103.0)):
        refusals.add(different(len(refusals._records.written))._replace(subject=ALICE._replace(owner=owner)), at_s)
    refusals.add(REFUSED._replace(subject=ALICE._replace(owner=4)), 100.0 + limits.AUDIT_SECONDS_PER_REFUSAL)
    assert sorted(refusals._buckets) == [2, 3, 4]


def test_what_the_journal_does_not_take_is_counted_and_said_later(refusals):
    journal = refusals._records
    journal.full = True
    for _ in range(4):
        refusals.add(REFUSED, 100.0)
    for at_s in (200.0, 200.5):
        refusals.flush(at_s)
        assert 0 < refusals.timeout_s(at_s) <= 1  # nothing spins
    journal.full = False
    refusals.flush(201.0)
    assert journal.counts() == ["4"]
    assert refusals.timeout_s(201.0) == -1


def test_each_count_is_written_once_though_the_journal_was_full_after_the_first(refusals):
    journal = refusals._records
    for number in (1, 1, 2, 2):
        refusals.add(different(number), 100.0)
    assert journal.counts() == [None, None]
    write = journal.write

    def write_one(values):
        write(values)
        journal.full = True

    journal.write = write_one
    refusals.flush(200.0)
    assert journal.counts() == ["1"]
    journal.full = False
    refusals.flush(300.0)
    assert [one["FDBROKER_RESOURCE"] for one in journal.written] == ["/dev/2"]


def test_a_full_journal_is_waited_for_neither_at_once_nor_at_the_end():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        with contextlib.suppress(BlockingIOError):
            while True:
                ours.send(b"x", socket.MSG_DONTWAIT)
        one = Refusals(ours)
        began_s = time.monotonic()
        for number in range(100):
            one.add(different(number), 100.0)
        one.flush(100.0, everything=True)
        assert time.monotonic() - began_s < 1


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
    one, written = Refusals(None), []
    one._records.put = written.append
    began_s = time.thread_time()
    for number in range(30):
        asked = make(f"{number}" + "\x7f" * 65_000)
        record = REFUSED._replace(resource=asked.text, access=asked.access)
        one.add(record, 0.0)
        one.add(record, 0.0)
    assert time.thread_time() - began_s < 0.1
    assert len(written) == 30
    assert {len(json.loads(line)["FDBROKER_RESOURCE"]) for line in written} == {limits.AUDIT_VALUE_CHARACTERS}
    kept = [record for record, _ in one._windows[5].first.values()]
    assert max(len(record.resource) for record in kept) <= limits.AUDIT_VALUE_CHARACTERS
    assert {record.access for record in kept} == {make("x").access}
