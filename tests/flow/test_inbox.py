"""The inbox's loop with a scripted opener and keeper: order of answers, half messages, clients that do not read, draining."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import sqlite3
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import pytest
from fakes import came

from fdbroker.errors import ClientNotReading, Denied, RateLimited
from fdbroker.inbox import deadlines, dispatch, service, turns
from fdbroker.inbox.client import Client
from fdbroker.inbox.client import User as Somebody
from fdbroker.inbox.reserve import Reserve
from fdbroker.inbox.rights import Rights, Sender
from fdbroker.inbox.service import Inbox
from fdbroker.inbox.store import Store
from fdbroker.inbox.topics import Topics
from fdbroker.kernel import received
from fdbroker.kernel.link import Link
from fdbroker.kernel.records import Records
from fdbroker.kernel.sealed import sealed_memfd
from fdbroker.kernel.sockets import unread_bytes
from fdbroker.offers import Offer
from fdbroker.policy.compiled import Policy, to_bytes
from fdbroker.terms import Device
from fdbroker.topics import Messages, Topic, User
from fdbroker.wire import admin, findings, link, lists, varlink
from fdbroker.wire.connections import Use
from fdbroker.wire.launcher import INBOX_TO_LAUNCHER, LAUNCHER_TO_INBOX

NOTHING = Rights()
POLICY = Policy(frozenset(), frozenset(), {}, {}, {}, (), (), {}, {}, {})
OPEN = b'{"method":"io.fdbroker.Broker.Open","parameters":{"resources":[{"device":"/dev/x"}]}}\0'
INFO = b'{"method":"org.varlink.service.GetInfo"}\0'
LIST = b'{"method":"io.fdbroker.Broker.List","more":true}\0'


class Allowed:
    """In the place of what a policy allows: what the test says, by the pid, which is here the connection's number."""

    def __init__(self):
        self.by_number = {}

    def of(self, subject):
        return self.by_number.get(subject.pid, NOTHING)


class Opener:
    """Plays opener, keeper and launcher, by hand."""

    def __init__(self, store=None, policy=POLICY):
        pair = lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        (self.launcher, launcher_end), (self.sock, opener_end), (self.keeper, keeper_end) = pair(), pair(), pair()
        self.sock.settimeout(30)
        self.keeper.settimeout(30)
        self.launcher.settimeout(30)
        self.allowed = Allowed()
        with mock.patch.object(service, "rights_by", return_value=self.allowed):
            links = map(Link, (launcher_end, opener_end, keeper_end))
            self.inbox = Inbox(*links, policy, Topics(Records(None), store))
        self.error = None
        self.thread = threading.Thread(target=self._run)
        self.ends = [launcher_end, opener_end, keeper_end]
        self.number = 0

    def _run(self):
        try:
            self.inbox.serve()
        except Exception as error:
            self.error = error

    def client(self, allowed=NOTHING):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        received.ask_credentials(theirs)
        ours.settimeout(30)
        socket.send_fds(self.sock, [self.came(allowed)], [theirs.fileno()])
        theirs.close()
        return ours

    def came(self, allowed=NOTHING):
        """What is said of one more connection, which may do so much."""
        self.number += 1
        self.allowed.by_number[self.number] = allowed
        return link.OPENER_TO_INBOX.encode(came(self.number, os.getuid(), pid=self.number))

    def use(self, number, policy, allowed):
        """Another policy, and what each connection may do by it: the messages, of which the launcher's is sent."""
        descriptor = sealed_memfd("policy", to_bytes(policy))
        socket.send_fds(self.launcher, [LAUNCHER_TO_INBOX.encode(link.Policy(number))], [descriptor])
        os.close(descriptor)
        again = [came(one, os.getuid(), pid=one) for one in allowed]
        return list(map(link.OPENER_TO_INBOX.encode, (Use(number, len(allowed)), *again)))

    def next(self):
        return link.INBOX_TO_OPENER.decode(self.sock.recv(200000))

    def send(self, data):
        self.sock.send(data)

    def asked(self):
        """What the keeper is asked next."""
        return lists.INBOX_TO_KEEPER.decode(self.keeper.recv(1000))


@contextmanager
def inbox(store=None, policy=POLICY):
    opener = Opener(store, policy)
    patched = mock.patch.object(service, "rights_by", return_value=opener.allowed)
    patched.start()
    opener.thread.start()
    assert opener.launcher.recv(10) == link.READY
    try:
        yield opener
    finally:
        opener.launcher.close()
        opener.thread.join(30)
        patched.stop()
        opener.sock.close()
        opener.keeper.close()
        for end in opener.ends:
            end.close()
        for client in list(opener.inbox._by_number.values()):
            client.sock.close()
        end_s = time.monotonic() + 5
        while opener.inbox._unread._draining and time.monotonic() < end_s:
            time.sleep(0.01)
        for sock in opener.inbox._unread._ended:
            sock.close()
        opener.inbox._epoll.close()
        assert not opener.thread.is_alive()


