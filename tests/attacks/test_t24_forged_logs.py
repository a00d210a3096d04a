"""T24: what a client wrote forges log fields or terminal output."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

from harness import ALICE, EVERYONE_NULL, as_user, ask, running

from fdbroker.opener.audit import FIELDS, Audit, Record, fields
from fdbroker.terms import Resource, Subject
from fdbroker.wire.journal import escaped

NASTY = "/dev/x\nMESSAGE=root granted\nFDBROKER_UID=0\x1b[2J\u202e\\n\0\u2028"


def _parse(datagram):
    """The journal's own way to read it."""
    found = []
    while datagram:
        line, _, rest = datagram.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            size = int.from_bytes(rest[:8], "little")
            value, rest = rest[8 : 8 + size], rest[8 + size + 1 :]
        found.append((name.decode(), value))
        datagram = rest
    return found


def test_a_path_is_one_escaped_value_and_never_a_field():
    subject = Subject(5, frozenset(), 5, 7, "co\nmm=x", "la\nbel=y", foreign=True)
    record = Record("refused", "authorize", 1, subject, Resource(NASTY, "ro"), f"because {NASTY}")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        Audit(ours).write(record)
        found = _parse(theirs.recv(65536))
    names = [name for name, _ in found]
    assert len(names) == len(set(names))
    assert set(names) <= set(FIELDS)
    values = dict(found)
    assert values["FDBROKER_UID"] == b"5"
    for value in values.values():
        assert value.decode().isprintable()
    assert values["FDBROKER_RESOURCE"].decode() == escaped(NASTY)


def test_escaping_is_unambiguous():
    assert escaped("a\\nb") != escaped("a\nb")
    assert escaped("plain/ä") == "plain/ä"


def test_the_fields_of_every_kind_are_the_documented_ones():
    for kind in ("granted", "refused", "undone", "turned-away", "violation", "disconnected"):
        record = Record(kind, "send", 1, None, None, "why")
        assert set(fields(record, 3)) <= set(FIELDS)


def test_the_service_and_the_command_line_print_nothing_raw(dev):
    with running(EVERYONE_NULL) as broker:
        assert as_user(ALICE, [], ask, broker.socket, NASTY) == "Denied"
        record = broker.records("refused")[0]
        assert record["FDBROKER_RESOURCE"] == escaped(NASTY)
        assert all(line.startswith(("{", "fdbroker:")) for line in broker.text().splitlines())
        result = subprocess.run(
            [sys.executable, "-I", "-m", "fdbroker", "open", "--socket", broker.socket, NASTY.replace("\0", "")],
            capture_output=True,
        )
        assert result.returncode == 77
        assert b"\x1b" not in result.stderr + result.stdout
        assert b"\nMESSAGE" not in result.stderr


def test_identical_refusals_are_counted_and_grants_never(dev):
    with running(EVERYONE_NULL) as broker:
        for _ in range(50):
            ask(broker.socket, "/dev/zero")
            ask(broker.socket, "/dev/null")
        assert len(broker.records("granted")) == 50
        refused = [record for record in broker.records("refused") if record["FDBROKER_RESOURCE"] == "/dev/zero"]
        assert len(refused) < 5
        assert os.getpid() == int(json.loads(json.dumps(refused[0]))["FDBROKER_PID"])
