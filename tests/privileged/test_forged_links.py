"""What a taken-over process can say to the others, over the real links of a running broker, behind its confinement.

The formats and turns one by one: tests/flow/test_opener.py, tests/opener/test_ask.py, tests/wire/.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import harness
import pytest
import takeover
from fakes import came
from harness import BOB, Broker, Raw, as_user, descriptors_of, outcome, running, status_of

from fdbroker.errors import LinkViolation, OpenFailed
from fdbroker.keeper.refusals import Refusals
from fdbroker.keeper.service import Keeper
from fdbroker.kernel import inotify
from fdbroker.kernel.link import Link
from fdbroker.kernel.sealed import sealed_memfd
from fdbroker.limits.keeper import AUDIT_REFUSALS
from fdbroker.nodes.find import Finder
from fdbroker.offers import Offer
from fdbroker.policy.compile import load_policy
from fdbroker.policy.compiled import to_bytes
from fdbroker.terms import Device, Namespace
from fdbroker.topics import TopicUse
from fdbroker.wire import admin, keeper, link, lists, worker
from fdbroker.wire.audit import Record
from fdbroker.wire.connections import Use
from fdbroker.wire.launcher import (
    DRAINED,
    KEEPER_TO_LAUNCHER,
    LAUNCHER_TO_KEEPER,
    RESTART,
    STOP,
    STOP_ASKED,
    WITNESS_TO_LAUNCHER,
)

POLICY = """
version: 1
everyone: {devices: [{path: /dev/null, access: rw}], namespaces: [{type: [net, uts], of: caller}, {type: uts, create: true}]}
"""
NULL, ZERO = Device("/dev/null", "ro"), Device("/dev/zero", "ro")
NET = {"namespace": {"type": "net", "pid": 1}}
Said = tuple[bytes, int]


@contextlib.contextmanager
def forging(
    process: str,
    to: str,
    messages: Sequence[Said],
    after: int = 0,
    *,
    stay: bool = False,
    deaf: bool = False,
    limits: dict[str, int] | None = None,
) -> Iterator[Broker]:
    """A broker in which that process says these, with so many descriptors each, once it has heard `after` messages.

    `limits` are other ones for its launcher.
    """
    with harness.folder() as place:
        said = [(data.hex(), descriptors) for data, descriptors in messages]
        told = {"process": process, "to": to, "messages": said, "after": after, "stay": stay, "deaf": deaf}
        (place / "forge").write_text(json.dumps(told))
        with running(POLICY, program=takeover.program(str(place), store=False, limits=limits)) as broker:
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


# An inbox is told of each client that connects.
FIRST_CLIENT, SECOND_CLIENT = 1, 2
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
    "while it waits for a reload": (
        [
            (link.INBOX_TO_OPENER.encode(admin.Reload(1)), 0),
            (link.INBOX_TO_OPENER.encode(link.Open(1, (NULL,))), 0),
        ],
        "reloading",
    ),
    "a question for the keeper": ([(lists.INBOX_TO_KEEPER.encode(lists.List(1, watch=False)), 0)], "cut at"),
    "drained without being told": ([(DRAINED, 0)], "without being told"),
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


@pytest.mark.parametrize("message", [link.PONG, STOP_ASKED, b"\xff"], ids=["pong", "stop", "unknown"])
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


@pytest.mark.parametrize("process", ["opener", "keeper", "inbox", "namespaces", "witness"])
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
    [(b"\xff", "unknown message type"), (b"\x04", "Applied: cut at 1 bytes"), (RESTART, "unknown message type")],
    ids=["unknown", "cut", "of the launcher"],
)
def test_an_opener_can_tell_the_launcher_a_few_words_only(dev, message, why):
    with forging("opener", "launcher", [(message, 0)], after=1) as broker, Raw(broker.socket):
        assert why in _ended(broker)


@pytest.mark.parametrize(
    ("message", "descriptors"),
    [
        (b"\xff", 0),
        (worker.TO_WORKER.encode(worker.Ask(1, 1, 1, (worker.Wanted(Namespace("net", "x")),)))[:-1], 0),
        (STOP, 0),
    ],
    ids=["unknown", "cut", "of the launcher"],
)
def test_a_worker_that_is_told_nonsense_ends_and_is_started_again(dev, message, descriptors):
    with forging("opener", "worker", [(message, descriptors)], after=1) as broker, Raw(broker.socket):
        broker.wait_for("the namespaces worker ended with", 20)
        assert broker.process.poll() is None


# ---- a taken-over worker, which was asked one question

ASKED = {"namespace": {"type": "uts", "pid": None}}
OPENED = worker.Opened(5, 0)
MADE = worker.FROM_WORKER.encode(worker.Made(1, (OPENED,)))
TO_OPENER_BY_WORKER = {
    "unknown": (b"\xff", 0),
    "no descriptor": (MADE, 0),
    "one descriptor of two": (MADE, 1),
    "many descriptors": (MADE, 9),
    "answers to more than was asked": (worker.FROM_WORKER.encode(worker.Made(1, (OPENED, OPENED))), 2),
    "too many descriptors for any request": (MADE, worker.DESCRIPTORS + 1),
    "a refusal of what was not asked": (worker.FROM_WORKER.encode(worker.Failed(1, OpenFailed(5, index=1))), 0),
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
        messages = [(worker.FROM_WORKER.encode(worker.Made(99, (OPENED,))), 2)] * 50
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
YES = WITNESS_TO_LAUNCHER.encode(admin.Judged(1, home=True))
TO_LAUNCHER_BY_WITNESS = {
    "unknown": (b"\xff", 0, "unknown message type 255"),
    "cut": (YES[:-1], 0, f"cut at {len(YES) - 1} bytes"),
    "neither yes nor no": (YES[:-1] + b"\2", 0, "a number of value 2"),
    "with a descriptor": (YES, 1, "descriptors were cut"),
    "to stop": (STOP_ASKED, 0, f"unknown message type {STOP_ASKED[0]}"),
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
    messages = [(WITNESS_TO_LAUNCHER.encode(admin.Judged(number, home=True)), 0) for number in (1, 2, 99, 3)]
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
        "witness", "launcher", [(WITNESS_TO_LAUNCHER.encode(admin.Judged(1, home=False)), 0)], after=1, stay=True
    ) as broker:
        broker.expected_code = None
        assert _reloads(broker.socket) == "Denied"
        assert not broker.records("reloading")
        assert broker.process.poll() is None


# ---- a taken-over keeper, which has heard of some connections: of each before the inbox has

FIRST, SECOND = 1, 2
LIST, WATCH, OPEN = "io.fdbroker.Broker.List", {"more": True}, "io.fdbroker.Broker.Open"
REFUSED = lists.ListRefused(1, 777)
RECORD = Record("refused", "authorize", 1, came(1, 0).subject, "forged", "", "", "/dev/null", "rw")
TO_OPENER_BY_KEEPER = {
    "unknown": (b"\xff", "unknown message type 255"),
    "empty": (b"", "the keeper is gone"),
    "too long": (b"x" * 140000, "at most"),
    "cut": (keeper.KEEPER_TO_OPENER.encode(keeper.LetIn(1))[:-1], "LetIn: cut at 8 bytes"),
    "that one comes in who is in": (keeper.KEEPER_TO_OPENER.encode(keeper.LetIn(1)), "which does not wait"),
    "that one comes in who never came": (keeper.KEEPER_TO_OPENER.encode(keeper.LetIn(9)), "which does not wait"),
    "that one is turned away who is in": (keeper.KEEPER_TO_OPENER.encode(keeper.TurnAway(1, 1)), "does not wait"),
    "that one waits who is in": (keeper.KEEPER_TO_OPENER.encode(keeper.Waits(1)), "which does not wait"),
    "a question of the inbox's": (link.INBOX_TO_OPENER.encode(link.Open(1, (NULL,))), "LetIn: "),
    "an end of the inbox's": (link.INBOX_TO_OPENER.encode(link.Closed(1, 0)), "Waits: 1 bytes too many"),
    "a reload": (link.INBOX_TO_OPENER.encode(admin.Reload(1)), "unknown message type"),
    "who came": (keeper.OPENER_TO_KEEPER.encode(came(1, 0, 0, 1, False, "", ())), "LetIn: "),
    "a refusal": (keeper.OPENER_TO_KEEPER.encode(RECORD), "unknown message type 4"),
    "a policy": (link.LAUNCHER_TO_OPENER.encode(link.Policy(1)), "LetIn: cut at"),
}


@pytest.mark.parametrize("case", TO_OPENER_BY_KEEPER)
def test_a_keeper_that_breaks_its_rules_ends_the_service(dev, case):
    message, why = TO_OPENER_BY_KEEPER[case]
    with forging("keeper", "opener", [(message, 0)], after=SECOND) as broker:
        with Raw(broker.socket) as client, Raw(broker.socket):
            assert why in _ended(broker)
            assert client.reply() is None
        assert not broker.records("granted")


TO_LAUNCHER_BY_KEEPER = {
    "unknown": (b"\xff", "unknown message type 255"),
    "cut": (KEEPER_TO_LAUNCHER.encode(link.Applied(1))[:-1], "Applied: cut at 4 bytes"),
    "to stop": (STOP_ASKED, f"unknown message type {STOP_ASKED[0]}"),
    "to reload": (link.OPENER_TO_LAUNCHER.encode(admin.ReloadAsked(1)), "unknown message type 13"),
    "to judge": (link.OPENER_TO_LAUNCHER.encode(admin.Judge(1)), "unknown message type"),
    "that an administrator is at home": (YES, "unknown message type 12"),
}


@pytest.mark.parametrize("case", TO_LAUNCHER_BY_KEEPER)
def test_a_keeper_can_tell_the_launcher_three_words_only(dev, case):
    message, why = TO_LAUNCHER_BY_KEEPER[case]
    with forging("keeper", "launcher", [(message, 0)], after=FIRST) as broker, Raw(broker.socket):
        assert why in _ended(broker)


OFFERED = lists.Offered(1, True, [Offer(NULL, "forged:1")])
TO_INBOX_BY_KEEPER = {
    "unknown": (b"\xff", "unknown message type 255"),
    "too long": (b"x" * 140000, "at most"),
    "cut": (lists.KEEPER_TO_INBOX.encode(OFFERED)[:-1], "Offered: cut at"),
    "a connection": (
        link.OPENER_TO_INBOX.encode(came(9, 0)),
        "Offered: ",
    ),
    "a grant": (link.OPENER_TO_INBOX.encode(link.Outcome(1, None)), "unknown message type 3"),
    "a drain": (link.DRAIN, "unknown message type 4"),
    "a listing that nobody asked for": (lists.KEEPER_TO_INBOX.encode(OFFERED), "connection 1, which is idle"),
    "a part of one": (
        lists.KEEPER_TO_INBOX.encode(OFFERED._replace(last=False)),
        "connection 1, which is idle",
    ),
    "a refusal of nothing": (lists.KEEPER_TO_INBOX.encode(REFUSED), "connection 1, which is idle"),
}


@pytest.mark.parametrize("case", TO_INBOX_BY_KEEPER)
def test_a_keeper_that_breaks_the_inbox_s_rules_ends_the_service(dev, case):
    message, why = TO_INBOX_BY_KEEPER[case]
    with forging("keeper", "inbox", [(message, 0)], after=SECOND) as broker, Raw(broker.socket) as client:
        client.open("/dev/null")  # the inbox knows it
        with Raw(broker.socket):
            assert why in _ended(broker)
        assert client.reply() is None


def test_a_keeper_cannot_answer_what_was_asked_of_the_opener(dev):
    """Or a client would take the grant that comes afterwards for the answer to its next request."""
    messages = [(lists.KEEPER_TO_INBOX.encode(REFUSED), 0)]
    with forging("keeper", "inbox", messages, after=SECOND) as broker, Raw(broker.socket) as client:
        os.kill(broker.pids["worker"], signal.SIGSTOP)  # so the opener has no answer for a while
        client.send_call(OPEN, {"resources": [{"namespace": {"type": "uts", "create": True}}]})
        time.sleep(0.5)  # the inbox has asked
        with Raw(broker.socket):
            assert "connection 1, which is opening" in _ended(broker)
        assert client.reply() is None


@pytest.mark.parametrize("to", ["launcher", "opener", "inbox"])
def test_a_keeper_can_send_no_descriptor(dev, to):
    """It has none of a client's or a device's either."""
    with forging("keeper", to, [(b"x", 1)], after=FIRST) as broker, Raw(broker.socket):
        assert "the keeper failed with PermissionError; a system call that its seccomp filter" in _ended(broker)


def test_a_keeper_can_forge_a_listing_and_what_is_in_it_is_still_refused(dev):
    """It makes nothing that is granted: names, and no descriptor."""
    made_up = [Offer(ZERO, "forged:1"), Offer(Device("/dev/none", "rw"), "forged:2", 5)]
    messages = [(lists.KEEPER_TO_INBOX.encode(lists.Offered(1, True, made_up)), 0)]
    with forging("keeper", "inbox", messages, after=SECOND) as broker, Raw(broker.socket) as client:
        client.send_call(LIST)
        time.sleep(0.5)  # the inbox has asked
        with Raw(broker.socket):
            reply = client.reply()
            assert reply is not None
            assert [one["resource"]["device"] for one in reply["parameters"]["resources"]] == ["/dev/zero", "/dev/none"]
            assert client.descriptors == []
            assert outcome(client.open("/dev/zero")) == "Denied"
            assert outcome(client.open("/dev/none")) == "Denied"
            assert outcome(client.open("/dev/null")) == "granted"
        assert broker.process.poll() is None


def test_a_keeper_can_refuse_lists(dev):
    messages = [(lists.KEEPER_TO_INBOX.encode(REFUSED), 0)]
    with forging("keeper", "inbox", messages, after=SECOND) as broker, Raw(broker.socket) as client:
        client.send_call(LIST)
        time.sleep(0.5)
        with Raw(broker.socket):
            reply = client.reply()
            assert outcome(reply) == "RateLimited"
            assert reply is not None
            assert reply["parameters"]["retryAfterMilliseconds"] == 777
            assert outcome(client.open("/dev/null")) == "granted"
        assert broker.process.poll() is None


def test_a_keeper_can_let_lists_and_watches_starve_and_whoever_opens_does_not_notice(dev):
    with forging("keeper", "opener", [], after=FIRST, stay=True) as broker:
        with Raw(broker.socket) as lists_, Raw(broker.socket) as watches, Raw(broker.socket) as client:
            lists_.send_call(LIST)
            watches.send_call(LIST, **WATCH)
            harness.node("/dev/snd/new", harness.MEM["zero"])
            for _ in range(100):
                assert outcome(client.open("/dev/null")) == "granted"
            for one in (lists_, watches):
                one.sock.settimeout(1)
                with pytest.raises(TimeoutError):
                    one.reply()
        assert harness.ask(broker.socket, "/dev/null") == "granted"
        assert broker.process.poll() is None


def test_a_keeper_can_forge_and_drop_refusals_and_no_grant_is_without_its_record(dev):
    """What the opener tells it of refusals, it does not read here; grants are the opener's own."""
    with forging("keeper", "opener", [], after=FIRST, stay=True) as broker, Raw(broker.socket) as client:
        assert outcome(client.open("/dev/zero")) == "Denied"
        for _ in range(20):
            assert outcome(client.open("/dev/null")) == "granted"
        assert len(broker.records("granted")) == 20
        assert broker.records("refused") == []
        assert broker.process.poll() is None