def replies(sock, count):
    data = b""
    while data.count(b"\0") < count:
        piece = sock.recv(65536)
        if not piece:
            break
        data += piece
    return [json.loads(message) for message in data.split(b"\0")[:-1]]


def test_nothing_is_written_between_a_question_and_its_outcome():
    with inbox() as opener, opener.client() as client:
        client.sendall(INFO + OPEN + INFO + OPEN + INFO)
        assert len(replies(client, 1)) == 1
        assert isinstance(opener.next(), link.Open)
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.recv(1)
        client.settimeout(30)
        opener.send(link.OPENER_TO_INBOX.encode(link.Outcome(1, Denied("x", index=0))))
        got = replies(client, 2)
        assert [reply.get("error", "").rpartition(".")[2] for reply in got] == ["Denied", ""]
        assert isinstance(opener.next(), link.Open)
        opener.send(link.OPENER_TO_INBOX.encode(link.Outcome(1, None)))  # the opener wrote that answer itself
        assert "parameters" in replies(client, 1)[0]


def test_an_outcome_for_a_client_that_is_gone_is_dropped():
    with inbox() as opener:
        client = opener.client()
        client.sendall(OPEN)
        assert isinstance(opener.next(), link.Open)
        client.close()
        assert opener.next() == link.Closed(1, 0)
        opener.send(link.OPENER_TO_INBOX.encode(link.Outcome(1, None)))
        with opener.client() as other:
            other.sendall(INFO)
            assert replies(other, 1)
        assert opener.error is None


@pytest.mark.parametrize(
    "said",
    [
        lists.Offered(1, False, [Offer(Device("/dev/x", "ro"), "policy.yaml:1")]),
        lists.Offered(1, True, []),
        lists.ListRefused(1, 1000),
        link.OPENER_TO_INBOX.encode(came(1, os.getuid())),
        link.LAUNCHER_TO_OPENER.encode(admin.Reloaded(1, findings.to_bytes(()))),
    ],
    ids=["some of a list", "the end of a list", "a list that is refused", "it came again", "a reload"],
)
def test_what_is_said_of_a_client_that_is_gone_is_dropped(said):
    with inbox() as opener:
        client = opener.client()
        client.sendall(LIST)
        assert opener.asked() == lists.List(1, True)
        client.close()
        assert opener.next() == link.Closed(1, 0)
        opener.send(said) if isinstance(said, bytes) else opener.keeper.send(lists.KEEPER_TO_INBOX.encode(said))
        with opener.client() as other:
            other.sendall(INFO)
            assert replies(other, 1)
        assert opener.error is None


def test_client_not_reading_closes_after_the_answer():
    with inbox() as opener, opener.client() as client:
        client.sendall(OPEN + OPEN)
        opener.next()
        opener.send(link.OPENER_TO_INBOX.encode(link.Outcome(1, ClientNotReading())))
        assert replies(client, 1)[0]["error"].endswith("ClientNotReading")
        assert client.recv(1) == b""
        assert opener.next() == link.Closed(1, 0)


def test_a_listing_goes_on_until_the_client_ends_it():
    with inbox() as opener:
        client = opener.client()
        client.sendall(LIST)
        assert opener.asked() == lists.List(1, True)
        for count in (0, 9, 20):
            for part in lists.split_offers(1, [Offer(Device("/dev/x", "ro"), "f:1")] * count):
                opener.keeper.send(part)
            (reply,) = replies(client, 1)
            assert reply["continues"]
            assert len(reply["parameters"]["resources"]) == count
        client.close()
        assert opener.next() == link.Closed(1, 0)


def test_who_does_not_read_its_listings_is_closed():
    with inbox() as opener, opener.client() as client:
        client.sendall(LIST)
        opener.asked()
        offers = [Offer(Device("/dev/" + "x" * 200, "ro"), "f:1")] * 800
        opener.keeper.settimeout(None)
        messages = [part for _ in range(8) for part in lists.split_offers(1, offers)]
        sender = threading.Thread(target=lambda: [opener.keeper.send(part) for part in messages])
        sender.start()
        assert link.INBOX_TO_OPENER.decode(opener.sock.recv(100)) == link.Closed(1, 4)
        sender.join(30)


def test_a_list_that_is_refused_is_answered_and_its_user_slowed():
    with inbox() as opener, opener.client() as client:
        client.sendall(b'{"method":"io.fdbroker.Broker.List"}\0' + INFO)
        assert opener.asked() == lists.List(1, False)
        (one,) = opener.inbox._by_number.values()
        with mock.patch.object(opener.inbox.turns, "offend") as offend:
            opener.keeper.send(lists.KEEPER_TO_INBOX.encode(lists.ListRefused(1, 1500)))
            refused, info = replies(client, 2)
        assert refused["error"] == "io.fdbroker.Broker.RateLimited"
        assert refused["parameters"] == {"retryAfterMilliseconds": 1500}
        assert "vendor" in info["parameters"]
        assert offend.call_args_list == [mock.call(one.user)]


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (lists.KEEPER_TO_INBOX.encode(lists.Offered(1, True, [])), "which is idle"),
        (lists.KEEPER_TO_INBOX.encode(lists.ListRefused(1, 1)), "which is idle"),
        (lists.INBOX_TO_KEEPER.encode(lists.List(1, True)), "Offered: cut at"),
        (b"\xff", "unknown message type"),
    ],
    ids=["a list", "a refusal", "a question", "nothing"],
)
def test_a_keeper_that_breaks_its_rules_is_noticed(said, why):
    """What nobody asked for is sent to nobody."""
    with inbox() as opener, opener.client() as client:
        client.sendall(INFO)
        assert len(replies(client, 1)) == 1
        opener.keeper.send(said)
        opener.thread.join(30)
        assert why in str(opener.error)


