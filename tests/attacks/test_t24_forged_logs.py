"""T24: what a client wrote forges log fields or terminal output."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import floods
from harness import ALICE, EVERYONE_NULL, NO_RATES, Raw, as_user, ask, outcome, resident_bytes, running

from fdbroker.kernel.records import Records
from fdbroker.limits import every as limits
from fdbroker.terms import Subject
from fdbroker.wire.audit import KINDS, Record, fields
from fdbroker.wire.journal import escaped

DOCS = Path(__file__).resolve().parents[2] / "docs" / "operating.md"
FIELDS = set(re.findall(r"^\| `([A-Z_]+)` \|", DOCS.read_text(), re.MULTILINE))

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
    record = Record("refused", "authorize", 1, subject, f"because {NASTY}", "", "", NASTY, "ro")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        Records(ours).write(fields(record))
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
    """Those of grants and counts are added by opener and keeper: tests/opener/test_records.py, tests/keeper."""
    added = {"FDBROKER_RDEV", "FDBROKER_NAMESPACE", "FDBROKER_COUNT", "FDBROKER_REPEATED"}
    subject = Subject(5, frozenset(), 5, 7, "comm", "label", foreign=True)
    for kind in KINDS:
        record = Record(kind, "send", 1, subject, "why", "cause", "p.yaml:1", "/dev/a", "ro")
        assert set(fields(record)) | added == FIELDS


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


def test_whatever_a_client_varies_it_makes_so_many_records_and_no_more(dev):
    """Nor is what was refused kept: by the keeper, which counts it, or on its way there by opener and inbox."""
    with running(EVERYONE_NULL + NO_RATES) as broker, Raw(broker.socket) as client:

        def deny(count):
            for _ in range(count):
                assert outcome(client.open(f"/dev/{next(numbers)}" + "\U0001f600" * 1000)) == "Denied"

        numbers = itertools.count()
        deny(500)
        before = {name: resident_bytes(pid) for name, pid in broker.pids.items()}
        deny(1500)
        grown = {name: resident_bytes(pid) - before[name] for name, pid in broker.pids.items()}
        assert len(broker.records()) <= limits.AUDIT_REFUSALS + 2
        assert all(len(line) < 4096 for line in broker.text().splitlines())
        assert max(grown.values()) < 2_000_000, grown


def test_counts_are_written_at_the_end(dev):
    with running(EVERYONE_NULL) as broker:
        for _ in range(20):
            ask(broker.socket, "/dev/zero")
        broker.stop()
        assert [record.get("FDBROKER_REPEATED") for record in broker.records("refused")] == [None, "19"]


def test_identical_refusals_are_counted_and_grants_never(dev):
    with running(EVERYONE_NULL) as broker:
        for _ in range(50):
            ask(broker.socket, "/dev/zero")
            ask(broker.socket, "/dev/null")
        assert len(broker.records("granted")) == 50
        refused = [record for record in broker.records("refused") if record["FDBROKER_RESOURCE"] == "/dev/zero"]
        assert len(refused) < 5
        assert os.getpid() == int(json.loads(json.dumps(refused[0]))["FDBROKER_PID"])


def _takes_slowly(address):
    """A client whose answers never come to an end: it takes something of them each second, and asks again."""
    describe = (
        b'{"method":"org.varlink.service.GetInterfaceDescription","parameters":{"interface":"io.fdbroker.Broker"}}\0'
    )
    with floods.connected(address) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                sock.send(describe * 100)
        while True:
            time.sleep(0.8)
            with contextlib.suppress(BlockingIOError):
                for _ in range(4):
                    sock.recv(65536)
                sock.send(describe)


def test_counts_are_written_at_the_stop_whoever_takes_its_answers_slowly(dev, monkeypatch):
    """DRAIN_SECONDS after it is told to stop, the inbox waits for nobody; before, the opener was killed with its counts."""
    monkeypatch.setitem(floods.FLOODS, "slowly", _takes_slowly)
    with running(EVERYONE_NULL) as broker, floods.flooding(broker.socket, "slowly"):

        def denied():
            with Raw(broker.socket) as client:
                return [outcome(client.open("/dev/mem")) for _ in range(9)]

        assert as_user(ALICE, [], denied) == ["Denied"] * 9
        time.sleep(1)
        began_s = time.monotonic()
        assert broker.stop() == 0
        assert time.monotonic() - began_s > limits.DRAIN_SECONDS / 2  # it was there, and slow
        assert [record.get("FDBROKER_REPEATED") for record in broker.records("refused")] == [None, "8"]
        assert "did not end in time" not in broker.text()
