"""The keeper's tables against a few dictionaries: who is there, whose turn it is, who pays, and what each is shown.

The inbox is played as one that is taken over: it asks anything for any number. Opener and launcher keep their rules.
Folder, nodes, inotify and the memfds of policies are real.
"""

from __future__ import annotations

import math
import os
import select
import shutil
from collections import Counter, deque
from fnmatch import fnmatchcase
from types import SimpleNamespace
from unittest import mock

import fakes
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fdbroker.errors import LinkViolation
from fdbroker.keeper import service
from fdbroker.keeper.service import Keeper
from fdbroker.kernel.sealed import sealed_memfd
from fdbroker.limits import every as limits
from fdbroker.nodes.find import Finder
from fdbroker.policy.compiled import Policy, to_bytes
from fdbroker.terms import Device, DeviceRule
from fdbroker.topics import TopicUse
from fdbroker.wire import keeper, link, lists
from fdbroker.wire.connections import Use
from fdbroker.wire.launcher import KEEPER_TO_LAUNCHER, LAUNCHER_TO_KEEPER, Given

LAB = "/dev/lab"
DEFAULTS = {name: limit.default for name, limit in limits.USER_LIMITS.items()}
WHO = st.sampled_from([(5, 5), (105, 5), (6, 6)])  # uid and owner
WHICH = st.integers(0, 15)  # of the connections; the last few stand for numbers that are over, or never were
NAMES = st.sampled_from([str(number) for number in range(9)])
MODES = {0o600: "", 0o604: "ro", 0o602: "wo", 0o606: "rw"}  # what the opener, which has nothing, can do with each


def policy(pattern, rate, burst):
    rules = (DeviceRule(f"{LAB}/{pattern}", "rw", "", "1:3", False, "everyone", "p.yaml:1"),) if pattern else ()
    maxima = DEFAULTS | {"requests_per_second": rate, "burst": burst}
    return Policy(frozenset(), frozenset(), maxima, {}, {}, rules, (), {}, {}, {})


PATTERNS = ("*", "[0-3]", "")
POLICIES = tuple(
    policy(pattern, rate, burst) for pattern, rate, burst in zip(PATTERNS, (2, 1, 2), (40, 20, 40), strict=True)
)


class Wire:
    """A link whose other end is the test."""

    def __init__(self):
        self.waiting = 0
        self.sent = []
        self.heard = deque()

    def send(self, message):
        self.sent.append(message)

    def receive(self):
        return self.heard.popleft() if self.heard else None

    def receive_with_descriptors(self, most):
        return self.receive()


class One:
    """What the model knows of a connection."""

    def __init__(self, uid, owner, policy):
        self.uid, self.owner, self.policy = uid, owner, policy
        self.state = "idle"
        self.waits = False  # for its first listing
        self.shown = None  # to who watches: its last one