def test_a_keeper_that_reads_no_refusals_stops_the_questions_and_neither_grows_the_opener_nor_has_it_spin(dev):
    """As SECURITY.md says of it: then nobody is served."""
    with (
        forging("keeper", "opener", [], after=FIRST, stay=True, deaf=True) as broker,
        Raw(broker.socket) as client,
    ):
        client.sock.settimeout(1)
        count = 0
        with pytest.raises(TimeoutError):
            while count < 20_000:
                assert outcome(client.open(f"/dev/{count}")) in ("Denied", "RateLimited")
                count += 1
        assert 10 < count < 20_000
        assert int(status_of(broker.pids["opener"])["VmRSS"].split()[0]) < 200_000
        before = _cpu(broker.pids["opener"])
        time.sleep(1)
        assert _cpu(broker.pids["opener"]) - before < 20  # of 100 ticks
        assert broker.process.poll() is None


@pytest.mark.parametrize("process", ["keeper", "inbox"])
def test_a_keeper_that_does_not_take_a_policy_ends_the_service(dev, process):
    """POLICY_SECONDS after the opener judges by the new one, which is at once; so does an inbox."""
    with forging(process, "opener", [], after=FIRST, stay=True, limits={"POLICY_SECONDS": 3}) as broker:
        with Raw(broker.socket) as client:
            if process == "keeper":  # the other one answers nobody
                assert outcome(client.open("/dev/null")) == "granted"
            began = time.monotonic()
            broker.policy.write_text("version: 1\n")
            broker.process.send_signal(signal.SIGHUP)
            while process == "keeper" and outcome(client.open("/dev/null")) != "Denied":
                assert time.monotonic() < began + 20
            assert f"the {process} did not take the new policy" in _ended(broker)
            assert time.monotonic() - began >= 3
            assert "is reloaded" not in broker.text()