def test_an_answer_of_the_keeper_is_none_to_what_the_opener_is_asked():
    with inbox() as opener, opener.client() as client:
        client.sendall(OPEN)
        assert isinstance(opener.next(), link.Open)
        opener.keeper.send(lists.KEEPER_TO_INBOX.encode(lists.Offered(1, True, [])))
        opener.thread.join(30)
        assert "which is opening" in str(opener.error)


@pytest.mark.parametrize("who", ["sock", "keeper", "launcher"])
def test_it_ends_when_one_of_the_others_has(who):
    with inbox() as opener, opener.client() as client:
        client.sendall(INFO)
        assert len(replies(client, 1)) == 1
        getattr(opener, who).close()
        opener.thread.join(30)
        assert not opener.thread.is_alive()
        assert opener.error is None


def test_draining_answers_what_is_in_flight_and_ends():
    with inbox() as opener, opener.client() as idle, opener.client() as busy, opener.client() as asking:
        busy.sendall(OPEN)
        assert opener.next().connection == 2
        asking.sendall(INFO)
        opener.send(link.DRAIN)
        assert idle.recv(1) == b""
        assert len(replies(asking, 1)) == 1
        opener.send(link.OPENER_TO_INBOX.encode(link.Outcome(2, Denied("x", index=0))))
        assert replies(busy, 1)[0]["error"].endswith("Denied")
        left = [opener.next() for _ in range(4)]
        assert {message.connection for message in left[:3]} == {1, 2, 3}
        assert left[3] == link.Drained()
        opener.thread.join(30)
        assert not opener.thread.is_alive()


def test_two_messages_at_once_and_a_message_in_two_pieces():
    with inbox() as opener, opener.client() as client:
        client.sendall(INFO + INFO[:10])
        assert len(replies(client, 1)) == 1
        client.sendall(INFO[10:])
        assert len(replies(client, 1)) == 1


def test_a_flood_of_pings_is_answered_whole_and_others_are_served_between():
    with inbox() as opener, opener.client() as client, opener.client() as other:
        count = 8000
        sender = threading.Thread(target=client.sendall, args=(b"\0\0\0\4PING" * count,))
        sender.start()
        other.sendall(INFO)
        assert replies(other, 1)
        data = b""
        while len(data) < 8 * count:
            data += client.recv(65536)
        sender.join(30)
        assert data == b"\0\0\0\4PONG" * count


def test_a_broken_opener_is_noticed():
    with inbox() as opener:
        opener.send(b"\xff")
        opener.thread.join(30)
        assert "unknown message type" in str(opener.error)


def test_a_flood_is_read_no_faster_than_it_is_answered():
    """Else one client fills our memory: what is read waits in the decoder."""
    with inbox() as opener, opener.client() as client:
        sent = 0
        client.settimeout(0.5)
        call = b'{"method":"a.b","oneway":true}\0' * 1000
        end = time.monotonic() + 2
        while time.monotonic() < end:
            sent += client.send(call)
        (one,) = opener.inbox._by_number.values()
        assert len(one.decoder._reader._buffer) <= 2 * 65536
        assert sent > 65536


def test_a_listing_that_is_asked_for_while_draining_is_answered_and_closed():
    with inbox() as opener, opener.client() as client:
        client.sendall(LIST)
        opener.asked()
        opener.inbox._drained_at_s = time.monotonic() + 30
        opener.inbox.draining = True
        for part in lists.split_offers(1, [Offer(Device("/dev/x", "ro"), "f:1")]):
            opener.keeper.send(part)
        assert len(replies(client, 1)) == 1
        assert client.recv(1) == b""
        opener.thread.join(30)
        assert not opener.thread.is_alive()


def test_a_long_first_listing_reaches_a_client_that_reads():
    with inbox() as opener, opener.client() as client:
        client.sendall(LIST)
        opener.asked()
        offers = [Offer(Device("/dev/" + "x" * 200, "ro"), "f:1")] * 3000
        opener.keeper.settimeout(None)
        sender = threading.Thread(target=lambda: [opener.keeper.send(part) for part in lists.split_offers(1, offers)])
        sender.start()
        (reply,) = replies(client, 1)
        sender.join(30)
        assert len(reply["parameters"]["resources"]) == 3000


