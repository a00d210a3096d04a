"""Topics, queues and subscribers against a few lists: who gets what, in which order, and how much was lost."""

from __future__ import annotations

import json
from collections import deque
from unittest import mock

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fdbroker.errors import MessageTooLong, NoSuchRecipient, QuotaExceeded, TopicDenied
from fdbroker.inbox import member as member_module
from fdbroker.inbox import topics as module
from fdbroker.inbox.dispatch import Publish
from fdbroker.inbox.member import Member
from fdbroker.inbox.rights import Rights, Sender
from fdbroker.inbox.topics import Topics
from fdbroker.topics import Topic

MESSAGES, BYTES, LONGEST, SUBSCRIPTIONS = 4, 1400, 300, 2
NAMES = ("inbox", "news", "mail")
UIDS = st.integers(1, 3)
RIGHTS = st.frozensets(st.sampled_from(NAMES))


class Part:
    """What the model knows of a connection."""

    def __init__(self, uid, may_send, may_subscribe):
        self.member = Member(Sender(uid, uid, uid, "", uid))
        self.uid = uid
        self.may(may_send, may_subscribe)
        self.subscribed = frozenset()
        self.waiting = deque()  # (number, payload, bytes on the wire)
        self.coming = deque()  # likewise, in this turn, and for all of a topic
        self.lost = 0

    def may(self, send, subscribe):
        self.may_send, self.may_subscribe = send, subscribe

    def rights(self, names):
        """By a policy with these topics."""
        both = self.named(self.may_send, names), self.named(self.may_subscribe, names)
        return Rights(*both, 10**6, 10**6, SUBSCRIPTIONS, 0, 0, 10**6, 10**6)

    def named(self, rights, names):
        return rights & frozenset(names)


