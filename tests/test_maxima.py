"""Each maximum at its value and one above it, where it is enforced; the table of all of them is in test_limits.py."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import os
import resource
import select
import socket
import sys
import threading
import time
import types
from unittest import mock

import harness
import pytest
from fakes import came

from fdbroker.bucket import Bucket
from fdbroker.errors import (
    Denied,
    Finding,
    LinkViolation,
    MessageTooLong,
    OpenFailed,
    PolicyError,
    QuotaExceeded,
    RateLimited,
)
from fdbroker.inbox import client, deadlines, dispatch, service, topics, turns
from fdbroker.inbox import store as store_module
from fdbroker.inbox.attached import Ledger, Unread
from fdbroker.inbox.client import User
from fdbroker.inbox.member import Member
from fdbroker.inbox.reserve import Reserve
from fdbroker.inbox.rights import Rights, Sender
from fdbroker.inbox.store import NotStored, Store, Stored
from fdbroker.inbox.topics import Topics
from fdbroker.keeper import listing
from fdbroker.keeper.connections import Connection
from fdbroker.keeper.entry import Entry
from fdbroker.keeper.refusals import Refusals
from fdbroker.kernel import confine, memfd, orders
from fdbroker.kernel.jobs import Jobs
from fdbroker.kernel.link import Link
from fdbroker.kernel.records import NotRecorded, Records
from fdbroker.kernel.sealed import SEALS, sealed_memfd
from fdbroker.launcher import needs, start
from fdbroker.limits import every as limits
from fdbroker.namespaces import answer
from fdbroker.namespaces import service as namespaces
from fdbroker.offers import Offer
from fdbroker.opener import door as door_module
from fdbroker.opener import send
from fdbroker.opener.audit import Audit
from fdbroker.opener.close import Closing
from fdbroker.opener.door import Door
from fdbroker.opener.views import views as views_of
from fdbroker.pace import Pace
from fdbroker.policy import files, load, paths, spelling
from fdbroker.policy.compile import load_policy
from fdbroker.policy.compiled import Policy, to_bytes
from fdbroker.policy.decide import View
from fdbroker.policy.messages import messages
from fdbroker.terms import OTHERS, Device, DeviceRule, Grant, Namespace, SocketRule, Subject
from fdbroker.topics import Topic, TopicUse
from fdbroker.topics import User as Known
from fdbroker.wire import keeper, link, lists, resources, worker
from fdbroker.wire.audit import Record, fields
from fdbroker.wire.connections import Came

MAXIMA = {name: limit.default for name, limit in limits.USER_LIMITS.items()}
UID = os.getuid()
FAR_US = 1 << 60
TOPIC_NAMES = frozenset({"x", "mail", "news", "inbox"})
MAY = Rights(TOPIC_NAMES, TOPIC_NAMES, 100_000, 100_000, 2, 10_000, 1 << 30, 100_000, 100_000)


def at(monkeypatch, name, value):
    """A small one in the place of a maximum that is too large to reach."""
    for module in [one for path, one in sys.modules.items() if path.startswith("fdbroker.") and name in vars(one)]:
        monkeypatch.setattr(module, name, value)


class Clock:
    """Stands for the module `time`."""

    def __init__(self):
        self.now_s = 1000.0

    def monotonic(self):
        return self.now_s

    def time_ns(self):
        return round(self.now_s * 1e6) * 1000


@pytest.fixture
def pair():
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    yield ends
    for end in ends:
        end.close()


def policy_errors(tmp_path, text):
    """What is wrong with a policy, in one text; "" when nothing is."""
    path = tmp_path / "policy.yaml"
    path.write_text(f"version: 1\n{text}\n")
    try:
        load_policy(str(path), trusted=False)
    except PolicyError as error:
        return "\n".join(map(str, error.findings))
    return ""


POLICY = Policy(frozenset(), frozenset(), MAXIMA, {}, {}, (), (), {}, {}, {})

# ---- the wire


def test_resources_of_one_open(pair):
    """RESOURCES_PER_OPEN, where a call is read, where the inbox asks, and where the opener reads it."""
    most = limits.RESOURCES_PER_OPEN
    head = b'{"method":"io.fdbroker.Broker.Open","parameters":{"resources":['

    def call(count):
        return dispatch.dispatch_varlink(head + b",".join([b'{"device":"/dev/x"}'] * count) + b"]}}")

    assert len(call(most).resources) == most
    assert b"InvalidParameter" in call(most + 1).data
    asked = (Device("/dev/x", "ro"),) * most
    message = link.INBOX_TO_OPENER.encode(link.Open(1, asked))
    assert link.INBOX_TO_OPENER.decode(message).resources == asked
    with pytest.raises(ValueError, match=f"{most + 1} values"):
        link.INBOX_TO_OPENER.encode(link.Open(1, (*asked, asked[0])))
    longer = message[:9] + (most + 1).to_bytes(2, "big") + resources.RESOURCE.write(asked[0]) * (most + 1)
    with pytest.raises(LinkViolation, match=f"{most + 1} values"):
        link.INBOX_TO_OPENER.decode(longer)


def test_a_reply_with_descriptors():
    most = limits.REPLY_WITH_DESCRIPTORS_BYTES

    def reply(where):
        rule = DeviceRule("/dev/x", "ro", "", "", False, "everyone", where)
        return send.compose([Grant(Device("/dev/x", "ro"), rule)])

    fits = most - len(reply(""))
    assert len(reply("x" * fits)) == most
    with pytest.raises(QuotaExceeded) as caught:
        reply("x" * (fits + 1))
    assert (caught.value.limit, caught.value.maximum) == ("reply_bytes", most)


def test_a_path():
    def long(count):
        head = "/dev/" + "x/" * ((count - 6) // 2)
        return head + "x" * (count - len(head))

    most = limits.PATH_BYTES
    assert [len(long(most)), len(long(most + 1))] == [most, most + 1]
    assert [paths.is_device_path(long(count)) for count in (most, most + 1)] == [True, False]
    assert [spelling.glob_error(long(count)) for count in (most, most + 1)] == ["", f"it is over {most} bytes"]


def test_a_name():
    most = limits.NAME_BYTES
    names = ["x" * most, "x" * (most + 1)]
    assert [paths.is_device_path(f"/dev/{name}") for name in names] == [True, False]
    assert [paths.is_namespace_name(name) for name in names] == [True, False]
    assert [spelling.name_glob_error(name) for name in names] == ["", f"a name is over {most} bytes"]
    message = lists.INBOX_TO_KEEPER.encode(lists.DeniedUse(1, TopicUse("send", names[1])))  # cut
    assert lists.INBOX_TO_KEEPER.decode(message).use.topic == names[0]
    longer = message[:10] + (most + 1).to_bytes(2, "big") + message[12:] + b"x"
    with pytest.raises(LinkViolation, match=f"a text of {most + 1} bytes"):
        lists.INBOX_TO_KEEPER.decode(longer)


def test_a_listing(monkeypatch, tmp_path):
    monkeypatch.setattr(listing, "NETNS", str(tmp_path))
    (tmp_path / "a").touch()
    mounted = os.stat("/proc/self/ns/net").st_dev
    monkeypatch.setattr(listing, "_file_system", lambda _: mounted)

    def listed(count):
        rule = SocketRule("a", ("inet",), ("stream",), tuple(range(1, count)), "everyone", "f:1")
        maxima = dict(MAXIMA)
        seen = View((), (rule,), (), maxima, administrator=False)
        subject = Subject(UID, frozenset(), UID, 1, "", "", foreign=True)
        asked = Connection(1, subject, seen, Bucket(maxima["burst"], 0.0))
        lister = listing.Lister(None, -1)
        lister.add(asked)
        while lister.busy:
            for _, parts in lister.step(0.0):
                return [one for part in parts for one in lists.KEEPER_TO_INBOX.decode(part).offers]

    most = limits.OFFERS
    assert [len(listed(count)) for count in (most - 1, most, most + 1)] == [most - 1, most, most]


# ---- the links


def test_a_message_of_a_link(pair):
    theirs, most = Link(pair[1]), limits.LINK_BYTES
    for receive in (theirs.receive, lambda: theirs.receive_with_descriptors(1)[0]):
        pair[0].send(b"x" * most)
        assert len(receive()) == most
        pair[0].send(b"x" * (most + 1))
        with pytest.raises(LinkViolation):
            receive()


def test_messages_that_wait_for_a_link(pair):
    ours, most = Link(pair[0]), limits.LINK_WAITING
    while ours.waiting < most:
        ours.send(b"x")
    with pytest.raises(LinkViolation, match="does not read"):
        ours.send(b"x")
    assert ours.waiting == most


def test_living_namespaces_of_a_policy(tmp_path):
    """LIVING_NAMESPACES: more than that the worker could not be told of."""
    path = tmp_path / "policy.yaml"
    path.write_text(f"version: 1\nlimits: {{namespaces: {limits.LIVING_NAMESPACES}}}\n")
    assert load_policy(str(path), trusted=False).policy.limits["namespaces"] == limits.LIVING_NAMESPACES
    path.write_text(f"version: 1\nlimits: {{namespaces: {limits.LIVING_NAMESPACES + 1}}}\n")
    with pytest.raises(PolicyError, match=f"1 to {limits.LIVING_NAMESPACES}"):
        load_policy(str(path), trusted=False)


def test_a_compiled_policy(monkeypatch, tmp_path):
    """POLICY_LINK_BYTES: the launcher does not send more, the opener does not take more."""
    path = tmp_path / "policy.yaml"
    path.write_text(harness.EVERYONE_NULL)
    monkeypatch.setattr(needs, "load_policy", lambda file, *, trusted: load_policy(file, trusted=False))
    size = len(to_bytes(load_policy(str(path), trusted=False).policy))
    at(monkeypatch, "POLICY_LINK_BYTES", size)
    assert needs.checked_policy(str(path))
    at(monkeypatch, "POLICY_LINK_BYTES", size - 1)
    with pytest.raises(PolicyError, match=f"at most {size - 1} bytes, found {size} bytes"):
        needs.checked_policy(str(path))
    number = sealed_memfd("x", b"x" * size)
    assert len(memfd.read(number, size)) == size
    with pytest.raises(LinkViolation):
        memfd.read(number, size - 1)
    os.close(number)


# ---- the namespaces worker


@pytest.mark.parametrize("stuck", [False, True])
def test_a_question_to_the_worker_has_its_time(monkeypatch, pair, stuck):
    """NAMESPACE_SECONDS: who answers is heard; who does not is given up."""
    assert namespaces._CHILD_S == limits.NAMESPACE_SECONDS
    if stuck:
        monkeypatch.setattr(namespaces, "_CHILD_S", 0.2)

    def answer(*_):
        if stuck:
            os.read(os.pipe()[0], 1)  # for ever
        raise Denied("no")

    monkeypatch.setattr(namespaces, "answer", answer)
    process = os.fork()
    if process == 0:
        try:
            pair[1].close()
            namespaces.Worker(Link(pair[0]), frozenset()).serve()
        finally:
            os._exit(0)
    pair[0].close()
    pair[1].settimeout(60)
    pair[1].send(worker.TO_WORKER.encode(worker.Ask(1, UID, UID, (worker.Wanted(Namespace("net", "a")),))))
    refusal = worker.FROM_WORKER.decode(pair[1].recv(1000)).refusal
    pair[1].close()
    os.waitpid(process, 0)
    assert isinstance(refusal, OpenFailed if stuck else Denied)
    assert not stuck or refusal.number == errno.ETIMEDOUT


# ---- who is let in


@pytest.fixture
def make_door(monkeypatch, pair):
    """A door on a clock of the test's, its address, what it tells the keeper, and whom it has let in."""
    clock, connections = Clock(), {}
    keepers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    monkeypatch.setattr(door_module, "time", clock)

    def make():
        listener = socket.socket(socket.AF_UNIX)
        listener.bind("")
        listener.listen()
        listener.setblocking(False)
        door = Door(
            listener,
            Link(pair[0]),
            Link(keepers[0]),
            views_of(POLICY),
            Audit(None, Link(keepers[0])),
            connections,
            Closing(),
        )
        door.clock, door.address, door.keeper, door.connections = clock, listener.getsockname(), keepers[1], connections
        doors.append(door)
        return door

    doors = []
    yield make
    for door in doors:
        door.close()
        door.identifier.close()
    for connection in filter(None, connections.values()):
        connection.sock.close()
    for end in keepers:
        end.close()


