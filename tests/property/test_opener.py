"""The opener's tables against a few dictionaries: whose turn it is, what each user has in use, and who gets what.

The inbox is played as one that is taken over: it says anything about any number. The sockets and nodes are real.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import tempfile
from types import SimpleNamespace
from unittest import mock

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fdbroker.errors import LinkViolation
from fdbroker.kernel import sockets
from fdbroker.kernel.capabilities import Bracket
from fdbroker.kernel.records import NotRecorded
from fdbroker.limits import every as limits
from fdbroker.opener import door, request, service
from fdbroker.opener.ask import Asking
from fdbroker.opener.open import Nodes
from fdbroker.opener.service import Opener
from fdbroker.policy.compiled import Policy
from fdbroker.terms import Device, DeviceRule, Subject
from fdbroker.wire import admin, keeper, link
from fdbroker.wire.audit import fields
from fdbroker.wire.connections import Came, Use
from fdbroker.wire.launcher import DRAINED, STOP_ASKED, WITNESS_TO_LAUNCHER

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
        self.room = "there is"

    def fileno(self):
        return -1

    def receive(self):
        return self.heard.pop() if self.heard else None

    def send(self, message):
        self.sent.append(message)

    def send_with_descriptors(self, message, descriptors):
        if self.room == "none":
            return False
        if self.room == "too many in flight":
            raise OSError(errno.ETOOMANYREFS, "")
        self.sent.append(message)
        return True


class Audit:
    """What is recorded; nothing while the journal is full."""

    owes = False

    def __init__(self):
        self.full = False
        self.granted = 0
        self.refused = []

    def grant(self, connection, subject, grant, count):
        self.write(None)
        self.granted += 1

    def write(self, record):
        if self.full:
            raise NotRecorded("EAGAIN")

    def undo(self, record, count):
        self.granted -= 1

    def flush(self):
        """Nothing is owed."""

    def refuse(self, record):
        assert fields(record)
        self.refused.append((record.kind, record.connection))


def came(number, uid):
    return Came(number, uid, uid, 1, uid, False, "", "", ())


class One:
    """What the model knows of a connection."""

    def __init__(self, uid, client, ours):
        self.uid, self.client, self.ours = uid, client, ours
        self.state = "idle"
        self.hung_up = False
        self.unread = []  # how many descriptors each message has that the client has not read
        self.lingers = 0  # its number, when it has ended with some of these unread


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
            arrived=lambda sock, owners: Subject(self.uid, (), self.uid, 1, "", "", foreign=False, owner=self.uid),
            identify=lambda sock, subject: subject._replace(gids=frozenset({self.uid})),
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
        """What the keeper has been told, but that several have work."""
        messages, self.keeper.sent = self.keeper.sent, []
        every = [keeper.OPENER_TO_KEEPER.decode(message) for message in messages]
        return [said for said in every if said != keeper.Contested()]

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
    @rule(uid=UIDS, turned_away=st.sampled_from([False, False, False, True]))
    def connect(self, uid, turned_away=False):
        self.uid = uid
        client, ours = socket.socketpair()
        client.setblocking(False)
        leaving = sum(one.uid == uid and one.hung_up for one in self.open.values())
        full = self.in_use(uid) - leaving >= self.policy.limits["connections"]
        self.opener._door._knock(ours)
        self.last += 1
        assert self.told() == [keeper.Knock(self.last, uid, uid, 1, uid)]
        if turned_away:
            self.answer(keeper.TurnAway(self.last, 3))
        else:
            self.answer(keeper.LetIn(self.last))
        if turned_away or full:
            assert (self.said(), self.told()) == ([], [keeper.Ended(self.last)])
            assert b"QuotaExceeded" in client.recv(1000)
            assert client.recv(10) == b""
            client.close()
            return
        self.buckets.setdefault(uid, (float(self.policy.limits["burst"]), self.now))
        assert self.said() == self.told() == [came(self.last, uid)]
        self.open[self.last] = One(uid, client, ours)

    def answer(self, said):
        """The keeper says it, once: to say it again would end the service."""
        for again in (False, True):
            self.keeper.heard.append(keeper.KEEPER_TO_OPENER.encode(said))
            with pytest.raises(LinkViolation, match="which does not wait") if again else contextlib.nullcontext():
                self.opener._read_keeper()

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
        one.hung_up = True
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
        self.buckets[one.uid] = (tokens - cost * (tokens >= wanted), self.now)
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
        self.audit.refused.clear()
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
        refused = [one for one in self.audit.refused if one[1] == number]
        assert self.outcome(number) == (wanted or None)
        # what was recorded as granted and was not, the opener writes itself
        assert refused == [("refused", number)] * (bool(wanted) and wanted != "OpenFailed") or wanted == "OpenFailed"
        if not wanted:
            one.unread.append(count)
            self.granted += 1

    @rule(message=st.binary(min_size=1, max_size=20))
    def keeper_speaks(self, message):
        """Whatever it says: nobody waits for its word."""
        self.keeper.heard.append(message)
        with pytest.raises(LinkViolation):
            self.opener._read_keeper()
        assert (self.said(), self.told()) == ([], [])

    @rule(
        which=WHICH,
        stop=st.booleans(),
        home=st.booleans(),
        room=st.sampled_from(["there is"] * 3 + ["none", "too many in flight"]),
    )
    def ask_other(self, which, stop, home, room):
        self.launcher.room = room
        self.ask_admin(self.number(which), stop=stop, home=home)
        self.launcher.room = "there is"

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
        wanted = wanted or ("" if self.launcher.room == "there is" else "RateLimited")
        asked, self.launcher.sent = self.launcher.sent, []
        if wanted:
            assert (self.outcome(number), asked) == (wanted, [])
            return
        assert (self.said(), asked) == ([], [link.OPENER_TO_LAUNCHER.encode(admin.Judge(number))])
        self.opener._obey(WITNESS_TO_LAUNCHER.encode(admin.Judged(number, home=home)), [])
        wanted = ("" if home else "Denied") or ("RateLimited" if self.audit.full else "")
        asked, self.launcher.sent = self.launcher.sent, []
        if wanted:
            assert (self.outcome(number), asked) == (wanted, [])
            return
        assert (self.said(), asked) == (
            [],
            [STOP_ASKED if stop else link.OPENER_TO_LAUNCHER.encode(admin.ReloadAsked(number))],
        )
        one.state = "stopping" if stop else "reloading"

    @precondition(lambda self: any(one.state == "reloading" for one in self.open.values()))
    @rule()
    def reloaded(self):
        number = next(number for number, one in self.open.items() if one.state == "reloading")
        message = link.LAUNCHER_TO_OPENER.encode(admin.Reloaded(number, b"told"))
        self.opener._obey(message, [])
        assert self.said() == [admin.Reloaded(number, b"told")]
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
        one = self.open.pop(number)
        self.ended.append(one)
        one.lingers = number if one.unread else 0
        broke = [keeper.Broke(number)] if reason not in (0, link.NOT_TAKEN) else []
        gone = keeper.Lingers(number) if one.unread else keeper.Ended(number)
        assert (self.said(), self.told()) == ([], [*broke, gone])
        assert not reason or self.audit.refused[-1] == ("disconnected", number)

    @rule(message=st.sampled_from([link.PONG, DRAINED]))
    def say_something(self, message):
        with pytest.raises(LinkViolation):  # nobody asked for it
            self.opener._answer(link.INBOX_TO_OPENER.decode(message))

    @rule()
    def look(self):
        """The kernel is asked what is unread; mostly it is not, and then nobody is thought to have less than that."""
        for number, connection in self.opener._connections.items():
            assert connection.unread_grants() == sum(self.open[number].unread)
        for uid, account in self.opener._door.accounts._by_owner.items():
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
        for owner in tuple(opener._door._lingering):
            opener._door._look(owner)
        read = [one for one in self.ended if one.lingers and not one.unread]
        assert set(self.told()) == {keeper.Ended(one.lingers) for one in read}
        for one in read:
            one.lingers = 0
        for uid, account in opener._door.accounts._by_owner.items():
            assert len(account.connections) == self.in_use(uid)
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


@pytest.mark.parametrize("room", ["none", "too many in flight"])
def test_an_administrator_whose_process_cannot_be_told_of_now_is_to_come_again(room):
    """ETOOMANYREFS ended the service, and what others have unread counts for it."""
    machine = Machine()
    try:
        machine.begin([0])
        machine.launcher.room = room
        machine.ask_admin(1, stop=True, home=True)
        machine.launcher.room = "there is"
        machine.ask_admin(1, stop=True, home=True)
        assert machine.open[1].state == "stopping"
    finally:
        machine.teardown()