class Machine(RuleBasedStateMachine):
    """Invariant: each subscriber's queue has the newest messages to it that fit, in order, and knows what is missing."""

    def __init__(self):
        super().__init__()
        self.patched = [mock.patch.multiple(one, _MESSAGES=MESSAGES, _BYTES=BYTES) for one in (member_module, module)]
        for patch in self.patched:
            patch.start()
        self.topics = Topics(None)
        self.parts: list[Part] = []
        self.names = NAMES
        self.last = self.topics._number

    @initialize(names=st.frozensets(st.sampled_from(NAMES), min_size=1))
    def begin(self, names):
        """Two users with all rights, three connections, of which two have subscribed."""
        self.use(NAMES)
        every = frozenset(NAMES)
        for uid in (1, 2, 2):
            self.connect(uid, every, every)
        for part in self.parts[:2]:
            self.topics.subscribe(part.member, names, None, 0)
            part.subscribed = names

    def use(self, names):
        self.names = names
        self.topics.use(tuple(Topic(name, ("subscribers",), LONGEST) for name in names))

    @rule(order=st.permutations(NAMES), count=st.integers(1, len(NAMES)))
    def another_policy(self, order, count):
        """Topics come and go."""
        self.use(tuple(order[:count]))
        for part in self.parts:
            self.allow(part)

    @precondition(lambda self: len(self.parts) < 6)
    @rule(uid=UIDS, send=RIGHTS, subscribe=RIGHTS)
    def connect(self, uid, send, subscribe):
        part = Part(uid, send, subscribe)
        self.parts.append(part)
        self.allow(part)

    @precondition(lambda self: self.parts)
    @rule(data=st.data(), send=RIGHTS, subscribe=RIGHTS)
    def other_rights(self, data, send, subscribe):
        part = data.draw(st.sampled_from(self.parts))
        part.may(send, subscribe)
        self.allow(part)

    def allow(self, part):
        if part.subscribed <= part.named(part.may_subscribe, self.names):
            self.topics.allow(part.member, part.rights(self.names))
            return
        with pytest.raises(TopicDenied):
            self.topics.allow(part.member, part.rights(self.names))
        self.come()
        part.subscribed = frozenset()

    @precondition(lambda self: self.parts)
    @rule(data=st.data())
    def disconnect(self, data):
        part = data.draw(st.sampled_from(self.parts))
        self.topics.forget(part.member)
        if part.subscribed:
            self.come()
        self.parts.remove(part)

    @precondition(lambda self: self.parts)
    @rule(data=st.data(), names=st.frozensets(st.sampled_from(NAMES), min_size=1))
    def subscribe(self, data, names):
        part = data.draw(st.sampled_from(self.parts))
        if part.subscribed:
            return  # nothing else is answered on that connection
        others = sum(bool(other.subscribed) for other in self.parts if other.uid == part.uid)
        if not names <= part.named(part.may_subscribe, self.names):
            with pytest.raises(TopicDenied):
                self.topics.subscribe(part.member, names, None, others)
        elif others >= SUBSCRIPTIONS:
            with pytest.raises(QuotaExceeded):
                self.topics.subscribe(part.member, names, None, others)
        else:
            self.topics.subscribe(part.member, names, None, others)
            self.come()
            part.subscribed = names

    @precondition(lambda self: self.parts)
    @rule(
        which=st.integers(0, 11),
        name=st.sampled_from(NAMES),
        size=st.sampled_from([0, 1, LONGEST - 1, LONGEST, LONGEST + 1]),
        to=st.one_of(st.none(), UIDS),
        times=st.integers(1, MESSAGES + 1),
    )
    def send(self, which, name, size, to, times):
        for _ in range(times):
            self.send_one(self.parts[which % len(self.parts)], name, size, to)

    def send_one(self, part, name, size, to):
        asked = Publish(name, b"x" * size, "x" * size, "text", "" if to is None else str(to))
        heard = [one for one in self.parts if to in (None, one.uid) and name in one.subscribed]
        known = any(name in one.named(one.may_subscribe, self.names) for one in self.parts if one.uid == to)
        wrong = None
        if name not in part.named(part.may_send, self.names):
            wrong = TopicDenied
        elif size > LONGEST:
            wrong = MessageTooLong
        elif to is not None and not known:
            wrong = NoSuchRecipient
        if wrong is not None:
            with pytest.raises(wrong):
                self.topics.publish(part.member, asked)
            return
        assert self.topics.publish(part.member, asked) is False
        self.last += 1
        for one in heard:
            length = len(one.member.queue[-1][0] if to is not None else self.topics._shared[-1].reply)
            one.coming.append((self.last, "x" * size, length))
        if to is not None:
            self.come()
            assert set(self.topics.fresh) >= {one.member for one in heard}

    def come(self):
        """What this turn has brought is in the queues."""
        for one in self.parts:
            while one.coming:
                one.waiting.append(one.coming.popleft())
                while len(one.waiting) > MESSAGES or sum(row[2] for row in one.waiting) > BYTES:
                    one.waiting.popleft()
                    one.lost += 1

    @precondition(lambda self: self.parts)
    @rule(which=st.frozensets(st.integers(0, 5)))
    def turn_ends(self, which):
        """Some can be sent at once what has come for them, others have it in their queues."""
        ready = [self.parts[number].member for number in which if number < len(self.parts)]
        sent = dict(self.topics.take_shared(lambda member: member in ready))
        for part in self.parts:
            its = list(part.coming)
            at_once = its and not part.waiting and not part.lost and part.member in ready
            if at_once and len(its) <= MESSAGES and sum(row[2] for row in its) <= BYTES:
                got = [json.loads(one)["parameters"]["message"] for one in sent.pop(part.member).split(b"\0")[:-1]]
                assert [(one["number"], one["payload"]) for one in got] == [row[:2] for row in its]
                part.coming.clear()
        assert not sent
        self.come()

    @precondition(lambda self: self.parts)
    @rule(data=st.data())
    def take(self, data):
        """What is in a queue; what this turn has brought is not in there yet."""
        part = data.draw(st.sampled_from(self.parts))
        sent = b"".join(piece for piece, _ in part.member.take(lambda _: True))
        got = [json.loads(one)["parameters"]["message"] for one in sent.split(b"\0")[:-1]]
        assert [(one["number"], one["payload"]) for one in got] == [row[:2] for row in part.waiting]
        assert [one.get("lost", 0) for one in got] == ([part.lost] + [0] * len(got))[: len(got)]
        if got:
            part.lost = 0
        part.waiting.clear()

    @invariant()
    def agrees(self):
        for part in self.parts:
            member = part.member
            assert member.subscribed == part.subscribed
            assert [len(piece) for piece, _ in member.queue] == [row[2] for row in part.waiting]
            assert member.queued_bytes == sum(row[2] for row in part.waiting) <= BYTES
            assert (len(member.queue) <= MESSAGES, member.lost) == (True, part.lost)
        for name, members in self.topics._subscribers.items():
            assert set(members) == {part.member for part in self.parts if name in part.subscribed}
        assert set(self.topics._members) == {part.uid for part in self.parts}
        assert self.topics._number == self.last

    def teardown(self):
        for patch in self.patched:
            patch.stop()


TestTopics = Machine.TestCase
TestTopics.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