# ---- what a keeper is told: by a taken-over inbox, a taken-over opener, and the launcher


def _denied(number: int) -> bytes:
    return lists.INBOX_TO_KEEPER.encode(lists.DeniedUse(number, TopicUse("send", "topic")))


TO_KEEPER_BY_INBOX = {
    "unknown": ([(b"\xff", 0)], "unknown message type 255"),
    "too long": ([(b"x" * 140000, 0)], "at most"),
    "cut": ([(lists.INBOX_TO_KEEPER.encode(lists.List(1, watch=True))[:-1], 0)], "List: cut at 9 bytes"),
    "of nobody": (
        [(lists.INBOX_TO_KEEPER.encode(lists.List(7, watch=False)), 0)],
        "connection 7, which does not exist",
    ),
    "who came": ([(keeper.OPENER_TO_KEEPER.encode(came(1, 0, 0, 1, False, "", ())), 0)], "List: "),
    "a policy": ([(keeper.OPENER_TO_KEEPER.encode(Use(1, 0)), 0)], "unknown message type 2"),
    "a refusal of nobody": ([(_denied(7), 0)], "DeniedUse in the name of connection 7, which does not exist"),
    "slowed, and nobody": ([(lists.INBOX_TO_KEEPER.encode(lists.Slowed(7)), 0)], "Slowed in the name of connection 7"),
    "a refusal while it watches": (
        [(lists.INBOX_TO_KEEPER.encode(lists.List(1, watch=True)), 0), (_denied(1), 0)],
        "DeniedUse on connection 1, which is watching",
    ),
    "a refusal that is cut": ([(_denied(1)[:-1], 0)], "DeniedUse: cut at"),
    "a record of the opener's": ([(keeper.OPENER_TO_KEEPER.encode(RECORD), 0)], "unknown message type 4"),
    "twice": ([(lists.INBOX_TO_KEEPER.encode(lists.List(1, watch=True)), 0)] * 2, "connection 1, which is watching"),
}