def test_descriptors_of_the_opener(monkeypatch, make_door):
    """Of DESCRIPTORS some are reserved; the others are as many connections, and then accepting pauses."""
    most = limits.DESCRIPTORS
    monkeypatch.setattr(
        door_module, "resource", types.SimpleNamespace(getrlimit=lambda _: (most, most), RLIMIT_NOFILE=0)
    )
    door = make_door()
    door.connections.update(dict.fromkeys(range(most - limits.reserved(most) - 1)))
    with socket.socket(socket.AF_UNIX) as client, socket.socket(socket.AF_UNIX) as other:
        client.connect(door.address)
        door.accept()
        assert (door.last_number, door.paused) == (1, False)
        other.settimeout(10)
        other.connect(door.address)
        door.accept()
        assert (door.last_number, door.paused) == (1, True)
        assert b"QuotaExceeded" in other.recv(1000)


@pytest.mark.parametrize("hard", [limits.DESCRIPTORS - 1, limits.DESCRIPTORS, limits.DESCRIPTORS + 1, -1])
def test_what_the_kernel_is_asked_for(monkeypatch, hard):
    """DESCRIPTORS, or what the hard limit leaves of it; -1 is none."""
    monkeypatch.setattr(start, "compile_filter", lambda _: os.open("/dev/null", os.O_RDONLY))
    monkeypatch.setattr(start, "subprocess", types.SimpleNamespace(Popen=lambda words, **_: words, DEVNULL=0))
    words = start._start("opener", (UID, UID), {}, start._Kept())
    order = confine.Order(**json.loads(words[-1]))
    said = []
    names = ("RLIMIT_NOFILE", "RLIMIT_CORE", "RLIM_INFINITY")
    numbers = {name: getattr(resource, name) for name in names}
    limited = types.SimpleNamespace(
        getrlimit=lambda _: (hard, hard), setrlimit=lambda *values: said.append(values), **numbers
    )
    monkeypatch.setattr(orders, "resource", limited)
    monkeypatch.setattr(orders, "confine", lambda *_: False)
    monkeypatch.setattr(orders, "signal", mock.MagicMock())
    monkeypatch.setattr(
        orders, "os", types.SimpleNamespace(chdir=lambda _: None, read=lambda *_: b"", close=lambda _: 0)
    )
    orders.obey(order, 0)
    most = limits.DESCRIPTORS if hard < 0 else min(hard, limits.DESCRIPTORS)
    assert (resource.RLIMIT_NOFILE, (most, most)) in said