def test_who_does_not_take_its_last_answer_is_closed_all_the_same(monkeypatch):
    monkeypatch.setattr(deadlines, "_ANSWER_S", 3.0)
    with inbox() as opener, opener.client() as client:
        client.sendall(b"\0\0\0\4PING" * 100)
        ping = b"\0\0\0\4PING" * 8000
        client.settimeout(1)
        with contextlib.suppress(TimeoutError):
            while True:
                client.sendall(ping)
        (one,) = opener.inbox._by_number.values()
        assert one.out
        one.doomed = True
        opener.inbox._settle(one)
        opener.send(link.PING)  # wakes the loop, which then knows of the new time limit
        assert opener.next() == link.Pong()
        assert opener.next() == link.Closed(1, 4)


@pytest.mark.parametrize(("cause", "offends"), [("rate", True), ("records", True), ("journal", False)])
def test_a_user_is_slowed_for_its_own_rate_and_not_for_a_full_journal(cause, offends):
    with inbox() as opener, opener.client() as client:
        client.sendall(OPEN)
        assert isinstance(opener.next(), link.Open)
        (one,) = opener.inbox._by_number.values()
        with mock.patch.object(opener.inbox.turns, "offend") as offend:
            opener.send(link.OPENER_TO_INBOX.encode(link.Outcome(1, RateLimited(1000, cause))))
            assert replies(client, 1)[0]["parameters"] == {"retryAfterMilliseconds": 1000}
        assert offend.call_args_list == [mock.call(one.user)] * offends


@pytest.mark.parametrize(
    ("message", "units"),
    [(b"PING", 1), (OPEN, 1), (b'{"resources":[' + b"{}," * 640 + b"{}]}", 11), (b"," * 60_000, 1)],
)
def test_a_message_costs_what_decoding_it_costs(message, units):
    """VALUES_PER_UNIT: by its bytes alone, 64 KiB of empty objects cost a thirtieth of their time."""
    assert dispatch.units(message) == units


def test_a_message_that_waits_for_us_to_read_it_has_its_time_anew(monkeypatch):
    """It was ended as incomplete although all of it was in our socket."""
    monkeypatch.setattr(deadlines, "_MESSAGE_S", 0.3)
    with inbox() as opener, opener.client() as client, mock.patch.object(opener.inbox._receiver, "peek") as peek:
        peek.return_value = b"x"
        client.sendall(b"\0\0\0\4PI")
        time.sleep(0.8)
        client.sendall(b"NG")
        assert client.recv(100) == b"\0\0\0\4PONG"
        assert peek.called
        peek.return_value = None
        client.sendall(b"\0\0\0\4PI")
        assert opener.next() == link.Closed(1, 3)


def _rest(opener, seconds):
    """Its user must rest for so long."""
    (user,) = opener.inbox.turns._by_owner.values()
    user.rests_until_s = time.monotonic() + seconds
    opener.inbox.turns.resting[user] = None


def _send_own_end(opener, client):
    """Behind a question that the opener has yet to answer: two messages, the second with the connection's own end."""
    socket.send_fds(client, [OPEN + OPEN + call("Send", topic="plain", payload="x")], [client.fileno()])
    assert isinstance(opener.next(), link.Open)


@pytest.mark.parametrize("waits", ["for the opener", "for its own rest", "for another message"])
def test_descriptors_have_their_time_whatever_their_message_waits_for(monkeypatch, waits):
    """Connections that had been sent through themselves stayed for minutes: no time began while anything was asked."""
    monkeypatch.setattr(deadlines, "_ATTACHED_S", 1.0)
    with inbox(policy=POLICY._replace(messages=Messages((PLAIN,)))) as opener, opener.client(MAY) as client:
        opener.sock.settimeout(5)
        _send_own_end(opener, client)
        client.close()
        if waits != "for the opener":
            time.sleep(0.5)
            if waits == "for its own rest":
                _rest(opener, 30)
            opener.send(link.OPENER_TO_INBOX.encode(link.Outcome(1, Denied("x", index=0))))
        if waits == "for another message":
            assert isinstance(opener.next(), link.Open)
        began_s = time.monotonic()
        assert opener.next() == link.Closed(1, 3)
        assert (time.monotonic() - began_s < 0.8) == (waits != "for the opener"), "its time began anew"


def test_who_rests_for_less_than_that_is_served_and_each_such_message_has_a_time_of_its_own(monkeypatch):
    monkeypatch.setattr(deadlines, "_ATTACHED_S", 1.0)
    denied = link.OPENER_TO_INBOX.encode(link.Outcome(1, Denied("x", index=0)))
    with inbox(policy=POLICY._replace(messages=Messages((PLAIN,)))) as opener, opener.client(MAY) as client:
        for _ in range(4):
            _send_own_end(opener, client)
            _rest(opener, 0.4)
            opener.send(denied)
            assert isinstance(opener.next(), link.Open)  # after the rest
            opener.send(denied)
            assert len(replies(client, 3)) == 3