class Machine(RuleBasedStateMachine):
    """Invariant: connections, their turns and what each owner owes are what the dictionaries say; so is each listing."""

    def __init__(self):
        super().__init__()
        self.now = 1000.0
        self.patch = mock.patch.object(service, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.patch.start()
        os.mkdir(LAB)
        self.launcher, self.opener, self.inbox, self.finder = Wire(), Wire(), Wire(), Finder()
        self.refused: list[tuple[str, int]] = []  # kind of record and connection
        refusals = SimpleNamespace(
            add=lambda record, _: self.refused.append((record.kind, record.connection)),
            flush=lambda *_: None,
            timeout_s=lambda _: -1,
        )
        self.keeper = Keeper(self.launcher, self.opener, self.inbox, POLICIES[0], self.finder, refusals)
        self.keeper._epoll.register(self.keeper._changes.descriptor, 0)
        self.given = False
        self.nodes: dict[str, tuple[bool, int]] = {}  # by name: whether it is what the rules say, and its mode
        self.watched = False  # whether the folder is
        self.again = False  # whether lists are to be made for all who watch
        self.open: dict[int, One] = {}
        self.over: dict[int, str] = {}  # in which state each ended
        self.last = 0
        self.inside: Counter[int] = Counter()  # how many connections each owner has
        self.lingering: dict[int, int] = {}  # by number, whose they are
        self.let_in: list[keeper.LetIn] = []  # what the opener is to hear
        self.buckets: dict[int, tuple[float, float]] = {}  # by owner: tokens, when
        self.policy = 0
        self.handed_on: dict[int, int] = {}  # by number, policies that the opener has not used
        self.number = 0
        self.to_come: list[int] = []

    @initialize(given=st.booleans(), who=st.lists(WHO, min_size=1, max_size=3), names=st.sets(NAMES))
    def begin(self, given, who, names):
        self.given = given
        self.launcher.heard.append((LAUNCHER_TO_KEEPER.encode(Given(given, given, ())), []))
        assert self.keeper._read_launcher()
        for name in sorted(names):
            self.make(name, fits=True, mode=0o606)
        for one in who:
            self.connect(one)

    # ---- what is expected

    def number_of(self, which):
        return list(self.open)[which % len(self.open)] if which < 13 and self.open else which % (self.last + 2)

    def listing(self):
        """What everybody may open now, each node with what tells it from another one."""
        found = []
        for name, (fits, mode) in sorted(self.nodes.items()):
            access = "rw" if self.given else MODES[mode]
            if fits and access and fnmatchcase(name, PATTERNS[self.policy]):
                status = os.stat(f"{LAB}/{name}")
                found.append((Device(f"{LAB}/{name}", access), status.st_ino, status.st_mode))
        return found

    def refill(self, one):
        maxima = POLICIES[one.policy].limits
        tokens, since = self.buckets[one.owner]
        tokens = min(float(maxima["burst"]), tokens + (self.now - since) * maxima["requests_per_second"])
        self.buckets[one.owner] = (tokens, self.now)
        return tokens, maxima["requests_per_second"]

    def charge(self, one):
        """Its folder, and each node there that a rule names, whether it fits or not."""
        pattern = PATTERNS[one.policy]
        looked = bool(pattern) + sum(fnmatchcase(name, pattern) for name in self.nodes)
        tokens, rate = self.refill(one)
        self.buckets[one.owner] = (min(tokens, max(tokens - looked, -float(rate * limits.DEBT_SECONDS))), self.now)

    @property
    def held(self):
        """Whether nobody is to be answered now."""
        return bool(self.to_come or self.inbox.waiting)

    def run(self):
        """Let it do all that is to be done now, and compare what it says."""
        self.read()
        while self.keeper._timers() == 0:
            pass
        said, self.inbox.sent = [lists.KEEPER_TO_INBOX.decode(message) for message in self.inbox.sent], []
        if self.held:
            assert said == []
            return
        shown = {}
        for message in said:
            assert isinstance(message, lists.Offered)
            assert shown.get(message.connection, (False,))[0] is False  # no more parts after the last one
            found = shown.get(message.connection, (False, []))[1]
            shown[message.connection] = (message.last, found + [offer.resource for offer in message.offers])
        wanted, owners = {}, set()
        for number, one in self.open.items():
            if one.waits or (self.again and one.shown is not None):
                self.watched |= bool(PATTERNS[self.policy])
            if one.waits and one.owner not in owners:
                owners.add(one.owner)  # they share one listing, for which the first one pays
                self.charge(one)
            if one.waits or (self.again and one.shown not in (None, self.listing())):
                wanted[number] = (True, [resource for resource, _, _ in self.listing()])
                one.shown = self.listing() if one.state == "watching" else None
                one.state = "watching" if one.state == "watching" else "idle"
            one.waits = False
        self.again = False
        assert shown == wanted

    def read(self):
        assert self.keeper._read_opener()
        said, self.opener.sent = self.opener.sent, []
        assert [keeper.KEEPER_TO_OPENER.decode(message) for message in said] == self.let_in
        self.let_in = []

    def say(self, message):
        self.opener.heard.append(keeper.OPENER_TO_KEEPER.encode(message))

    def came(self, number):
        self.say(fakes.came(number, self.open[number].uid, self.open[number].owner, 1, True, "", ()))

    # ---- what the opener says

    @precondition(lambda self: len(self.open) < 7 and not self.to_come)
    @rule(who=WHO)
    def connect(self, who):
        """It is not read at once, but before anything that the inbox says."""
        self.last += 1
        self.open[self.last] = One(*who, self.policy)
        uid, owner = who
        self.buckets.setdefault(owner, (float(POLICIES[self.policy].limits["burst"]), self.now))
        self.inside[owner] += 1
        self.say(keeper.Knock(self.last, uid, uid, 1, owner))
        self.let_in.append(keeper.LetIn(self.last))
        self.came(self.last)

    @precondition(lambda self: self.open and not self.to_come)
    @rule(which=st.integers(0, 20), lingers=st.booleans())
    def ended(self, which, lingers):
        """It lists no more; while it lingers, it counts."""
        number = list(self.open)[which % len(self.open)]
        one = self.open.pop(number)
        self.over[number], owner = one.state, one.owner
        if lingers:
            self.lingering[number] = owner
        else:
            self.inside[owner] -= 1
        self.say(keeper.Lingers(number) if lingers else keeper.Ended(number))
        self.read()

    @precondition(lambda self: self.lingering)
    @rule()
    def has_lingered(self):
        number, owner = self.lingering.popitem()
        self.inside[owner] -= 1
        self.say(keeper.Ended(number))
        self.read()

    @rule(which=st.integers(0, len(POLICIES) - 1))
    def hand_on(self, which):
        """The launcher's policy; the opener may use it, or a later one, or never."""
        self.number += 1
        self.handed_on[self.number] = which
        descriptor = sealed_memfd("policy", to_bytes(POLICIES[which]))
        message = LAUNCHER_TO_KEEPER.encode(link.Policy(self.number))
        self.launcher.heard.append((message, [descriptor]))

    @precondition(lambda self: not self.to_come)
    @rule(which=st.integers(0, 4))
    def use(self, which):
        self.read()
        if which >= len(self.handed_on):
            with pytest.raises(LinkViolation):
                self.keeper._use(self.number + 1, 0)
            return
        number = list(self.handed_on)[which]
        self.policy = self.handed_on[number]
        self.handed_on = {later: policy for later, policy in self.handed_on.items() if later > number}
        self.to_come = list(self.open)
        self.say(Use(number, len(self.to_come)))
        self.read()
        self.in_force(number)
        with pytest.raises(LinkViolation):
            self.keeper._use(number, 0)  # it is used

    def in_force(self, number):
        said, self.launcher.sent = self.launcher.sent, []
        assert said == ([] if self.to_come else [KEEPER_TO_LAUNCHER.encode(link.Applied(number))])
        self.again |= not self.to_come

    @precondition(lambda self: self.to_come)
    @rule(all_of_them=st.booleans())
    def come_again(self, all_of_them):
        while self.to_come:
            number = self.to_come.pop(0)
            self.open[number].policy = self.policy
            self.came(number)
            self.read()
            self.in_force(self.keeper._renewal._number)
            if not all_of_them:
                return

    # ---- what the inbox says

    @rule(which=WHICH, watch=st.booleans(), work=st.booleans())
    def ask(self, which, watch, work):
        number, event = self.number_of(which), "Watch" if watch else "List"
        self.read()
        self.inbox.heard.append(lists.INBOX_TO_KEEPER.encode(lists.List(number, watch)))
        one = self.open.get(number)
        if not 0 < number <= self.last or (one is not None and (one.state, event) not in lists.TURNS):
            with pytest.raises(LinkViolation):
                self.keeper._read_inbox()
            return
        self.keeper._read_inbox()
        if one is None:
            assert (self.inbox.sent, self.opener.sent, self.refused) == ([], [], [])
            return
        tokens, rate = self.refill(one)
        if tokens < 1:
            refused = lists.ListRefused(number, min(math.ceil((1 - tokens) * 1000 / rate), limits.WAIT_LIMIT_MS))
            assert self.inbox.sent == [lists.KEEPER_TO_INBOX.encode(refused)]
            assert self.refused.pop() == ("refused", number)
            self.inbox.sent = []
            return
        assert (self.inbox.sent, self.opener.sent, self.refused) == ([], [], [])
        self.buckets[one.owner] = (tokens - 1, self.now)
        one.state, one.waits = lists.TURNS[one.state, event], True
        if work:
            self.run()

    @rule(which=WHICH, denied=st.booleans())
    def note(self, which, denied):
        """What is to be recorded, also of who has ended, and nothing else comes of it."""
        self.read()
        number = self.number_of(which)
        message = lists.DeniedUse(number, TopicUse("send", "x")) if denied else lists.Slowed(number)
        self.inbox.heard.append(lists.INBOX_TO_KEEPER.encode(message))
        state = self.open[number].state if number in self.open else self.over.get(number, "")
        if not state or (denied and state != "idle"):
            with pytest.raises(LinkViolation):
                self.keeper._read_inbox()
            return
        self.keeper._read_inbox()
        assert self.refused.pop() == ("refused" if denied else "slowed", number)
        assert (self.inbox.sent, self.opener.sent, self.refused) == ([], [], [])

    @rule(full=st.booleans())
    def does_not_read(self, full):
        self.inbox.waiting = int(full)

    @rule(which=WHICH, kind=st.sampled_from([b"", b"\0", b"\6", b"\7", b"\xff"]))
    def say_something(self, which, kind):
        self.read()
        message = lists.INBOX_TO_KEEPER.encode(lists.List(self.number_of(which), True))
        self.inbox.heard.append(kind + message if kind else message[:-1])
        with pytest.raises(LinkViolation):
            self.keeper._read_inbox()

    # ---- what changes

    @rule(name=NAMES, fits=st.booleans(), mode=st.sampled_from(sorted(MODES)))
    def make(self, name, fits, mode):
        if name in self.nodes:
            os.unlink(f"{LAB}/{name}")
        os.mknod(f"{LAB}/{name}", 0o20000, os.makedev(1, 3 if fits else 5))
        os.chmod(f"{LAB}/{name}", mode)
        self.nodes[name] = (fits, mode)
        self.changed()

    @precondition(lambda self: self.nodes)
    @rule(which=st.integers(0, 8), mode=st.sampled_from([0, *MODES]))
    def other_mode(self, which, mode):
        """Or no node any more."""
        name = sorted(self.nodes)[which % len(self.nodes)]
        if mode:
            os.chmod(f"{LAB}/{name}", mode)
            self.nodes[name] = (self.nodes[name][0], mode)
        else:
            os.unlink(f"{LAB}/{name}")
            del self.nodes[name]
        self.changed()

    def changed(self):
        """The loop hears of the first change, as of every first one after lists were made."""
        told = bool(select.select([self.keeper._changes.descriptor], [], [], 0)[0])
        assert told == self.watched
        if told and not self.keeper._changes.waiting:
            self.keeper._changes.note(self.now)

    @precondition(lambda self: not (self.held and self.keeper._changes.waiting))
    @rule(seconds=st.sampled_from([0.0, 0.05, 1.0, 5.0, 20.0]))
    def time_passes(self, seconds):
        self.run()
        self.now += seconds
        timeout_s = self.keeper._changes.timeout_s(self.now)
        self.again |= timeout_s == 0
        self.run()
        assert self.keeper._changes.timeout_s(self.now) != 0

    # ---- what is then true

    @invariant()
    def agrees(self):
        if self.opener.heard:
            return  # it has not read who came
        connections = self.keeper._connections
        assert {number: (one.state, one.subject.uid, one.subject.owner) for number, one in connections.items()} == {
            number: (one.state, one.uid, one.owner) for number, one in self.open.items()
        }
        assert self.keeper._last == self.last
        assert {one.number for one in self.keeper._lister._watching} == {
            number for number, one in self.open.items() if one.shown is not None
        }
        owners = {owner: one.work for owner, one in self.keeper._entry._owners.items()}
        assert {owner: bucket.tokens for owner, bucket in owners.items()} == pytest.approx(
            {owner: tokens for owner, (tokens, _) in self.buckets.items()}
        )
        for number, one in connections.items():
            assert one.work is owners[self.open[number].owner]
        assert bool(self.keeper._renewal.to_come) == bool(self.to_come)

    def teardown(self):
        for _, descriptors in self.launcher.heard:
            for descriptor in descriptors:
                os.close(descriptor)
        self.keeper._epoll.close()
        os.close(self.keeper._changes.descriptor)
        self.finder.close()
        shutil.rmtree(LAB)
        self.patch.stop()


TestKeeper = pytest.mark.usefixtures("dev")(Machine.TestCase)
TestKeeper.settings = settings(max_examples=90, stateful_step_count=40, deadline=None)
