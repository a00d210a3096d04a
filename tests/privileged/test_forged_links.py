"""What a taken-over process can say to the others, over the real links of a running broker, behind its confinement.

The formats and turns one by one: tests/flow/test_opener.py, tests/opener/test_ask.py, tests/wire/.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import harness
import pytest
import takeover
from harness import BOB, Broker, Raw, as_user, descriptors_of, outcome, running, status_of

from fdbroker.errors import OpenFailed
from fdbroker.terms import Device, Namespace
from fdbroker.wire import admin, link, worker

POLICY = """
version: 1
everyone: {devices: [{path: /dev/null, access: rw}], namespaces: [{type: [net, uts], of: caller}, {type: uts, create: true}]}
"""
NULL, ZERO = Device("/dev/null", "ro"), Device("/dev/zero", "ro")
NET = {"namespace": {"type": "net", "pid": 1}}
Said = tuple[bytes, int]


@contextlib.contextmanager
def forging(process: str, to: str, messages: Sequence[Said], after: int = 0, *, stay: bool = False) -> Iterator[Broker]:
    """A broker in which that process says these, with so many descriptors each, once it has heard `after` messages."""
    with harness.folder() as place:
        said = [(data.hex(), descriptors) for data, descriptors in messages]
        told = {"process": process, "to": to, "messages": said, "after": after, "stay": stay}
        (place / "forge").write_text(json.dumps(told))
        with running(POLICY, program=takeover.program(str(place), store=False)) as broker:
            broker.expected_code = None
            yield broker


def _lives(pid: int) -> bool:
    try:
        return not status_of(pid)["State"].startswith("Z")  # whoever is process 1 may not wait for it
    except FileNotFoundError:
        return False


def _ended(broker: Broker) -> str:
    """The service ends as a failed one, all of it; what it says about that."""
    assert broker.process.wait(20) == 70, broker.text()
    end = time.monotonic() + 10
    while left := [name for name, pid in broker.pids.items() if _lives(pid)]:
        assert time.monotonic() < end, left
        time.sleep(0.02)
    return broker.text()


# An inbox is first told the topics and which policy is in force, then of each client that connects.
FIRST_CLIENT, SECOND_CLIENT = 3, 4
TO_OPENER = {
    "unknown": ([(b"\xff", 0)], "unknown message type 255"),
    "a word of the launcher's": ([(link.LAUNCHER_TO_OPENER.encode(link.Policy(2)), 0)], "cut at 5"),
    "empty": ([(b"", 0)], "gone"),
    "too long": ([(b"x" * 140000, 0)], "at most"),
    "of nobody": ([(link.INBOX_TO_OPENER.encode(link.Open(7, (NULL,))), 0)], "does not exist"),
    "of one that is closed": (
        [(link.INBOX_TO_OPENER.encode(link.Closed(1, 0)), 0), (link.INBOX_TO_OPENER.encode(link.Open(1, (NULL,))), 0)],
        "does not exist",
    ),
    "while it watches": (
        [
            (link.INBOX_TO_OPENER.encode(link.List(1, watch=True)), 0),
            (link.INBOX_TO_OPENER.encode(link.Open(1, (NULL,))), 0),
        ],
        "watching",
    ),
    "drained without being told": ([(link.DRAINED, 0)], "without being told"),
    "an answer to no question": ([(link.PONG, 0)], "without a Ping"),
}


@pytest.mark.parametrize("case", TO_OPENER)
def test_an_inbox_that_breaks_its_rules_ends_the_service_and_that_is_recorded(dev, case):
    messages, why = TO_OPENER[case]
    with forging("inbox", "opener", messages, after=FIRST_CLIENT) as broker, Raw(broker.socket) as client:
        text = _ended(broker)
        assert why in text
        assert client.reply() is None
        assert not broker.records("granted")


@pytest.mark.parametrize("message", [link.PONG, link.STOP_ASKED, b"\xff"], ids=["pong", "stop", "unknown"])
def test_an_inbox_cannot_speak_to_the_launcher_for_the_opener(dev, message):
    with forging("inbox", "launcher", [(message, 0)], after=FIRST_CLIENT) as broker, Raw(broker.socket):
        assert f"unknown message type {message[0]}" in _ended(broker)


def _waits(address: str, seconds: float = 15) -> list[object]:
    """A client that says nothing: the rdev of what it gets, and by which rule, or nothing."""
    with Raw(address) as client:
        client.sock.settimeout(seconds)
        try:
            reply = client.reply()
        except TimeoutError:
            return []
        return [outcome(reply), len(client.descriptors), *(os.fstat(one).st_rdev for one in client.descriptors)]


def test_in_anothers_name_it_is_the_others_descriptor_and_the_others_record(dev):
    """The inbox attaches descriptors of its own, and asks for more than the policy gives: neither gets anywhere."""
    messages = [
        (link.INBOX_TO_OPENER.encode(link.Open(1, (ZERO,))), 5),
        (link.INBOX_TO_OPENER.encode(link.Open(1, (NULL,))), 5),
    ]
    with forging("inbox", "opener", messages, after=SECOND_CLIENT) as broker:
        before = len(descriptors_of(broker.pids["opener"]))
        with Raw(broker.socket) as watcher:  # connection 1, of root's
            assert as_user(BOB, [], _waits, broker.socket, 2) == []  # connection 2
            assert outcome(watcher.reply()) == "granted"
            assert [os.fstat(one).st_rdev for one in watcher.descriptors] == [os.makedev(1, 3)]
        (record,) = broker.records("granted")
        assert record["FDBROKER_UID"] == "0"
        (refused,) = broker.records("refused")
        assert refused["FDBROKER_RESOURCE"] == "/dev/zero"
        assert len(descriptors_of(broker.pids["opener"])) <= before + 2  # the two connections
        assert broker.process.poll() is None


def test_a_flood_of_questions_whose_answers_it_does_not_read_stops_at_what_the_link_holds(dev):
    """The opener then reads nothing more from it, grows no further, and lives."""
    messages = [(link.INBOX_TO_OPENER.encode(link.Open(1, (ZERO,))), 0)] * 20000
    with forging("inbox", "opener", messages, after=FIRST_CLIENT) as broker, Raw(broker.socket):
        broker.wait_for("refused", 20)
        time.sleep(2)
        assert broker.process.poll() is None
        assert int(status_of(broker.pids["opener"])["VmRSS"].split()[0]) < 200_000
        before = _cpu(broker.pids["opener"])
        time.sleep(1)
        assert _cpu(broker.pids["opener"]) - before < 50  # of 100 ticks


def _cpu(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return int(fields[11]) + int(fields[12])


@pytest.mark.parametrize("process", ["opener", "inbox", "namespaces", "witness"])
@pytest.mark.parametrize("launcher_is", ["killed", "stopped"])
def test_who_does_not_end_by_itself_ends_with_the_launcher(dev, process, launcher_is):
    with forging(process, "opener" if process == "namespaces" else "launcher", [], stay=True) as broker:
        broker.process.kill() if launcher_is == "killed" else broker.process.terminate()
        broker.process.wait(20)
        end = time.monotonic() + 10
        while left := [name for name, pid in broker.pids.items() if _lives(pid)]:
            assert time.monotonic() < end, left
            time.sleep(0.02)


# ---- a taken-over opener

TO_INBOX = {
    "unknown": (b"\xff", 0),
    "a connection without its socket": (link.READY, 0),
    "with many descriptors": (link.DRAIN, 5),
}


@pytest.mark.parametrize("case", TO_INBOX)
def test_an_opener_that_breaks_the_links_rules_ends_the_service(dev, case):
    with forging("opener", "inbox", [TO_INBOX[case]], after=1) as broker, Raw(broker.socket):
        assert "ended with" in _ended(broker)


@pytest.mark.parametrize(
    ("message", "why"),
    [(b"\xff", "unknown message type"), (b"\x04", "Applied: cut at 1 bytes"), (link.RESTART, "unknown message type")],
    ids=["unknown", "cut", "of the launcher"],
)
def test_an_opener_can_tell_the_launcher_a_few_words_only(dev, message, why):
    with forging("opener", "launcher", [(message, 0)], after=1) as broker, Raw(broker.socket):
        assert why in _ended(broker)


@pytest.mark.parametrize(
    ("message", "descriptors"),
    [
        (b"\xff", 0),
        (worker.TO_WORKER.encode(worker.Ask(1, 1, Namespace("net", "x"), 1))[:-1], 0),
        (link.STOP, 0),
    ],
    ids=["unknown", "cut", "of the launcher"],
)
def test_a_worker_that_is_told_nonsense_ends_and_is_started_again(dev, message, descriptors):
    with forging("opener", "worker", [(message, descriptors)], after=1) as broker, Raw(broker.socket):
        broker.wait_for("the namespaces worker ended with", 20)
        assert broker.process.poll() is None


# ---- a taken-over worker, which was asked one question

ASKED = {"namespace": {"type": "uts", "pid": None}}
MADE = worker.FROM_WORKER.encode(worker.Made(1, 5, 0, ()))
TO_OPENER_BY_WORKER = {
    "unknown": (b"\xff", 0),
    "no descriptor": (MADE, 0),
    "one descriptor of two": (MADE, 1),
    "many descriptors": (MADE, 9),
    "a grant by a refusal's form": (link.OPENER_TO_INBOX.encode(link.Outcome(1, None)), 0),
    "a refusal with a descriptor": (worker.FROM_WORKER.encode(worker.Failed(1, OpenFailed(5))), 1),
}


@pytest.mark.parametrize("case", TO_OPENER_BY_WORKER)
def test_a_worker_that_breaks_its_rules_ends_the_service(dev, case):
    with harness.own_network(), forging("namespaces", "opener", [TO_OPENER_BY_WORKER[case]], after=1) as broker:
        with Raw(broker.socket) as client:
            client.send_call(
                "io.fdbroker.Broker.Open", {"resources": [{"namespace": {"type": "uts", "pid": os.getpid()}}]}
            )
            _ended(broker)
        assert not broker.records("granted")


def test_what_a_worker_answers_to_no_question_is_closed(dev):
    with harness.own_network():
        messages = [(worker.FROM_WORKER.encode(worker.Made(99, 5, 0, ())), 2)] * 50
        with forging("namespaces", "opener", messages) as broker:
            time.sleep(1)
            before = broker.idle["opener"]
            assert harness.ask(broker.socket, "/dev/null") == "granted"
            end = time.monotonic() + 60
            while len(descriptors_of(broker.pids["opener"])) > before:
                assert time.monotonic() < end
                time.sleep(0.02)


# ---- a taken-over witness, which was asked about one administrator

RELOAD = "io.fdbroker.Admin.Reload"
YES = link.WITNESS_TO_LAUNCHER.encode(admin.Judged(1, home=True))
TO_LAUNCHER_BY_WITNESS = {
    "unknown": (b"\xff", 0, "unknown message type 255"),
    "cut": (YES[:-1], 0, f"cut at {len(YES) - 1} bytes"),
    "neither yes nor no": (YES[:-1] + b"\2", 0, "a number of value 2"),
    "with a descriptor": (YES, 1, "descriptors were cut"),
    "to stop": (link.STOP_ASKED, 0, f"unknown message type {link.STOP_ASKED[0]}"),
    "to reload": (link.OPENER_TO_LAUNCHER.encode(admin.ReloadAsked(1)), 0, "unknown message type 13"),
}


@pytest.mark.parametrize("case", TO_LAUNCHER_BY_WITNESS)
def test_a_witness_that_breaks_its_rules_ends_the_service(dev, case):
    message, descriptors, why = TO_LAUNCHER_BY_WITNESS[case]
    with forging("witness", "launcher", [(message, descriptors)], after=1) as broker, Raw(broker.socket) as client:
        client.send_call(RELOAD)
        assert why in _ended(broker)
        assert client.reply() is None
        assert not broker.records("reloading")


def test_a_witness_cannot_make_an_administrator_of_who_is_none(dev):
    """It says yes for all: for one that does not ask, one that asked and is none, one that does not exist."""
    messages = [(link.WITNESS_TO_LAUNCHER.encode(admin.Judged(number, home=True)), 0) for number in (1, 2, 99, 3)]
    with forging("witness", "launcher", messages, after=1, stay=True) as broker:
        broker.expected_code = None  # it does not end when it is told to
        with Raw(broker.socket) as silent:  # connection 1
            silent.open("/dev/null")
            assert as_user(BOB, [], _reloads, broker.socket) == "Denied"  # connection 2
            assert _reloads(broker.socket) == "granted"  # connection 3, of root's
            assert outcome(silent.open("/dev/null")) == "granted"
        (record,) = broker.records("reloading")
        assert record["FDBROKER_CONNECTION"] == "3"
        assert broker.process.poll() is None


def test_a_witness_can_refuse_administrators(dev):
    with forging(
        "witness", "launcher", [(link.WITNESS_TO_LAUNCHER.encode(admin.Judged(1, home=False)), 0)], after=1, stay=True
    ) as broker:
        broker.expected_code = None
        assert _reloads(broker.socket) == "Denied"
        assert not broker.records("reloading")
        assert broker.process.poll() is None


def _reloads(address: str) -> str:
    with Raw(address) as client:
        return outcome(client.call(RELOAD))