def test_who_closes_one_of_a_user_closes_no_other_one_with_it(monkeypatch):
    """Another one of the user could ask then, in the middle of that, and be closed itself: a KeyError ended the service."""
    monkeypatch.setattr(turns, "_SHARE_ALONE", turns._SHARE)  # as while several users have work
    monkeypatch.setattr(deadlines, "_ATTACHED_S", 1.0)
    # a clock by which all of them are late at once
    monkeypatch.setattr(deadlines, "time", SimpleNamespace(monotonic=lambda: float(int(time.monotonic()))))
    send = call("Send", topic="plain", payload="x")
    time.sleep(1.05 - time.monotonic() % 1)
    with inbox(policy=POLICY._replace(messages=Messages((PLAIN,)))) as opener, contextlib.ExitStack() as clients:
        for _ in range(2):  # ASKED_AT_ONCE
            socket.send_fds(clients.enter_context(opener.client(MAY)), [OPEN + send], [0])
            assert isinstance(opener.next(), link.Open)
        for _ in range(2):
            socket.send_fds(clients.enter_context(opener.client(MAY)), [LIST + send], [0])
        user = next(iter(opener.inbox._by_number.values())).user
        end_s = time.monotonic() + 0.8
        while len(user.waiting) < 2:
            assert time.monotonic() < end_s
            time.sleep(0.01)
        said = [opener.next() for _ in range(4)]
        assert {one.connection for one in said} == {1, 2, 3, 4}
        assert {type(one) for one in said} == {link.Closed}
        assert opener.error is None


# ---- stored messages

STORED = Topic("inbox", ("subscribers", "queue"), 65536, 60)
PLAIN = Topic("plain", ("subscribers",), 65536)
BOTH = frozenset({STORED.name, PLAIN.name})
MAY = Rights(BOTH, BOTH, 10_000, 10_000, 8, 1000, 1 << 20, 1000, 1000)


class Slow(Store):
    """Counts commits, makes each wait for `go`, and fails while it is `broken`."""

    def __init__(self, path):
        super().__init__(path, Reserve(f"{path}-reserve"))
        self.sizes = []
        self.go = threading.Semaphore(0)
        self.broken = False

    def commit(self):
        if self._new or self._done:
            assert self.go.acquire(timeout=30)
            self.sizes.append(len(self._new))
        self._database.execute(f"PRAGMA query_only = {self.broken}")
        super().commit()


@pytest.fixture
def stored_inbox(tmp_path, monkeypatch):
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: connect(*a, **k, check_same_thread=False))
    store = Slow(str(tmp_path / "messages.sqlite"))
    with inbox(store, POLICY._replace(messages=Messages((STORED, PLAIN)))) as opener:
        yield opener, store
    store.close()


def call(method, **parameters):
    return json.dumps({"method": f"io.fdbroker.Inbox.{method}", "parameters": parameters}).encode() + b"\0"


def test_answers_wait_for_the_commit_and_keep_their_order(stored_inbox):
    opener, store = stored_inbox
    with opener.client(MAY) as client:
        calls = [call("Send", topic=topic, payload="x") for topic in ("plain", "inbox", "plain", "none", "inbox")]
        client.sendall(b"".join(calls) + INFO + OPEN)
        assert replies(client, 1) == [{"parameters": {}}]
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.recv(1)
        client.settimeout(30)
        store.go.release()
        got = replies(client, 5)
        assert [reply.get("error", "").rpartition(".")[2] for reply in got] == ["", "", "Denied", "", ""]
        assert "vendor" in got[-1]["parameters"]
        assert [type(said()).__name__ for said in (opener.asked, opener.next)] == ["DeniedUse", "Open"]  # only now


def test_one_commit_for_all_that_came_meanwhile(stored_inbox):
    opener, store = stored_inbox
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(opener.client(MAY)) for _ in range(10)]
        clients[0].sendall(call("Send", topic="inbox", payload="x"))
        time.sleep(0.3)  # that one is being committed
        for client in clients[1:]:
            client.sendall(call("Send", topic="inbox", payload="x"))
        time.sleep(0.1)
        for _ in range(10):
            store.go.release()
        for client in clients:
            assert replies(client, 1) == [{"parameters": {}}]
        assert store.sizes[0] == 1
        assert sum(store.sizes) == 10
        assert len(store.sizes) < 5


def test_when_nothing_can_be_stored_all_of_the_turn_hear_it_and_no_subscriber_gets_it(stored_inbox):
    opener, store = stored_inbox
    frame = b"\0\0\0\1x"
    with opener.client(MAY) as client, opener.client(MAY) as framed, opener.client(MAY) as subscriber:
        subscriber.sendall(
            json.dumps({**json.loads(call("Subscribe", topics=["inbox"])[:-1]), "more": True}).encode() + b"\0"
        )
        framed.sendall(b"\0\0\0\4PING")
        assert framed.recv(100) == b"\0\0\0\4PONG"
        store.broken = True
        client.sendall(call("Send", topic="inbox", payload="lost") + call("Send", topic="plain", payload="y"))
        framed.sendall(frame + frame)
        for _ in range(3):
            store.go.release()
        got = replies(client, 2)
        assert got[0]["error"] == "io.fdbroker.Inbox.QuotaExceeded"
        assert got[0]["parameters"] == {"limit": "store_bytes", "maximum": 1 << 30}
        assert got[1] == {"parameters": {}}
        data = b""
        while len(data) < 8:
            data += framed.recv(100)
        assert data == (b"\0\0\0\x1c") * 2  # ENOSPC
        store.broken = False
        store.go.release()
        framed.sendall(b"\0\0\0\4kept")
        assert framed.recv(4) == b"\0\0\0\0"
        (message,) = replies(subscriber, 1)
        assert message["parameters"]["message"]["payload"] == "kept"


