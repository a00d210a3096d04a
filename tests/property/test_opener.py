"""The opener's tables against a few dictionaries: whose turn it is, what each user has in use, and who gets what.

The inbox is played as one that is taken over: it says anything about any number. The sockets and nodes are real.
"""

from __future__ import annotations

import os
import socket
import tempfile
from types import SimpleNamespace
from unittest import mock

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fdbroker import limits
from fdbroker.errors import LinkViolation
from fdbroker.kernel import sockets
from fdbroker.kernel.capabilities import Bracket
from fdbroker.kernel.records import NotRecorded
from fdbroker.opener import door, request, service
from fdbroker.opener.ask import Asking
from fdbroker.opener.open import Nodes
from fdbroker.opener.service import Opener
from fdbroker.policy.compiled import Policy
from fdbroker.terms import Device, DeviceRule, Subject, TopicUse
from fdbroker.wire import admin, keeper, link
from fdbroker.wire.connections import Came, Use

ALLOWED, DENIED = Device("/dev/null", "rw"), Device("/dev/zero", "ro")
RULE = DeviceRule("/dev/null", "rw", "", "", False, "everyone", "p.yaml:1")
DEFAULTS = {name: limit.default for name, limit in limits.USER_LIMITS.items()}
UIDS = st.sampled_from([5, 6, 0])
WHICH = st.integers(0, 15)  # of the connections; the last few stand for numbers that are over, or never were


def policy(maxima, rules):
    return Policy(frozenset(), frozenset(), DEFAULTS | maxima, {}, {}, rules, (), {}, {}, {})


POLICIES = (
    policy({"connections": 3, "unread_grants": 4, "burst": 12, "requests_per_second": 2}, (RULE,)),
    policy({"connections": 2, "unread_grants": 2, "burst": 6, "requests_per_second": 1}, (RULE,)),
    policy({"connections": 3, "unread_grants": 4, "burst": 12, "requests_per_second": 2}, ()),
)


class Wire:
    """A link whose other end is the test."""

    waiting = 0

    def __init__(self):
        self.sent = []
        self.heard = []

    def fileno(self):
        return -1

    def receive(self):
        return self.heard.pop() if self.heard else None

    def send(self, message):
        self.sent.append(message)

    def send_with_descriptors(self, message, descriptors):
        self.sent.append(message)
        return True


class Audit:
    """What is recorded; nothing while the journal is full."""

    counting = False

    def __init__(self):
        self.full = False
        self.granted = 0
        self.refused = 0

    def grant(self, connection, subject, grant, count):
        self.write(None)
        self.granted += 1

    def write(self, record):
        if self.full:
            raise NotRecorded("EAGAIN")

    def undo(self, record):
        self.granted -= 1

    def refuse(self, record, now_s):
        assert str(record.reason)
        self.refused += 1


def came(number, uid):
    return Came(number, uid, uid, 1, uid, False, "", "", ())


class One:
    """What the model knows of a connection."""

    def __init__(self, uid, client, ours):
        self.uid, self.client, self.ours = uid, client, ours
        self.state = "idle"
        self.unread = []  # how many descriptors each message has that the client has not read