def test_accepting_goes_on_after_its_pause(make_door):
    door = make_door()
    door._no_descriptors()
    door.clock.now_s += limits.ACCEPT_PAUSE_MS / 1000 - 0.001
    door.sweep(door.clock.now_s)
    assert door.paused
    door.clock.now_s += 0.002
    door.sweep(door.clock.now_s)
    assert not door.paused


def test_knocks_while_others_of_the_user_wait():
    """KNOCKS_FREE in DEBT_SECONDS are no offence."""
    nothing = lambda *_: None
    one = Entry({"burst": 1, "connections": 1000, "requests_per_second": 1}, nothing)
    owner = one.owner(UID, 0.0)
    owner.spend(10_000, 0.0)
    one.contested(0.0)
    for number in range(limits.KNOCKS_FREE):
        one.knock(number, UID, 0.0)
    assert owner.pace._offences == 0
    one.knock(99, UID, 0.0)
    assert owner.pace._offences == 1


def test_one_record_a_pause_says_that_too_many_wait_to_be_closed(make_door, monkeypatch):
    """In each turn of the loop there was one, though nobody was turned away."""
    door = make_door()
    monkeypatch.setattr(type(door._closing), "waiting", door._closing_max)
    for _ in range(3):
        door.sweep(door.clock.now_s)
    assert keeper.OPENER_TO_KEEPER.decode(door.keeper.recv(1000)).kind == "turned-away"
    with pytest.raises(BlockingIOError):
        door.keeper.recv(1000, socket.MSG_DONTWAIT)
    assert door.paused


@pytest.mark.parametrize("more", [0, 1])
def test_groups_that_a_connection_may_have(make_door, monkeypatch, more):
    """GROUPS_PER_CONNECT: a process in 65,536 groups kept the opener busy, as one in none."""
    door = make_door()
    gids = range(limits.GROUPS_PER_CONNECT - 1 + more)
    monkeypatch.setattr(door.identifier, "identify", lambda sock, subject: subject._replace(gids=gids))
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(door.address)
        door.accept()
        knock = keeper.OPENER_TO_KEEPER.decode(door.keeper.recv(1000))
        door.answered(keeper.LetIn(knock.connection))
        said = keeper.OPENER_TO_KEEPER.decode(door.keeper.recv(1000))
        assert isinstance(said, keeper.Weighs if more else Came)
        assert not more or said == keeper.Weighs(knock.connection, 1)