def test_receive_answers_once_its_acknowledgement_is_committed(stored_inbox):
    opener, store = stored_inbox
    with opener.client(MAY) as client:
        store.go.release()
        client.sendall(call("Send", topic="inbox", payload="a") + call("Receive", maximum=10))
        (message,) = replies(client, 2)[1]["parameters"]["messages"]
        assert message["payload"] == "a"
        client.sendall(call("Receive", maximum=10, acknowledge=[message["number"]]) + call("Receive", maximum=10))
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.recv(1)
        client.settimeout(30)
        store.go.release()
        assert replies(client, 2) == [{"parameters": {"messages": []}}] * 2


def test_a_client_that_is_gone_before_the_commit_has_its_message_stored(stored_inbox):
    opener, store = stored_inbox
    with opener.client(MAY) as client:
        client.sendall(call("Send", topic="inbox", payload="last words"))
        time.sleep(0.2)
    store.go.release()
    with opener.client(MAY) as client:
        client.sendall(call("Receive", maximum=10))
        (reply,) = replies(client, 1)
        assert [message["payload"] for message in reply["parameters"]["messages"]] == ["last words"]


def test_what_came_with_half_a_message_goes_with_its_connection():
    """At once, and not with the next event: nothing else happens here."""
    with inbox(policy=POLICY._replace(messages=Messages((PLAIN,)))) as opener:
        client = opener.client(MAY._replace(send=frozenset({PLAIN.name}), subscribe=frozenset()))
        null = os.open("/dev/null", os.O_RDWR)  # whoever has a copy has the same file
        number = os.fstat(null).st_ino
        before = copies(number)
        with client:
            socket.send_fds(client, [b"{"], [null] * 5)
            end = time.monotonic() + 60
            while copies(number) < before + 5:
                assert time.monotonic() < end
        assert isinstance(opener.next(), link.Closed)
        end = time.monotonic() + 60
        while copies(number) > before:
            assert time.monotonic() < end
            time.sleep(0.01)
        os.close(null)