class Machine(RuleBasedStateMachine):
    """Invariant: connections, their turns, unread grants and buckets are what the dictionaries say."""

    def __init__(self):
        super().__init__()
        self.now = 1000.0
        clock = SimpleNamespace(monotonic=lambda: self.now, thread_time=lambda: 0.0)
        self.patches = [mock.patch.object(module, "time", clock) for module in (service, request, door)]
        for patch in self.patches:
            patch.start()
        self.folder = tempfile.TemporaryDirectory()
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(os.path.join(self.folder.name, "s"))
        listener.listen()
        self.launcher, self.inbox, self.keeper, self.audit = Wire(), Wire(), Wire(), Audit()
        self.policy, self.nodes = POLICIES[0], Nodes(Bracket(frozenset()))
        links = self.launcher, self.inbox, self.keeper
        self.opener = Opener(listener, *links, Asking(None), self.policy, self.nodes, self.audit)
        self.opener._door.identifier.close()
        self.opener._door.identifier = SimpleNamespace(
            identify=lambda sock, owners: Subject(
                *(self.uid, frozenset({self.uid}), self.uid, 1, "", ""), foreign=False, owner=self.uid
            ),
            describe=lambda sock, subject: subject,
            process=lambda sock, subject, let_in_s: sockets.peer_pidfd(sock),
        )
        self.uid = -1
        self.open: dict[int, One] = {}
        self.ended: list[One] = []  # by us, but the client may still have something to read
        self.last = 0
        self.granted = 0
        self.buckets: dict[int, tuple[float, float]] = {}  # tokens, when
        self.policies = 0

    @initialize(uids=st.lists(UIDS, min_size=2, max_size=4))
    def begin(self, uids):
        for uid in uids:
            self.connect(uid)

    def said(self):
        messages, self.inbox.sent = self.inbox.sent, []
        return [link.OPENER_TO_INBOX.decode(message) for message in messages]

    def told(self):
        """What the keeper has been told."""
        messages, self.keeper.sent = self.keeper.sent, []
        return [keeper.OPENER_TO_KEEPER.decode(message) for message in messages]

    def outcome(self, number):
        """The class of the one refusal that was said, None for a grant."""
        (said,) = self.said()
        assert (type(said), said.connection) == (link.Outcome, number)
        return None if said.refusal is None else type(said.refusal).__name__

    def number(self, which):
        return list(self.open)[which % len(self.open)] if which < 13 and self.open else which % (self.last + 2)

    def unread_of(self, uid):
        return sum(sum(one.unread) for one in [*self.open.values(), *self.ended] if one.uid == uid)

    def in_use(self, uid):
        mine = [one for one in self.open.values() if one.uid == uid]
        return len(mine) + sum(one.uid == uid and bool(one.unread) for one in self.ended)

    # ---- clients

    @precondition(lambda self: len(self.open) < 7)
    @rule(uid=UIDS)
    def connect(self, uid):
        self.uid = uid
        client, ours = socket.socketpair()
        client.setblocking(False)
        refused = self.in_use(uid) >= self.policy.limits["connections"]
        self.buckets.setdefault(uid, (float(self.policy.limits["burst"]), self.now))
        self.opener._door._welcome(ours)
        if refused:
            assert (self.said(), self.told()) == ([], [])
            assert b"QuotaExceeded" in client.recv(1000)
            assert client.recv(10) == b""
            client.close()
            return
        self.last += 1
        assert self.said() == self.told() == [came(self.last, uid)]
        self.open[self.last] = One(uid, client, ours)

    @precondition(lambda self: self.open or self.ended)
    @rule(which=st.integers(0, 20), whole=st.booleans())
    def read(self, which, whole):
        """A client reads one message, or all: each brings the descriptors that were granted to it, and no others."""
        every = [*self.open.values(), *self.ended]
        one = every[which % len(every)]
        while one.unread:
            _, numbers, _, _ = socket.recv_fds(one.client, 65536, 64)
            for number in numbers:
                assert os.fstat(number).st_rdev == os.makedev(1, 3)
                os.close(number)
            assert len(numbers) == one.unread.pop(0)
            if not whole:
                return
        if one in self.open.values() and one.client.fileno() >= 0:
            with pytest.raises(BlockingIOError):
                one.client.recv(1)

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 20))
    def vanish(self, which):
        one = list(self.open.values())[which % len(self.open)]
        one.client.close()
        one.unread.clear()

    @rule(seconds=st.integers(1, 20))
    def time_passes(self, seconds):
        self.now += seconds
        self.opener._timers()

    @rule(full=st.booleans())
    def journal(self, full):
        self.audit.full = full

    @rule(which=st.integers(0, len(POLICIES) - 1))
    def reload(self, which):
        self.policy = POLICIES[which]
        self.policies += 1
        self.opener._use(self.policy, self.policies)
        again = [came(number, one.uid) for number, one in self.open.items()]
        assert self.said() == self.told() == [Use(self.policies, len(self.open)), *again]

    # ---- what the inbox says

    def turn(self, number, event, message):
        """Let the inbox say it. False when it was not its turn, which ends the service and changes nothing before."""
        one = self.open.get(number)
        if one is None or (one.state, event) not in link.TURNS:
            with pytest.raises(LinkViolation):
                self.opener._answer(link.INBOX_TO_OPENER.decode(message))
            assert self.said() == []
            return False
        self.opener._answer(link.INBOX_TO_OPENER.decode(message))
        return True

    def limited(self, one, cost=1):
        """Whether a request is refused for its rate; tokens are taken unless there are too few."""
        maxima = self.policy.limits
        tokens, since = self.buckets[one.uid]
        tokens = min(float(maxima["burst"]), tokens + (self.now - since) * maxima["requests_per_second"])
        wanted = min(cost, maxima["burst"])
        self.buckets[one.uid] = (tokens - wanted * (tokens >= wanted), self.now)
        return "RateLimited" if tokens < wanted else ""

    def full(self, one, count):
        """By which limit so many grants are refused, "" for none."""
        maximum = self.policy.limits["unread_grants"]
        if sum(one.unread) >= maximum:
            return "ClientNotReading"
        return "QuotaExceeded" if self.unread_of(one.uid) + count > maximum else ""

    @rule(which=WHICH, count=st.integers(1, 3), denied=st.booleans())
    def ask_open(self, which, count, denied):
        number = self.number(which)
        asked = [ALLOWED] * count + [DENIED] * denied
        if not self.turn(number, "Open", link.INBOX_TO_OPENER.encode(link.Open(number, tuple(asked)))):
            return
        one = self.open[number]
        wanted = self.limited(one, count + denied)
        if not wanted and count + denied > 1 and one.client.fileno() < 0:
            wanted = "OpenFailed"  # many are not looked at for a client that is gone
        if not wanted and (denied or not self.policy.everyone):
            wanted = "Denied"
        wanted = wanted or self.full(one, count)
        if not wanted and self.audit.full:
            wanted = "RateLimited"
        elif not wanted and one.client.fileno() < 0:
            wanted = "OpenFailed"
        assert self.outcome(number) == (wanted or None)
        if not wanted:
            one.unread.append(count)
            self.granted += 1

    @rule(which=WHICH, wait_ms=st.integers(0, 2**32 - 1))
    def list_refused(self, which, wait_ms):
        """The keeper's word for it, which is recorded of who is there; it may be one that has ended."""
        number = self.number(which)
        self.keeper.heard.append(keeper.KEEPER_TO_OPENER.encode(keeper.ListRefused(number, wait_ms)))
        before = self.audit.refused
        if number > self.last:
            with pytest.raises(LinkViolation):
                self.opener._read_keeper()
        else:
            self.opener._read_keeper()
        assert self.audit.refused - before == (number in self.open)
        assert (self.said(), self.told()) == ([], [])

    @rule(which=WHICH, stop=st.booleans(), home=st.booleans())
    def ask_other(self, which, stop, home):
        self.ask_admin(self.number(which), stop=stop, home=home)

    def ask_admin(self, number, *, stop, home):
        message = (
            link.INBOX_TO_OPENER.encode(link.Shutdown(number))
            if stop
            else link.INBOX_TO_OPENER.encode(admin.Reload(number))
        )
        if not self.turn(number, "Shutdown" if stop else "Reload", message):
            return
        one = self.open[number]
        wanted = self.limited(one) or ("" if one.uid == 0 else "Denied")
        asked, self.launcher.sent = self.launcher.sent, []
        if wanted:
            assert (self.outcome(number), asked) == (wanted, [])
            return
        assert (self.said(), asked) == ([], [link.OPENER_TO_LAUNCHER.encode(admin.Judge(number))])
        self.opener._obey(link.WITNESS_TO_LAUNCHER.encode(admin.Judged(number, home=home)), [])
        wanted = ("" if home else "Denied") or ("RateLimited" if self.audit.full else "")
        asked, self.launcher.sent = self.launcher.sent, []
        if wanted:
            assert (self.outcome(number), asked) == (wanted, [])
            return
        assert (self.said(), asked) == (
            [],
            [link.STOP_ASKED if stop else link.OPENER_TO_LAUNCHER.encode(admin.ReloadAsked(number))],
        )
        one.state = "stopping" if stop else "reloading"

    @precondition(lambda self: any(one.state == "reloading" for one in self.open.values()))
    @rule()
    def reloaded(self):
        number = next(number for number, one in self.open.items() if one.state == "reloading")
        message = link.LAUNCHER_TO_OPENER.encode(admin.Reloaded(number, ()))
        self.opener._obey(message, [])
        assert self.said() == [admin.Reloaded(number, ())]
        self.open[number].state = "idle"
        self.opener._obey(message, [])  # nobody waits for it
        assert self.said() == []

    @rule(which=WHICH, reason=st.integers(0, len(link.CLOSED_REASONS) - 1))
    def closed(self, which, reason):
        number = self.number(which)
        if reason == link.NOT_TAKEN and number in self.open and self.open[number].unread:
            reason = 0  # the service would end: tests/flow/test_opener.py
        if not self.turn(number, "Closed", link.INBOX_TO_OPENER.encode(link.Closed(number, reason))):
            return
        assert (self.said(), self.told()) == ([], [keeper.Ended(number)])
        self.ended.append(self.open.pop(number))

    @rule(which=WHICH, message=st.sampled_from([link.PONG, link.DRAINED, b""]))
    def say_something(self, which, message):
        number = self.number(which)
        if message:
            with pytest.raises(LinkViolation):  # nobody asked for it
                self.opener._answer(link.INBOX_TO_OPENER.decode(message))
        elif self.turn(number, "DeniedUse", link.INBOX_TO_OPENER.encode(link.DeniedUse(number, TopicUse("send", "x")))):
            assert self.said() == []

    @rule()
    def look(self):
        """The kernel is asked what is unread; mostly it is not, and then nobody is thought to have less than that."""
        for number, connection in self.opener._connections.items():
            assert connection.unread_grants() == sum(self.open[number].unread)
        for uid, account in self.opener._door._accounts._by_owner.items():
            assert sum(one.unread_grants() for one in tuple(account.unread)) == self.unread_of(uid)
            assert account.unread_most == self.unread_of(uid)

    # ---- what is then true

    @invariant()
    def agrees(self):
        opener = self.opener
        assert {number: one.state for number, one in opener._connections.items()} == {
            number: one.state for number, one in self.open.items()
        }
        for number, connection in opener._connections.items():
            assert connection.subject.uid == self.open[number].uid
        for uid, account in opener._door._accounts._by_owner.items():
            assert account.count_connections() == self.in_use(uid)
            assert account.unread_most >= self.unread_of(uid)
        assert self.audit.granted == self.granted  # every grant has its record, and no record is left of another
        for one in self.ended:  # ours is closed as soon as nothing of it is unread
            assert (one.ours.fileno() < 0) == (not one.unread)
        self.ended = [one for one in self.ended if one.unread or one.client.close()]

    def teardown(self):
        for one in [*self.open.values(), *self.ended]:
            one.client.close()
            one.ours.close()
        self.opener._door.close()
        self.opener._epoll.close()
        for number in (
            self.opener._spare,
            self.opener._woken,
        ):
            os.close(number)
        self.nodes.close()
        self.folder.cleanup()
        for patch in self.patches:
            patch.stop()


TestOpener = Machine.TestCase
TestOpener.settings = settings(max_examples=90, stateful_step_count=40, deadline=None)