@pytest.mark.parametrize("way", ["its connection ends", "it is refused"])
@pytest.mark.parametrize("more", [0, 1])
def test_how_long_it_may_take_to_hang_up(make_door, monkeypatch, way, more):
    """STALL_UNITS: watches of a client's own sockets all wake when it is refused; the keeper hears whose they are."""
    door = make_door()
    took_us = limits.STALL_UNITS * limits.UNIT_US + more
    clock = itertools.count(0.0, took_us / 1e6)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(door.address)
        door.accept()
        number = keeper.OPENER_TO_KEEPER.decode(door.keeper.recv(1000)).connection
        door.clock.thread_time = lambda: next(clock)
        if way == "it is refused":
            door.answered(keeper.TurnAway(number, 1))
            assert keeper.OPENER_TO_KEEPER.decode(door.keeper.recv(1000)).kind == "turned-away"
        else:
            door.answered(keeper.LetIn(number))
            assert isinstance(keeper.OPENER_TO_KEEPER.decode(door.keeper.recv(1000)), Came)
            door.end(door.connections[number], never_taken=False)
        said = keeper.OPENER_TO_KEEPER.decode(door.keeper.recv(1000))
        owner = door.views.policy.owners.of(os.getuid())
        assert said == (keeper.Stalled(OTHERS if owner is None else owner, took_us) if more else keeper.Ended(number))


# ---- the audit


class Written:
    """Stands for the journal."""

    def __init__(self):
        self.records = []

    def write(self, values):
        self.records.append(values)


def test_users_whose_refusals_are_counted():
    refusals = Refusals(None)
    refusals._records = written = Written()

    def refuse(uid):
        subject = Subject(uid, frozenset(), uid, 1, "", "", foreign=True, owner=uid)
        refusals.add(Record("refused", "authorize", 1, subject, "why"), 100.0)

    most = limits.AUDIT_USERS
    for uid in [*range(most), *range(most)]:
        refuse(uid)
    assert len(written.records) == len(refusals._windows) == most
    refuse(most)
    assert len(refusals._windows) == 1
    assert len(written.records) == most + most + 1
    assert {record["FDBROKER_UID"] for record in written.records[most:-1]} == set(map(str, range(most)))


def test_a_value_of_a_record():
    most = limits.AUDIT_VALUE_CHARACTERS
    reasons = ["x" * most, "x" * (most + 1)]
    found = [fields(Record("refused", "a", 1, None, reason))["FDBROKER_REASON"] for reason in reasons]
    assert found == ["x" * most, "x" * (most - 1) + "…"]


# ---- messages


def test_topics_of_a_policy_and_of_a_subscription(tmp_path):
    most = limits.TOPICS

    def policy(count):
        return "topics: {" + ", ".join(f"t{number}: {{}}" for number in range(count)) + "}"

    def call(count):
        call = {"method": "io.fdbroker.Inbox.Subscribe", "parameters": {"topics": ["x"] * count}, "more": True}
        return dispatch.dispatch_varlink(json.dumps(call).encode())

    assert policy_errors(tmp_path, policy(most)) == ""
    assert f"over {most} topics" in policy_errors(tmp_path, policy(most + 1))
    assert len(call(most).topics) == most
    assert b"InvalidParameter" in call(most + 1).data


def test_the_name_of_a_topic(tmp_path):
    most = limits.TOPIC_BYTES
    assert policy_errors(tmp_path, "topics: {" + "x" * most + ": {}}") == ""
    assert f"at most {most}" in policy_errors(tmp_path, "topics: {" + "x" * (most + 1) + ": {}}")


def test_messages_that_wait_for_a_subscriber():
    member = Member(Sender(5, 5, 5, "", 5))
    for _ in range(limits.SUBSCRIBER_MESSAGES):
        member.put(b"x")
    assert (len(member.queue), member.lost) == (limits.SUBSCRIBER_MESSAGES, 0)
    member.put(b"y")
    assert (len(member.queue), member.lost) == (limits.SUBSCRIBER_MESSAGES, 1)
    assert member.queue[-1] == (b"y", None)


def test_bytes_that_wait_for_a_subscriber():
    member = Member(Sender(5, 5, 5, "", 5))
    member.put(b"x" * 10)
    member.put(b"x" * (limits.SUBSCRIBER_BYTES - 10))
    assert (member.queued_bytes, member.lost) == (limits.SUBSCRIBER_BYTES, 0)
    member.put(b"y")
    assert (member.queued_bytes, member.lost) == (limits.SUBSCRIBER_BYTES - 10 + 1, 1)