def copies(inode):
    """How many descriptors of this process are of that file."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            count += os.stat(f"/proc/self/fd/{name}").st_ino == inode
    return count


def test_a_client_for_whom_no_descriptor_is_left_is_closed_and_the_others_go_on():
    with inbox() as opener, opener.client() as first:
        first.sendall(INFO)
        assert len(replies(first, 1)) == 1
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with ours, theirs:
            spare = os.dup(ours.fileno())
            os.close(spare)  # the lowest that is free
            resource.setrlimit(resource.RLIMIT_NOFILE, (spare, limit[1]))
            try:
                socket.send_fds(opener.sock, [opener.came()], [theirs.fileno()])
                assert opener.next() == link.Closed(opener.number, link.NOT_TAKEN)
                first.sendall(INFO)
                assert len(replies(first, 1)) == 1
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limit)


def test_half_of_a_new_policy_is_not_in_force(stored_inbox):
    """Nobody is answered from the moment on that another policy counts until all have come again."""
    opener, store = stored_inbox
    mail = Topic("mail", ("queue",), 100, 3600)
    users = (User(7, "bob", frozenset({0})), User(8, "carol", frozenset({0})))
    send = call("Send", topic="mail", payload="x") + call("Send", topic="mail", payload="y", to="carol")
    with opener.client() as client, opener.client() as other:
        client.sendall(INFO)
        assert "vendor" in replies(client, 1)[0]["parameters"]
        opener.allowed.by_number[1] = Rights(frozenset({"mail"}), frozenset(), 1000, 1000, 0, 100, 10_000)
        first, *rest = opener.use(1, POLICY._replace(messages=Messages((mail,), users)), (1, 2))
        opener.send(first)
        while unread_bytes(opener.sock):  # else a client that is ready can come before it
            time.sleep(0.01)
        client.sendall(send)
        other.sendall(INFO)
        for part in rest:
            for one in (client, other):
                one.settimeout(0.2)
                with pytest.raises(TimeoutError):
                    one.recv(1)
                one.settimeout(30)
            opener.send(part)
        assert INBOX_TO_LAUNCHER.decode(opener.launcher.recv(10)) == link.Applied(1)
        store.go.release(2)  # they can be two commits
        assert [reply.get("error") for reply in replies(client, 2)] == [None, None]
        assert "vendor" in replies(other, 1)[0]["parameters"]
    assert [len(store.waiting(uid, ["mail"], 0, 100)) for uid in (7, 8)] == [1, 2]


@pytest.mark.parametrize("number", [1, 2])
def test_a_policy_that_did_not_come_is_a_violation(number):
    with inbox() as opener:
        for message in opener.use(number, POLICY, ()) if number == 2 else ():
            opener.send(message)  # that one did
        if number == 2:
            assert INBOX_TO_LAUNCHER.decode(opener.launcher.recv(10)) == link.Applied(2)
        opener.send(link.OPENER_TO_INBOX.encode(Use(1, 0)))
        opener.thread.join(30)
        assert "policy 1 is to be used, which did not come" in str(opener.error)


def test_a_oneway_acknowledgement_is_one(stored_inbox):
    opener, store = stored_inbox
    for _ in range(9):
        store.go.release()
    with opener.client(MAY) as client:
        client.sendall(call("Send", topic="inbox", payload="x") + call("Receive", maximum=1))
        (message,) = replies(client, 2)[1]["parameters"]["messages"]
        parameters = {"maximum": 1, "acknowledge": [message["number"]]}
        oneway = {"method": "io.fdbroker.Inbox.Receive", "parameters": parameters, "oneway": True}
        client.sendall(json.dumps(oneway).encode() + b"\0" + INFO + call("Receive", maximum=1))
        info, received = replies(client, 2)
        assert "vendor" in info["parameters"]
        assert received["parameters"]["messages"] == []


def test_a_client_for_which_no_descriptor_is_left_is_given_up_and_the_service_goes_on():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with inbox() as opener, opener.client() as client:
        client.sendall(INFO)
        replies(client, 1)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            free = os.dup(0)
            os.close(free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
            try:
                socket.send_fds(
                    opener.sock,
                    [link.OPENER_TO_INBOX.encode(came(9, 0))],
                    [theirs.fileno()],
                )
                assert opener.next() == link.Closed(9, link.NOT_TAKEN)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        client.sendall(INFO)
        assert "vendor" in replies(client, 1)[0]["parameters"]


def test_what_is_stored_comes_before_what_is_sent_meanwhile(stored_inbox):
    opener, store = stored_inbox
    for _ in range(99):
        store.go.release()
    with opener.client(MAY) as client, opener.client(MAY) as subscriber:
        for _ in range(12):
            client.sendall(call("Send", topic="inbox", payload="x" * 50_000))
            assert replies(client, 1) == [{"parameters": {}}]
        after = {"topics": ["inbox", "plain"], "after": 0}
        subscriber.sendall(
            json.dumps({"method": "io.fdbroker.Inbox.Subscribe", "parameters": after, "more": True}).encode() + b"\0"
        )
        subscriber.recv(1, socket.MSG_PEEK)  # a first page
        client.sendall(call("Send", topic="plain", payload="x"))
        assert replies(client, 1) == [{"parameters": {}}]
        topics = [reply["parameters"]["message"]["topic"] for reply in replies(subscriber, 13)]
        assert topics == ["inbox"] * 12 + ["plain"]


def test_a_long_acknowledgement_counts_as_the_work_that_it_is(stored_inbox):
    opener, store = stored_inbox
    for _ in range(99):
        store.go.release()
    asked = []
    store.acknowledge = lambda uid, topics, numbers: asked.append(len(numbers))
    with contextlib.ExitStack() as clients:
        found = [clients.enter_context(opener.client(MAY)) for _ in range(8)]
        take, most = opener.inbox._topics.commit, []
        opener.inbox._topics.commit = lambda: (most.append(sum(asked)), asked.clear(), take())[-1]
        for client in found:
            client.sendall(call("Receive", maximum=1, acknowledge=list(range(1000))))
        for client in found:
            assert replies(client, 1)[0]["parameters"]["messages"] == []
        assert max(most) <= 2000  # of one user in one turn


def test_who_acknowledges_nothing_is_served_while_nothing_can_be_stored(stored_inbox):
    opener, store = stored_inbox
    with opener.client(MAY) as sender, opener.client(MAY) as receiver:
        store.broken = True
        for _ in range(3):
            store.go.release()
        sender.sendall(call("Send", topic="inbox", payload="x") + call("Receive", maximum=5, acknowledge=[1]))
        receiver.sendall(call("Receive", maximum=5) * 5)
        assert replies(receiver, 5) == [{"parameters": {"messages": []}}] * 5
        assert [reply.get("error") for reply in replies(sender, 2)] == ["io.fdbroker.Inbox.QuotaExceeded"] * 2


def test_what_comes_while_the_opener_is_asked_wakes_nobody_and_is_read_with_the_outcome():
    with inbox() as opener, opener.client() as client:
        events, taken = [], opener.inbox._client_event
        opener.inbox._client_event = lambda *event: (events.append(event), taken(*event))
        client.sendall(OPEN)
        for _ in range(5):
            assert isinstance(opener.next(), link.Open)
            client.sendall(OPEN)
            time.sleep(0.05)
            assert len(events) <= 1
            opener.send(link.OPENER_TO_INBOX.encode(link.Outcome(1, None)))


def test_what_came_while_the_opener_was_asked_is_not_answered_once_it_stops():
    with inbox() as opener, opener.client() as client:
        client.sendall(OPEN)
        assert isinstance(opener.next(), link.Open)
        client.sendall(OPEN)
        opener.send(link.DRAIN)
        opener.send(link.OPENER_TO_INBOX.encode(link.Outcome(1, None)))
        assert opener.next() == link.Closed(1, 0)


@pytest.mark.parametrize("how", ["goes on", "hangs up"])
def test_whoever_is_not_read_for_a_while_keeps_nobody_awake(how):
    with inbox() as opener, opener.client() as client:
        client.sendall(INFO)
        assert len(replies(client, 1)) == 1
        (user,) = opener.inbox.turns._by_owner.values()
        events, taken = [], opener.inbox._client_event
        opener.inbox._client_event = lambda *event: (events.append(event), taken(*event))
        user.rests_until_s = time.monotonic() + 1
        opener.inbox.turns.resting[user] = None
        client.sendall(INFO)
        if how == "hangs up":
            client.shutdown(socket.SHUT_WR)
            client.close()
        time.sleep(0.5)
        assert 1 <= len(events) < 10
        if how == "hangs up":
            assert isinstance(opener.next(), link.Closed)
        else:
            assert len(replies(client, 1)) == 1


def test_no_denial_is_lost_while_the_keeper_reads_nothing():
    """Each was only said when there was room, and nobody learned of the others."""
    denied = b'{"method":"io.fdbroker.Inbox.Send","parameters":{"topic":"t%d","payload":"x"}}\0'
    often = Rights(messages_per_second=100_000, burst=100_000)
    with inbox() as opener, opener.client(often) as client, opener.client(often) as other:
        opener.ends[2].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)  # room for some messages
        count = 300
        client.sendall(b"".join(denied % number for number in range(count)))
        time.sleep(0.3)  # the link is full by now
        other.sendall(denied % count + b'{"method":"io.fdbroker.Broker.About"}\0')
        for end in (client, other):
            end.shutdown(socket.SHUT_WR)
        said = [opener.asked() for _ in range(count + 1)]
        assert [one.use.topic for one in said if one.connection == 1] == [f"t{number}" for number in range(count)]
        assert [one.use.topic for one in said if one.connection == 2] == [f"t{count}"]
        assert [type(opener.next()) for _ in range(2)] == [link.Closed] * 2
        assert len(replies(client, count + 1)) == count
        assert len(replies(other, 3)) == 2


def test_no_list_is_lost_while_the_keeper_reads_nothing():
    with inbox() as opener, contextlib.ExitStack() as stack:
        opener.ends[2].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)  # room for some messages
        clients = [stack.enter_context(opener.client()) for _ in range(30)]
        for client in clients:
            client.sendall(LIST)
        end_s = time.monotonic() + 30
        while not opener.inbox._keeper.waiting:
            assert time.monotonic() < end_s
            time.sleep(0.01)
        assert sorted(opener.asked() for _ in clients) == [lists.List(number, True) for number in range(1, 31)]


def test_messages_that_are_shed_give_back_the_losses_that_they_tell_of():
    """Nine were lost, and the client was told of one."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        client = Client(1, Sender(5, 5, 1, "", 5), theirs, Somebody(5, MAY, 0.0))
        attached = mock.Mock(numbers=(0,))
        client.member.lost = 7
        for _ in range(2):
            client.member.put(varlink.encode_reply({"message": {"payload": "x"}}, continues=True), attached)
        for data, one in client.member.take(lambda _: True):
            client.push(data, one)
        assert b'"lost":7,' in client.out
        client.shed()
        assert (client.member.lost, client.out) == (9, b"")