@pytest.mark.parametrize("case", TO_KEEPER_BY_INBOX)
def test_an_inbox_that_breaks_the_keepers_rules_ends_the_service(dev, case):
    messages, why = TO_KEEPER_BY_INBOX[case]
    with forging("inbox", "keeper", messages, after=FIRST_CLIENT) as broker, Raw(broker.socket) as client:
        text = _ended(broker)
        assert "the keeper" in text
        assert why in text
        assert client.reply() is None


def test_an_inbox_can_have_refusals_recorded_of_who_is_there_and_no_more_of_them_than_a_client_can(dev):
    """Of whom the opener names; a client can have the same, by sending what it may not."""
    denied = [lists.DeniedUse(1, TopicUse("send", f"t{number}\n")) for number in range(200)]
    messages = [(lists.INBOX_TO_KEEPER.encode(one), 0) for one in (*denied, *[lists.Slowed(1)] * 200)]
    with forging("inbox", "keeper", messages, after=FIRST_CLIENT) as broker, Raw(broker.socket):
        broker.wait_for('"FDBROKER_CAUSE": "others"', 30)
        records = broker.records()
        assert {record["FDBROKER_OWNER"] for record in records} == {"0"}
        written = [record for record in records if "FDBROKER_REPEATED" not in record]
        assert len(written) <= AUDIT_REFUSALS
        assert {record["FDBROKER_UID"] for record in written} == {"0"}
        assert all("\n" not in record["FDBROKER_RESOURCE"] for record in written)
        counted = sum(int(record.get("FDBROKER_REPEATED", "0")) for record in records)
        assert 3 * AUDIT_REFUSALS < len(written) + counted <= len(messages)  # as many as the link took at once
        assert broker.process.poll() is None