def test_descriptors_of_a_user_that_nobody_has_read():
    before = threading.active_count()
    unread = Unread(Jobs(1))
    pairs = [socket.socketpair() for _ in range(3)]
    (first, _), (second, _), (third, _) = pairs
    for ours in (first, second):
        ours.send(b"x")
    unread.add(5, first, limits.UNREAD_OF_USER // 2)
    unread.add(5, second, limits.UNREAD_OF_USER // 2 - 3)
    assert unread.may_send(5, third, 3)
    assert not unread.may_send(5, third, 4)
    for ends in pairs:
        for end in ends:
            end.close()
    while threading.active_count() > before:  # one has the kernel collect what nobody holds
        time.sleep(0.01)


def test_a_payload_in_a_memfd(tmp_path):
    """ATTACHED_BYTES, where the topic says nothing."""
    path = tmp_path / "policy.yaml"
    path.write_text("version: 1\ntopics: {x: {}}\n")
    made, ledger = Topics(Records(None)), Ledger(Jobs(8))
    made.use(messages(load_policy(str(path), trusted=False).policy).topics)
    sender = Member(Sender(5, 5, 5, "", 5))
    made.allow(sender, MAY)

    def publish(size):
        number = os.memfd_create("x", os.MFD_ALLOW_SEALING)
        os.ftruncate(number, size)  # takes no memory
        fcntl.fcntl(number, fcntl.F_ADD_SEALS, SEALS)
        made.publish(sender, dispatch.Publish("x", b"", "", "text", file=0), ledger.take(5, [number]))

    publish(limits.ATTACHED_BYTES)
    with pytest.raises(MessageTooLong) as caught:
        publish(limits.ATTACHED_BYTES + 1)
    assert caught.value.maximum == limits.ATTACHED_BYTES
    caught = None
    for _ in range(500):
        if not ledger._held:
            break
        time.sleep(0.01)
    assert not ledger._held


def test_what_a_policy_may_say_of_payloads(tmp_path):
    most = limits.ATTACHED_BYTES_MAX
    assert policy_errors(tmp_path, f"topics: {{x: {{maximum_bytes: {most}}}}}") == ""
    assert f"a number from 1 to {most}" in policy_errors(tmp_path, f"topics: {{x: {{maximum_bytes: {most + 1}}}}}")


def test_users_that_may_subscribe(monkeypatch, tmp_path):
    at(monkeypatch, "USERS", 3)

    def policy(count):
        users = ", ".join(f"{50000 + number}: {{subscribe: [x]}}" for number in range(count))
        return f"topics: {{x: {{deliver: [queue]}}}}\nusers: {{{users}}}"

    assert policy_errors(tmp_path, policy(3)) == ""
    assert "at most 3 users, found 4" in policy_errors(tmp_path, policy(4))


class Held:
    """A database in memory needs no reserve."""

    held = True

    def take(self):
        """It is there."""


@pytest.fixture
def store():
    made = Store(":memory:", Held())
    yield made
    made.close()


def queue(store, users=(7,), keep_s=60, **others):
    """Topics with one that is stored for these users, and who may send to it."""
    made = Topics(Records(None), store)
    known = [Known(uid, f"u{uid}", frozenset({0})) for uid in users]
    made.use((Topic("mail", ("queue",), 65536, keep_s),), known)
    sender = Member(Sender(5, 5, 5, "", 5))
    made.allow(sender, MAY._replace(subscribe=frozenset(), **others))
    return made, sender


def reader(made, uid=7):
    member = Member(Sender(uid, uid, uid, "", uid))
    made.allow(member, MAY)
    return member


def mail(made, sender):
    return made.publish(sender, dispatch.Publish("mail", b"x", "x", "text"))


def test_rows_that_a_message_has_for_nothing(store):
    """ROWS_PER_MESSAGE of them; with one more it counts as two messages."""
    for count, passes in ((limits.ROWS_PER_MESSAGE, True), (limits.ROWS_PER_MESSAGE + 1, False)):
        made, sender = queue(store, range(1000, 1000 + count), messages_per_second=1, burst=2)
        assert mail(made, sender)
        with contextlib.nullcontext() if passes else pytest.raises(RateLimited):
            assert mail(made, sender)


def test_a_message_is_kept_for_so_long_where_a_topic_says_nothing(monkeypatch, tmp_path, store):
    path = tmp_path / "policy.yaml"
    path.write_text("version: 1\ntopics: {mail: {deliver: [queue]}}\n")
    (topic,) = messages(load_policy(str(path), trusted=False).policy).topics
    assert topic.keep_s == limits.KEEP_SECONDS
    clock = Clock()
    for module in (topics, store_module):
        monkeypatch.setattr(module, "time", clock)
    made, sender = queue(store, keep_s=topic.keep_s)
    mail(made, sender)
    made.commit()
    clock.now_s += limits.KEEP_SECONDS - 1
    assert len(made.receive(reader(made), 10)) == 1
    clock.now_s += 1
    assert made.receive(reader(made), 10) == []
    store.check(5, 1, 1, 1)  # and it counts for nobody


def test_bytes_of_the_store(store):
    """STORE_BYTES is what SQLite is told; above it nothing more is stored, below it is."""
    (pages,) = store._database.execute("PRAGMA max_page_count").fetchone()
    assert pages * 4096 == limits.STORE_BYTES
    (used,) = store._database.execute("PRAGMA page_count").fetchone()
    store._database.execute(f"PRAGMA max_page_count = {used + 10}")
    number = 0
    with pytest.raises(NotStored, match="full"):
        while number < 100:
            number += 1
            store.put(Stored(number, 5, "mail", FAR_US, b"x" * 4096), frozenset({7}))
            store.commit()
    (used_now,) = store._database.execute("PRAGMA page_count").fetchone()
    assert used < used_now <= used + 10
    assert [one for one, _ in store.waiting(7, ["mail"], 0, 100)] == list(range(1, number))


@pytest.mark.parametrize("missing", [0, 1])
def test_the_reserve_is_held_whole_or_not_at_all(tmp_path, missing):
    """STORE_RESERVE_BYTES, where a file may have as many, or one less."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = tmp_path / "reserve"
    reserve = Reserve(str(path))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits.STORE_RESERVE_BYTES - missing, hard))
    try:
        reserve.take()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert reserve.held is not bool(missing)
    assert path.exists() is not bool(missing)
    assert missing or path.stat().st_size == limits.STORE_RESERVE_BYTES
    reserve.give()


def test_messages_of_one_reply_to_receive(store):
    most = limits.RECEIVED_MESSAGES
    made, _ = queue(store)
    for number in range(1, most + 2):
        store.put(Stored(number, 5, "mail", FAR_US, b"{}"), frozenset({7}))
    store.commit()
    one = reader(made)
    assert [len(made.receive(one, count)) for count in (most - 1, most, most + 1)] == [most - 1, most, most]
    made.acknowledge(one, range(1, most + 1))
    made.commit()
    assert len(made.receive(one, most)) == 1


@pytest.mark.parametrize("more", [0, 1])
def test_bytes_of_one_reply_to_receive(store, more):
    """RECEIVED_BYTES in two messages, and with one byte more the second comes the next time."""
    for number, size in ((1, 1000), (2, limits.RECEIVED_BYTES - 1000 + more)):
        store.put(Stored(number, 5, "mail", FAR_US, b"x" * size), frozenset({7}))
    store.commit()
    assert [number for number, _ in store.waiting(7, ["mail"], 0, 10)] == [1, 2][: 2 - more]
    assert [number for number, _ in store.waiting(7, ["mail"], 1, 10)] == [2]


def test_numbers_that_are_acknowledged_at_once():
    def call(count):
        call = {"method": "io.fdbroker.Inbox.Receive", "parameters": {"maximum": 1, "acknowledge": [1] * count}}
        return dispatch.dispatch_varlink(json.dumps(call).encode())

    assert len(call(limits.ACKNOWLEDGED).acknowledge) == limits.ACKNOWLEDGED
    assert b'"acknowledge"' in call(limits.ACKNOWLEDGED + 1).data


# ---- a client of the inbox


class Desk:
    """An inbox whose loop the test is, with one client, whose other end is `client`."""

    def __init__(self, stack):
        def ends(kind):
            return [stack.enter_context(end) for end in socket.socketpair(socket.AF_UNIX, kind)]

        links = [ends(socket.SOCK_SEQPACKET) for _ in range(3)]
        (self.launcher, to_launcher), (self.opener, to_opener), (self.keeper, to_keeper) = links
        self.client, sock = ends(socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        links = Link(to_launcher), Link(to_opener), Link(to_keeper)
        self.inbox = service.Inbox(*links, POLICY, Topics(Records(None)))
        stack.callback(self.inbox._epoll.close)
        self.inbox._connected(came(1, UID), MAY, [os.dup(sock.fileno())])
        self.one = self.inbox._by_number[1]
        stack.callback(self.one.sock.close)

    def send(self, data):
        """The client sends this, and the inbox reads it: how many units of work that was."""
        before = self.one.user.used
        self.client.sendall(data)
        self.inbox._client_event(self.one, select.EPOLLIN)
        return self.one.user.used - before

    def said(self):
        return link.INBOX_TO_OPENER.decode(self.opener.recv(200_000, socket.MSG_DONTWAIT))


@pytest.fixture
def desk():
    with contextlib.ExitStack() as stack:
        yield Desk(stack)


def test_a_message_must_be_complete_in_time(desk, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(deadlines, "time", clock)
    desk.send(b"{")
    clock.now_s += limits.MESSAGE_SECONDS - 0.5
    desk.inbox._end_slow()
    assert desk.inbox._by_number == {1: desk.one}
    clock.now_s += 1
    desk.inbox._end_slow()
    assert desk.inbox._by_number == {}
    assert desk.said() == link.Closed(1, client.SLOW)


def test_a_message_with_descriptors_must_be_complete_sooner(desk, monkeypatch):
    """ATTACHED_SECONDS, since they came: one of them may be the connection's own other end, which its client has left."""
    clock = Clock()
    monkeypatch.setattr(deadlines, "time", clock)
    desk.send(b"{")
    clock.now_s += 2
    socket.send_fds(desk.client, [b'"'], [desk.client.fileno()])
    desk.inbox._client_event(desk.one, select.EPOLLIN)
    clock.now_s += limits.ATTACHED_SECONDS - 0.5
    desk.inbox._end_slow()
    assert desk.inbox._by_number == {1: desk.one}
    clock.now_s += 1
    desk.inbox._end_slow()
    assert desk.inbox._by_number == {}
    assert desk.said() == link.Closed(1, client.SLOW)


def test_an_answer_must_be_taken_in_time(desk, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(deadlines, "time", clock)
    with contextlib.suppress(BlockingIOError):
        while True:
            desk.one.sock.send(b"x" * 1000, socket.MSG_DONTWAIT)
    desk.one.out += b"x"
    desk.inbox._settle(desk.one)
    clock.now_s += limits.ANSWER_SECONDS - 0.5
    desk.inbox._end_slow()
    assert desk.inbox._by_number == {1: desk.one}
    clock.now_s += 1
    desk.inbox._end_slow()
    assert desk.inbox._by_number == {}
    assert desk.said() == link.Closed(1, service.DEAF)


def test_answers_that_wait_for_who_does_not_read(desk):
    """UNSENT_BYTES, when a listing comes for who watches: with one more the client is disconnected."""
    with contextlib.suppress(BlockingIOError):
        while True:
            desk.one.sock.send(b"x" * 1000, socket.MSG_DONTWAIT)
    desk.one.state = "watching"
    desk.one.out[:] = bytes(limits.UNSENT_BYTES)
    desk.inbox._offered(desk.one, [], last=True)
    assert desk.inbox._by_number == {1: desk.one}
    desk.one.out[:] = bytes(limits.UNSENT_BYTES + 1)
    desk.inbox._offered(desk.one, [], last=True)
    assert desk.inbox._by_number == {}
    assert desk.said() == link.Closed(1, service.DEAF)


# ---- fairness


@pytest.fixture
def timeless(monkeypatch):
    """No work takes long, so none counts by its time: a machine can be slow for once."""
    monkeypatch.setattr(turns, "clock", lambda: 0.0)


def test_bytes_that_are_read_count(desk, timeless):
    """Each BYTES_PER_UNIT of them is a unit beside that of the read."""
    assert desk.send(b"{" + b" " * (limits.BYTES_PER_UNIT - 2)) == 1
    assert desk.send(b" " * limits.BYTES_PER_UNIT) == 2


def test_resources_that_are_asked_for_count(desk, timeless):
    """UNITS_PER_RESOURCE each, beside the read and the message."""
    resources = ",".join(['{"device":"/dev/x"}'] * 2)
    call = f'{{"method":"io.fdbroker.Broker.Open","parameters":{{"resources":[{resources}]}}}}\0'
    assert desk.send(call.encode()) == 2 + 2 * limits.UNITS_PER_RESOURCE


def _of_numbers():
    numbers = ",".join(["1" * 4290] * 14)
    return f'{{"method":"io.fdbroker.Broker.List","parameters":{{"x":[{numbers}]}}}}\0'


def _of_keys():
    keys = ",".join(f'"{number}":0' for number in range(5000))
    return f'{{"method":"io.fdbroker.Broker.List","parameters":{{{keys}}}}}\0'


@pytest.mark.parametrize("make", [_of_numbers, _of_keys], ids=lambda make: make.__name__)
def test_a_message_that_takes_long_counts_by_its_time(desk, make):
    """LONG_UNITS and above: in units of UNIT_US, however few of what is counted otherwise it has."""
    began_s = time.thread_time()
    units = desk.send(make().encode())
    spent_us = (time.thread_time() - began_s) * 1e6
    assert spent_us > limits.LONG_UNITS * limits.UNIT_US
    assert units > (spent_us / limits.UNIT_US - limits.LONG_UNITS) / 2


def test_a_list_of_more_descriptors_than_a_message_may_have_is_not_looked_through(desk):
    """DESCRIPTORS_PER_MESSAGE: the same refusal, and no more work."""
    indexes = ",".join(["0"] * 30_000)
    call = f'{{"method":"io.fdbroker.Inbox.Send","parameters":{{"topic":"x","payload":"","fileDescriptors":[{indexes}]}}}}\0'
    began_s = time.thread_time()
    desk.send(call.encode())
    assert b"fileDescriptors" in desk.client.recv(1000)
    assert time.thread_time() - began_s < 0.02


def test_what_others_change_costs_a_watching_client_nothing(desk, timeless):
    """Its listing comes again for each change; the first one was asked for."""
    offers = [Offer(Device(f"/dev/{number}", "ro"), "p:1") for number in range(500)]
    for state, wanted in (("listing", 500 * limits.UNITS_PER_RESOURCE), ("watching", 0)):
        desk.one.state, before = state, desk.one.user.used
        desk.inbox._offered(desk.one, list(offers), last=False)
        assert desk.one.user.used - before >= wanted
        assert bool(desk.one.user.used - before) == bool(wanted)


def test_deliveries_count():
    """So many subscribers are a unit, one less is none; what comes for the same in that turn goes with it."""
    made = Topics(Records(None))
    made.use((Topic("news", ("subscribers",), 100),))
    sender = reader(made)

    def work():
        made.publish(sender, dispatch.Publish("news", b"x", "x", "text"))
        return made.take_work()

    for _ in range(limits.DELIVERIES_PER_UNIT - 1):
        made.subscribe(reader(made), ["news"], None, 0)
    assert work() == 0
    made.subscribe(reader(made), ["news"], None, 0)
    assert [work(), work()] == [1, 0]
    assert list(made.take_shared(lambda _: False)) == []
    assert [work(), work()] == [1, 0]


def test_delivered_bytes_count():
    """DELIVERED_BYTES_PER_UNIT: of each message, for each subscriber."""
    made = Topics(Records(None))
    made.use((Topic("news", ("subscribers",), limits.MESSAGE_BYTES),))
    sender = reader(made)
    made.subscribe(reader(made), ["news"], None, 0)
    made.subscribe(reader(made), ["news"], None, 0)
    for size, units in ((limits.DELIVERED_BYTES_PER_UNIT // 2 - 500, 0), (limits.DELIVERED_BYTES_PER_UNIT // 2, 1)):
        made.publish(sender, dispatch.Publish("news", b"x" * size, "x" * size, "text"))
        assert made.take_work() == units


def test_a_users_budget():
    """What the policy lets it send at once times UNITS_PER_REQUEST; for a unit more it waits."""
    user = User(5, Rights(messages_per_second=10, burst=20), 0.0)
    user.pace.spend(20 * limits.UNITS_PER_REQUEST, user.rate, user.size, 0.0)
    assert user.pace.wait_s(user.rate, user.size, 0.0) == 0
    user.pace.spend(1, user.rate, user.size, 0.0)
    assert user.pace.wait_s(user.rate, user.size, 0.0) == 1 / (10 * limits.UNITS_PER_REQUEST)


def test_a_budget_is_forgotten_when_it_was_not_used_for_so_long():
    pace = Pace(10, 0.0)
    assert not pace.is_idle(limits.IDLE_SECONDS)
    assert pace.is_idle(limits.IDLE_SECONDS + 0.1)


# ---- the policy


def test_bytes_of_a_policy_file(tmp_path):
    path = tmp_path / "policy.yaml"
    found: list[Finding] = []
    path.write_bytes(b"#" * limits.POLICY_FILE_BYTES)
    assert len(files.read(str(path), found, trusted=False)) == limits.POLICY_FILE_BYTES
    assert not found
    path.write_bytes(b"#" * (limits.POLICY_FILE_BYTES + 1))
    assert files.read(str(path), found, trusted=False) is None
    assert str(found[0]) == f"{path}: is too large, expected at most {limits.POLICY_FILE_BYTES} bytes"


def test_bytes_of_all_files_of_a_policy(tmp_path):
    """POLICY_BYTES: with 256 files of the longest, nobody heard from the launcher for minutes. Not characters."""
    count = limits.POLICY_BYTES // limits.POLICY_FILE_BYTES
    (tmp_path / "policy.d").mkdir()
    paths = [tmp_path / "policy.yaml", *(tmp_path / f"policy.d/{number}.yaml" for number in range(count))]
    for path in paths[:-1]:
        path.write_text("version: 1\n#\u00e9\U0001f4bb".ljust(limits.POLICY_FILE_BYTES - 4, "\n"))
        assert path.stat().st_size == limits.POLICY_FILE_BYTES
    for rest, wanted in (("", count + 1), ("\n", count)):
        paths[-1].write_text(rest)
        found: list[Finding] = []
        load.load(str(paths[0]), found, trusted=False)
        said = [one for one in found if "too much" in one.what]
        assert len(said) == count + 1 - wanted
        assert [str(one) for one in said] == [
            f"{paths[-1]}: is too much with those before it, expected at most {limits.POLICY_BYTES} bytes"
        ][: len(said)]


def test_files_of_a_policy(tmp_path):
    """The first one counts."""
    policy, folder = str(tmp_path / "policy.yaml"), tmp_path / "policy.d"
    folder.mkdir()
    for number in range(limits.POLICY_FILES - 1):
        (folder / f"{number}.yaml").touch()
    assert len(files.policy_files(policy, [])) == limits.POLICY_FILES
    (folder / "more.yaml").touch()
    with pytest.raises(PolicyError, match=f"over {limits.POLICY_FILES} files"):
        files.policy_files(policy, [])


def test_groups_that_a_policy_names(monkeypatch, tmp_path):
    """POLICY_GROUPS: of all rules, limits, deny rules and administrators together, each once."""
    path = tmp_path / "policy.yaml"
    path.write_text(
        "version: 1\n"
        "groups: {50001: {devices: [{path: /dev/null}]}, 50002: {limits: {connections: 3}}}\n"
        "deny: [{groups: [50001, 50003], devices: [/dev/zero]}]\n"
        "administrators: {groups: [50004]}\n"
    )
    monkeypatch.setattr(needs, "load_policy", lambda file, *, trusted: load_policy(file, trusted=False))
    assert load_policy(str(path), trusted=False).policy.gids == {50001, 50002, 50003, 50004}
    at(monkeypatch, "POLICY_GROUPS", 4)
    assert needs.checked_policy(str(path))
    at(monkeypatch, "POLICY_GROUPS", 3)
    with pytest.raises(PolicyError, match="names too many groups, expected at most 3 groups, found 4 groups"):
        needs.checked_policy(str(path))


def test_levels_of_a_policy():
    said = f"over {limits.POLICY_DEPTH} levels deep"
    for depth, passes in ((limits.POLICY_DEPTH, True), (limits.POLICY_DEPTH + 1, False)):
        found: list[Finding] = []
        load.parse("F", "[" * depth + "]" * depth, found)
        assert found
        assert (said not in [one.what for one in found]) is passes


def test_errors_that_are_said_at_once():
    most = limits.POLICY_FINDINGS
    findings = [Finding("F", line, 1, "wrong") for line in range(1, most + 2)]
    assert load.in_order(findings[:most]) == findings[:most]
    assert load.in_order(findings) == [*findings[:most], Finding("F", 0, 0, "and 1 errors more")]


# ---- what a client is told to wait


def test_a_wait_that_is_promised():
    """WAIT_LIMIT_MS: what is longer is said to be as long."""
    for tokens, said in ((-1, -1), (0, 0), (1, 0)):
        bucket = Bucket(10**6, 0.0)
        bucket.take(1000, 10**6, 0.0, 10**6)
        assert bucket.take(1000, 10**6, 0.0, limits.WAIT_LIMIT_MS + tokens) == limits.WAIT_LIMIT_MS + said


def test_a_full_journal_says_when_to_come_again():
    class Full:
        def write(self, values):
            raise NotRecorded("EAGAIN")

    made = Topics(Full())
    made.use((Topic("news", ("journal",), 100),))
    with pytest.raises(RateLimited) as caught:
        made.publish(reader(made), dispatch.Publish("news", b"x", "x", "text"))
    assert caught.value.retry_after_ms == limits.JOURNAL_RETRY_MS


def test_too_many_descriptors_on_their_way_say_when_to_come_again(monkeypatch):
    def full(*_):
        raise OSError(errno.ETOOMANYREFS, "")

    monkeypatch.setattr(send.sockets, "send", full)
    with pytest.raises(RateLimited) as caught:
        send.send_grants(None, b"x", [0])
    assert caught.value.retry_after_ms == limits.BUSY_RETRY_MS


# ---- what the policy may say of users


@pytest.mark.parametrize("name", limits.USER_LIMITS)
def test_limits_of_users_have_limits(tmp_path, name):
    one = limits.USER_LIMITS[name]
    for value in (one.least, one.most):
        assert policy_errors(tmp_path, f"limits: {{{name}: {value}}}") == ""
    for value in (one.least - 1, one.most + 1):
        said = policy_errors(tmp_path, f"limits: {{{name}: {value}}}")
        assert f"a number from {one.least} to {one.most}" in said


def test_a_copy_of_so_many_mounts_and_not_of_one_more():
    """MOUNTS: what a caller sees is counted before a copy of it is made, and the copy, for more may have come meanwhile."""

    class Work(answer._Work):
        def __init__(self):
            pass

        def raised(self, *_):
            return contextlib.nullcontext()

    def make(*counts):
        with (
            mock.patch.object(answer.namespaces, "setns"),
            mock.patch.object(answer.namespaces, "unshare"),
            mock.patch.object(answer.namespaces, "identity", return_value=(1, 2)),
            mock.patch.object(answer.os, "open", return_value=-1),
            mock.patch.object(answer.os, "stat", return_value=mock.Mock(st_dev=1, st_ino=2)),
            mock.patch.object(answer, "count_mounts", side_effect=counts),
        ):
            return Work().make_there("mnt", mock.Mock(), mock.Mock(), os.getpid())

    assert make(limits.MOUNTS, limits.MOUNTS) == -1
    for counts in ((limits.MOUNTS + 1,), (limits.MOUNTS, limits.MOUNTS + 1)):
        with pytest.raises(OSError, match="too many mounts") as refused:
            make(*counts)
        assert refused.value.errno == errno.ENOSPC