def test_an_opener_that_ends_while_we_drain_is_no_fault():
    """On a slow machine the time for stopping is over before all is drained: the launcher ends the opener first."""
    ended = []
    with inbox() as opener, opener.client() as client:
        client.sendall(OPEN)
        assert isinstance(opener.next(), link.Open)
        assert not opener.inbox.draining
        opener.sock.shutdown(socket.SHUT_RD)  # before the inbox has anything to say, and it still hears
        opener.send(link.DRAIN)
        opener.send(link.OPENER_TO_INBOX.encode(link.Outcome(1, Denied("x", index=0))))
        opener.thread.join(30)
        ended.append(opener.error)
    assert isinstance(ended[0], ConnectionError)
    assert opener.inbox.draining


def test_connections_may_come_in_another_order_than_they_were_accepted():
    """Whoever had to wait comes later, with a lower number: it was not served, and nobody noticed its end."""
    with inbox() as opener:
        late, early = opener.came(), opener.came()
        ends = []
        for message in (early, late):
            ours, theirs = socket.socketpair()
            received.ask_credentials(theirs)
            socket.send_fds(opener.sock, [message], [theirs.fileno()])
            theirs.close()
            ours.settimeout(30)
            ours.sendall(b"\0\0\0\4PING")
            assert ours.recv(8, socket.MSG_WAITALL) == b"\0\0\0\4PONG"
            ends.append(ours)
        for number, ours in zip((2, 1), ends, strict=True):
            ours.close()
            assert opener.next() == link.Closed(number, 0)
            opener.send(late if number == 1 else early)  # again, before the opener has heard of its end
        opener.send(link.PING)
        assert opener.next() == link.Pong()
        assert not opener.inbox._by_number