def test_descriptors_of_an_inbox_s_are_never_taken_by_the_keeper(dev):
    messages = [(lists.INBOX_TO_KEEPER.encode(lists.List(1, watch=False)), 5)]
    with forging("inbox", "keeper", messages, after=SECOND_CLIENT, stay=True) as broker:
        with Raw(broker.socket), Raw(broker.socket):
            time.sleep(1)
            assert broker.counts()["keeper"] == broker.idle["keeper"]
        assert broker.process.poll() is None


TO_KEEPER_BY_OPENER = {
    "unknown": (b"\xff", "unknown message type 255"),
    "cut": (keeper.OPENER_TO_KEEPER.encode(came(1, 0, 0, 1, False, "", (5,)))[:-1], "Came: cut at"),
    "a policy that did not come": (
        keeper.OPENER_TO_KEEPER.encode(Use(5, 0)),
        "policy 5 is to be used, which did not come",
    ),
    "a word of the launcher's": (STOP, "unknown message type 5"),
    "a List": (lists.INBOX_TO_KEEPER.encode(lists.List(1, watch=False)), "Came: "),
    "a refusal that is cut": (keeper.OPENER_TO_KEEPER.encode(RECORD)[:-1], "Record: cut at"),
    "a grant": (b"\4\4" + keeper.OPENER_TO_KEEPER.encode(RECORD)[2:], "Record: a number of value 4, at most 3"),
}


