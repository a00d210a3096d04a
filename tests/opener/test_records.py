"""What the opener writes itself and what it has the keeper write; and standard error in the journal's place."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from fdbroker.kernel.link import Link
from fdbroker.kernel.records import NotRecorded
from fdbroker.opener.audit import Audit
from fdbroker.terms import Device, DeviceRule, Grant, Namespace, Socket, Subject
from fdbroker.topics import TopicUse
from fdbroker.wire import keeper
from fdbroker.wire.audit import Record, fields

ALICE = Subject(5, frozenset(), 5, 7, "program", "label", foreign=True, owner=5)
RULE = DeviceRule("/dev/a", "ro", "", "", False, "everyone", "p.yaml:1")

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


@pytest.fixture
def audit():
    """One that writes to a socket of which the other end is `theirs`, and its end of the keeper's link."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    to_keeper, keepers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, to_keeper, keepers:
        theirs.setblocking(False)
        keepers.setblocking(False)
        yield SimpleNamespace(audit=Audit(ours, Link(to_keeper)), ours=ours, theirs=theirs, keepers=keepers)


def fill(sock):
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.send(b"x", socket.MSG_DONTWAIT)


def emptied(sock):
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.recv(10)


def written(sock):
    return dict(line.split("=", 1) for line in sock.recv(65536).decode().splitlines())


def test_a_refusal_is_said_to_the_keeper_and_not_written(audit):
    refused = Record("refused", "open", 3, ALICE, "why", "policy", "p.yaml:7", "/dev/a", "rw")
    audit.audit.refuse(refused)
    said = keeper.OPENER_TO_KEEPER.decode(audit.keepers.recv(65536))
    assert said == refused
    assert fields(said) == fields(refused)
    with pytest.raises(BlockingIOError):
        audit.theirs.recv(100)
    assert not audit.audit.owes


@pytest.mark.parametrize(
    "make",
    [
        lambda text: Namespace("net", text),
        lambda text: Socket(text, "inet", "stream"),
        lambda text: TopicUse("send", text),
        lambda text: Device(text, "ro"),
    ],
)
def test_a_refusal_takes_the_opener_no_longer_and_the_link_no_more_room_for_a_long_name(audit, make):
    """65,000 characters that cannot be printed took 22 ms to escape, for each of 32 records in ten seconds."""
    resource = make("\x7f" * 65_000)
    refused = Record("refused", "authorize", 1, ALICE, "no", "policy", "", resource.text, resource.access)
    began_s = time.thread_time()
    for _ in range(30):
        audit.audit.refuse(refused)
    assert time.thread_time() - began_s < 0.1
    assert len(audit.keepers.recv(200_000)) < 3000


def test_what_was_recorded_and_did_not_happen_is_said_later_if_not_now(audit):
    fill(audit.ours)
    undone = Record("undone", "send", 1, ALICE, "why", "", "", "/dev/a", "ro")
    for number, count in ((1, 1), (2, 3)):
        audit.audit.undo(undone._replace(connection=number), count)
    assert audit.audit.owes
    with pytest.raises(NotRecorded):  # nothing is granted meanwhile
        audit.audit.grant(1, ALICE, Grant(Device("/dev/a", "ro"), RULE), 1)
    audit.audit.flush()
    assert audit.audit.owes
    emptied(audit.theirs)
    audit.audit.flush()
    assert not audit.audit.owes
    found = [written(audit.theirs) for _ in range(2)]
    assert [(one["FDBROKER_CONNECTION"], one.get("FDBROKER_COUNT")) for one in found] == [("1", None), ("2", "3")]
    assert found[1]["MESSAGE"].endswith("undone ro /dev/a: why (3 of them)")


def test_equal_grants_are_one_record_with_their_count(audit):
    for count in (1, 2):
        audit.audit.grant(7, ALICE, Grant(Device("/dev/a", "ro"), RULE, "1:3"), count)
    found = [written(audit.theirs) for _ in range(2)]
    assert [one.get("FDBROKER_COUNT") for one in found] == [None, "2"]
    assert found[1]["FDBROKER_RDEV"] == "1:3"
    assert found[1]["MESSAGE"] == "uid 5 pid 7 granted ro /dev/a by p.yaml:1 (2 of them)"


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