@pytest.mark.parametrize("case", TO_KEEPER_BY_OPENER)
def test_an_opener_that_breaks_the_keepers_rules_ends_the_service(dev, case):
    message, why = TO_KEEPER_BY_OPENER[case]
    with forging("opener", "keeper", [(message, 0)], after=1) as broker, Raw(broker.socket):
        text = _ended(broker)
        assert "the keeper" in text
        assert why in text


TO_KEEPER_BY_LAUNCHER = {
    "unknown": (b"\xff", 0, "unknown message type 255"),
    "cut": (LAUNCHER_TO_KEEPER.encode(link.Policy(1))[:-1], 1, "Policy: cut at 4 bytes"),
    "with many descriptors": (LAUNCHER_TO_KEEPER.encode(link.Policy(1)), 3, "descriptors"),
    "who came": (keeper.OPENER_TO_KEEPER.encode(came(1, 0, 0, 1, False, "", ())), 0, "Policy: "),
}


@pytest.mark.parametrize("case", TO_KEEPER_BY_LAUNCHER)
def test_what_is_no_word_of_the_launchers_ends_a_keeper(dev, tmp_path, monkeypatch, case):
    message, descriptors, why = TO_KEEPER_BY_LAUNCHER[case]
    (tmp_path / "policy.yaml").write_text(POLICY)
    policy = load_policy(str(tmp_path / "policy.yaml"), trusted=False).policy
    sealed = sealed_memfd("policy", to_bytes(policy))
    with contextlib.ExitStack() as owned:
        owned.callback(os.close, sealed)
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(3)]
        for ours, theirs in pairs:
            owned.enter_context(ours)
            owned.enter_context(theirs)
        finder = Finder()
        owned.callback(finder.close)
        notify = inotify.create()
        owned.callback(os.close, notify)
        monkeypatch.setattr(inotify, "create", lambda: notify)
        one = Keeper(*(Link(theirs) for _, theirs in pairs), policy, finder, Refusals(None))
        Link(pairs[0][0]).send_with_descriptors(message, [sealed] * descriptors)
        before = set(descriptors_of(os.getpid()))
        with pytest.raises(LinkViolation, match=why):
            one.serve()
        for left in set(descriptors_of(os.getpid())) - before:  # the process ends
            os.close(int(left))


def _reloads(address: str) -> str:
    with Raw(address) as client:
        return outcome(client.call(RELOAD))
