"""Messages: who may send and subscribe, to whom each goes, and what waits for whom.

Runs in: inbox. An attacker controls payloads and the names of topics; who sends, the opener has said.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from fdbroker.bucket import Bucket
from fdbroker.errors import (
    DescriptorsRefused,
    MessageTooLong,
    NoSuchRecipient,
    QueueFull,
    QuotaExceeded,
    RateLimited,
    TopicDenied,
)
from fdbroker.inbox.attached import Attached
from fdbroker.inbox.dispatch import Publish, text_of
from fdbroker.inbox.member import Member
from fdbroker.inbox.rights import Rights
from fdbroker.inbox.store import NotStored, Store, Stored
from fdbroker.kernel.records import NotRecorded, Records
from fdbroker.limits import inbox as limits
from fdbroker.limits.keeper import AUDIT_REPEAT_SECONDS
from fdbroker.limits.opener import JOURNAL_RETRY_MS, NAME_BYTES
from fdbroker.terms import INVALID_ID, UNMAPPED_ID, owner_text
from fdbroker.topics import Topic, User
from fdbroker.wire import varlink

_MESSAGES, _BYTES = limits.SUBSCRIBER_MESSAGES, limits.SUBSCRIBER_BYTES
_JOURNAL_RETRY_MS = JOURNAL_RETRY_MS
_UIDS_HERE = limits.RECIPIENTS_OF_OWNER
_ROWS = limits.ROWS_PER_MESSAGE
_DELIVERIES_PER_UNIT = limits.DELIVERIES_PER_UNIT
_BUCKETS_KEPT = 4096
_JOINED_KEPT = 16  # of what is joined: each can be as long as a queue
MESSAGE_ID = "6c0b6a1d5fd94b6c8f0d2b5b1f1f7a08"
STORE_MESSAGE_ID = "6c0b6a1d5fd94b6c8f0d2b5b1f1f7a09"
_IDENTIFIER = "fdbroker-inbox"


class _Delivery(NamedTuple):
    """A message on its way to subscribers: all of its topic, or those of user `to`."""

    topic: str
    to: int | None
    data: bytes
    attached: Attached | None
    stored: bool


class _Shared(NamedTuple):
    """A message that all subscribers of a topic get, as they are sent it."""

    topic: str
    reply: bytes
    stored: bool


def _bucket(buckets: dict[int, Bucket], owner: int, burst: int) -> Bucket:
    """The bucket of an owner; those of owners who did nothing for a while are forgotten."""
    bucket = buckets.get(owner)
    if bucket is None:
        now_s = time.monotonic()
        if len(buckets) >= _BUCKETS_KEPT:
            for one in [one for one, kept in buckets.items() if kept.is_idle(now_s)]:
                del buckets[one]
        bucket = buckets[owner] = Bucket(burst, now_s)
    return bucket


def _reply(data: bytes) -> bytes:
    """A message as a reply to Subscribe; `data` is its JSON object."""
    return varlink.encode_reply({"message": varlink.Raw(data)}, continues=True)


def _can_be_named(name: str) -> bool:
    """Whether a name of the databases is a text that is not too long: cut, it could be another's."""
    return name.isprintable() and len(name.encode(errors="replace")) <= NAME_BYTES


class Topics:
    """All topics, their subscribers, and the rate of every user.

    `records` is where the journal handler writes, `store` what the queue handler writes to, where a policy has one.
    """

    def __init__(self, records: Records, store: Store | None = None) -> None:
        self._records = records
        self._store = store
        self._topics: dict[str, Topic] = {}
        self._listed: dict[str, set[int]] = {}  # topic -> those that may subscribe, by the policy
        self._uids: dict[str, int] = {}  # by name
        self._work = 0
        self._members: dict[int, dict[Member, None]] = {}  # of each connected user
        self._subscribers: dict[str, dict[Member, None]] = {}
        self._uncommitted: list[_Delivery] = []
        self._buckets: dict[int, Bucket] = {}  # of messages, by owner
        self._records_of: dict[int, Bucket] = {}  # of records
        # larger than any before a restart, as long as no more than a million came in a second
        self._number = max(time.time_ns() // 1000, store.last_number if store else 0)
        self._say_at_s = 0.0
        self._shared: list[_Shared] = []  # what this turn has brought for all subscribers of a topic
        self.fresh: dict[Member, None] = {}  # in whose own queue something has come

    def use(self, topics: Sequence[Topic], users: Iterable[User] = ()) -> None:
        """The policy's topics, and the users whom it, or the machine's databases, name, from now on."""
        self._topics = {topic.name: topic for topic in topics}
        self._listed = {topic.name: set() for topic in topics}
        self._uids = {}
        for user in users:
            if _can_be_named(user.name):
                self._uids[user.name] = user.uid
            for position in user.topics:
                self._listed[topics[position].name].add(user.uid)

    def allow(self, member: Member, rights: Rights) -> None:
        """What a connection may do from now on.

        Raises TopicDenied when it may no longer have what it has subscribed to: then that has ended.
        """
        self._members.setdefault(member.sender.uid, {})[member] = None
        member.send, member.subscribe = rights.send, rights.subscribe
        member.maxima = rights
        for topic in member.subscribed - member.subscribe:
            self.unsubscribe(member)
            raise TopicDenied(topic)

    def forget(self, member: Member) -> None:
        """Its connection has ended."""
        self.unsubscribe(member)
        others = self._members.get(member.sender.uid, {})
        others.pop(member, None)
        if not others:
            self._members.pop(member.sender.uid, None)

    # ---- sending

    def publish(self, member: Member, asked: Publish, attached: Attached | None = None) -> bool:
        """Hand a message to every handler of its topic; returns whether that is so only after `commit`.

        Raises TopicDenied, NoSuchRecipient, MessageTooLong, DescriptorsRefused, QuotaExceeded, QueueFull or
        RateLimited: then no handler has it.
        """
        self._take_token(member)  # first: who is denied must not be quicker
        topic = self._topics.get(asked.topic) if asked.topic in member.send else None
        if topic is None:
            raise TopicDenied(asked.topic)
        if attached is not None:
            asked, attached = self._with_descriptors(topic, asked, attached)
        if len(asked.payload) > topic.maximum_bytes:
            raise MessageTooLong(topic.maximum_bytes)
        to = self._recipient(topic, asked.to) if asked.to else None
        sender, time_us = member.sender, time.time_ns() // 1000
        message: dict[str, Any] = {
            "number": self._number + 1,
            "topic": topic.name,
            "uid": sender.uid,
            **({} if sender.owner == sender.uid else {"owner": sender.owner}),
            "gid": sender.gid,
            "pid": sender.pid,
            **({"session": sender.session} if sender.session else {}),
            "time": time_us,
            "payload": asked.text,
            "encoding": asked.encoding,
            **({} if asked.file is None else {"fileDescriptor": asked.file}),
            **({"fileDescriptors": asked.others} if asked.others else {}),
        }
        delivery = _Delivery(topic.name, to, varlink.encode_object(message), attached, "queue" in topic.deliver)
        stored = self._store if delivery.stored else None
        recipients: frozenset[int] = frozenset()
        if stored is not None:
            maxima = member.maxima
            stored.check(sender.owner, len(delivery.data), maxima.stored_messages, maxima.stored_bytes)
            recipients = frozenset({to}) if to is not None else self._recipients(topic)
            if len(recipients) > _ROWS:
                self._take_token(member, 1 + len(recipients) // _ROWS, taken=1)
        if "journal" in topic.deliver:  # the journal can still refuse, so it comes before a number is given
            self._take_records(member, len(asked.payload))
            self._record(message, asked.payload)
        self._number += 1
        copies = len(self._subscribers.get(topic.name, ()))
        if to is not None or attached is not None or all(one.topic != topic.name for one in self._shared[-1:]):
            self._work += copies // _DELIVERIES_PER_UNIT  # what comes behind another one goes with it
        self._work += copies * len(delivery.data) // limits.DELIVERED_BYTES_PER_UNIT
        if stored is None:
            if self._uncommitted:  # behind those with smaller numbers
                self._uncommitted.append(delivery)
            else:
                self._deliver(delivery)
            return False
        if recipients:
            expires_us = time_us + topic.keep_s * 1_000_000
            self._work += len(recipients)
            stored.put(Stored(self._number, sender.owner, topic.name, expires_us, delivery.data), recipients)
        self._uncommitted.append(delivery)
        return True

    def take_work(self) -> int:
        """How much more work there was since this was asked last than messages make alone: rows and deliveries."""
        work, self._work = self._work, 0
        return work

    @staticmethod
    def _with_descriptors(topic: Topic, asked: Publish, attached: Attached) -> tuple[Publish, Attached | None]:
        """The message as it goes on: what is recorded or stored must be in bytes, and can have no other descriptors."""
        if attached.over:
            raise QuotaExceeded("held_descriptors", limits.HELD_DESCRIPTORS)
        lasting = {"journal", "queue"}.intersection(topic.deliver)
        if asked.others and lasting:
            raise DescriptorsRefused(f"the topic's messages go to the {' and the '.join(sorted(lasting))}")
        if asked.file is None:
            return asked, attached
        size = attached.size(asked.file)
        if size is None:
            raise DescriptorsRefused("the payload is no memfd that is sealed with SHRINK, GROW and WRITE")
        if size > topic.maximum_bytes:
            raise MessageTooLong(topic.maximum_bytes)
        if not lasting:
            return asked, attached
        payload = attached.read(asked.file, size)
        return asked._replace(file=None, payload=payload, **text_of(payload)), None

    def commit(self) -> tuple[QueueFull | None, QueueFull | None]:
        """Write down what waits for it, then deliver it.

        What is refused, if anything: all messages, of which then none is stored; and all acknowledgements.
        """
        delivered, self._uncommitted = self._uncommitted, []
        refusal = unacknowledged = None
        if self._store is not None:
            try:
                self._store.commit()
            except NotStored as error:
                self.say(f"messages cannot be stored: {error}")
                refusal = QueueFull("store_bytes", limits.STORE_BYTES)
                unacknowledged = None if error.acknowledged else refusal
        for delivery in delivered:
            if refusal is None or not delivery.stored:
                self._deliver(delivery)
        if self._store is not None:
            self._store.expire()
        return refusal, unacknowledged

    def say(self, text: str) -> None:
        """Tell the admin what is wrong with the stored messages, at most once in ten seconds."""
        now_s = time.monotonic()
        if now_s < self._say_at_s:
            return
        self._say_at_s = now_s + AUDIT_REPEAT_SECONDS
        fields = {"MESSAGE": text, "MESSAGE_ID": STORE_MESSAGE_ID, "PRIORITY": "2", "SYSLOG_IDENTIFIER": _IDENTIFIER}
        with contextlib.suppress(NotRecorded):
            self._records.write(fields)

    def _deliver(self, delivery: _Delivery) -> None:
        topic = self._topics.get(delivery.topic)  # a policy since then may have none of that name
        if topic is None or "subscribers" not in topic.deliver:
            return
        reply = _reply(delivery.data)
        if delivery.to is None and delivery.attached is None:
            self._shared.append(_Shared(delivery.topic, reply, delivery.stored))
            return
        self._spread()  # those have smaller numbers
        for subscriber in self._subscribers.get(delivery.topic, ()):
            if delivery.to is not None and delivery.to != subscriber.sender.uid:
                continue
            self._put(subscriber, reply, delivery.attached, stored=delivery.stored)

    def _put(self, subscriber: Member, reply: bytes, attached: Attached | None, *, stored: bool) -> None:
        if stored and subscriber.replayed is not None:
            return  # it comes with what is stored
        subscriber.put(reply, attached)
        if subscriber.replayed is None:  # else what is stored comes first
            self.fresh[subscriber] = None

    def _spread(self) -> None:
        """Put what this turn has brought for all into the queue of each: from now on others, or other things, come."""
        shared, self._shared = self._shared, []
        for topic, reply, stored in shared:
            for subscriber in self._subscribers.get(topic, ()):
                self._put(subscriber, reply, None, stored=stored)

    def take_shared(self, ready: Callable[[Member], bool]) -> Iterator[tuple[Member, bytes]]:
        """What this turn has brought for all subscribers of a topic, in one piece for each that can be sent it at once.

        It is joined once for all that have subscribed to the same. For whom something waits already, who has lost
        something, or is not `ready`, gets it in its own queue.
        """
        shared, self._shared = self._shared, []
        joined: dict[frozenset[str], bytes] = {}
        names = dict.fromkeys(one.topic for one in shared)
        for member in dict.fromkeys(member for name in names for member in self._subscribers.get(name, ())):
            data = joined.get(member.subscribed)
            if data is None:
                its = [one.reply for one in shared if one.topic in member.subscribed]
                fits = len(its) <= _MESSAGES and sum(map(len, its)) <= _BYTES
                if len(joined) >= _JOINED_KEPT:
                    joined.clear()
                data = joined[member.subscribed] = b"".join(its) if fits else b""
            if data and member.is_idle and ready(member):
                yield member, data
                continue
            for topic, reply, stored in shared:
                if topic in member.subscribed:
                    self._put(member, reply, None, stored=stored)

    def _recipient(self, topic: Topic, to: str) -> int:
        """The uid that `to` names. Raises NoSuchRecipient when it may not subscribe, as far as we know."""
        uid = self._uids.get(to, -1)
        if uid < 0 and to.isascii() and to.isdecimal() and len(to) <= 10:
            uid = int(to)
        if 0 <= uid < INVALID_ID and uid != UNMAPPED_ID:
            if topic.everyone or uid in self._listed[topic.name]:
                return uid
            if any(topic.name in member.subscribe for member in self._members.get(uid, ())):
                return uid
        raise NoSuchRecipient(to)

    def _recipients(self, topic: Topic) -> frozenset[int]:
        """Who gets a stored message to all: the users that the policy names, and a few connected uids of each owner."""
        here: dict[int, list[int]] = {}
        for uid, members in self._members.items():
            if any(topic.name in member.subscribe for member in members):  # mostly the first one says it
                here.setdefault(next(iter(members)).sender.owner, []).append(uid)
        few = (sorted(uids, key=lambda uid: (uid != owner, uid))[:_UIDS_HERE] for owner, uids in here.items())
        return frozenset(self._listed[topic.name]).union(*few)

    def _record(self, message: dict[str, Any], payload: bytes) -> None:
        fields = {
            "MESSAGE": f"message {message['number']} on topic {message['topic']} from uid {message['uid']}",
            "MESSAGE_ID": MESSAGE_ID,
            "PRIORITY": "6",
            "SYSLOG_IDENTIFIER": _IDENTIFIER,
            **{f"FDBROKER_{name.upper()}": str(message[name]) for name in ("number", "topic", "uid", "gid", "pid")},
            "FDBROKER_OWNER": owner_text(message.get("owner", message["uid"])),
            **({"FDBROKER_SESSION": str(message["session"])} if "session" in message else {}),
            "FDBROKER_PAYLOAD": payload.decode(errors="backslashreplace"),
        }
        try:
            self._records.write(fields)
        except NotRecorded:
            raise RateLimited(_JOURNAL_RETRY_MS, "journal") from None

    def _take_token(self, member: Member, cost: int = 1, taken: int = 0) -> None:
        """Count one message against its owner's token bucket, or a broadcast like several.

        What was `taken` for it is given back first: it costs all or nothing, else the wait that is told would be wrong.
        """
        rate, burst = member.maxima.messages_per_second, member.maxima.burst
        bucket = _bucket(self._buckets, member.sender.owner, burst)
        bucket.tokens += taken
        wait_ms = bucket.take(rate, burst, time.monotonic(), cost)
        if wait_ms:
            raise RateLimited(wait_ms, "rate")

    def _take_records(self, member: Member, size: int) -> None:
        """Count a record of a message against its owner's records: a long one is as much as several."""
        rate, burst = member.maxima.records_per_second, member.maxima.record_burst
        cost = limits.RECORDS_PER_MESSAGE + size // limits.BYTES_PER_RECORD
        wait_ms = _bucket(self._records_of, member.sender.owner, burst).take(rate, burst, time.monotonic(), cost)
        if wait_ms:
            raise RateLimited(wait_ms, "records")

    # ---- having

    def subscribe(self, member: Member, names: Iterable[str], after: int | None, others: int) -> None:
        """From now on `member` gets the messages of these topics, and first what is stored for it above `after`.

        `others` of its user's connections do already. Raises TopicDenied, QuotaExceeded or RateLimited.
        """
        self._take_token(member)
        wanted = frozenset(names)
        for name in wanted:
            if name not in member.subscribe or name not in self._topics:
                raise TopicDenied(name)
        if others >= member.maxima.subscriptions:
            raise QuotaExceeded("subscriptions", member.maxima.subscriptions)
        member.subscribed = wanted
        member.replayed = after if self._store else None
        self._spread()  # it gets what comes from now on
        for name in wanted:
            self._subscribers.setdefault(name, {})[member] = None

    def replay(self, member: Member) -> bytes:
        """The next of what is stored for a subscriber that said `after`; b"" when it has all."""
        if self._store is None or member.replayed is None:
            return b""
        page = self._store.waiting(member.sender.uid, member.subscribed, member.replayed, _MESSAGES)
        member.replayed = page[-1][0] if page else None
        return b"".join(_reply(data) for _, data in page)

    def acknowledge(self, member: Member, numbers: Sequence[int]) -> None:
        """The member's user has these, once `commit` says so. Raises RateLimited."""
        self._take_token(member)
        if self._store is not None:
            self._store.acknowledge(member.sender.uid, member.subscribe, numbers)

    def receive(self, member: Member, maximum: int) -> list[bytes]:
        """What is stored for the member's user on topics that it may have: JSON objects, the oldest first."""
        if self._store is None:
            return []
        most = min(maximum, limits.RECEIVED_MESSAGES)
        return [data for _, data in self._store.waiting(member.sender.uid, member.subscribe, 0, most)]

    def unsubscribe(self, member: Member) -> None:
        """It gets no more messages."""
        if member.subscribed:
            self._spread()
        for name in member.subscribed:
            self._subscribers.get(name, {}).pop(member, None)
        member.subscribed = frozenset()
        member.replayed = None
        self.fresh.pop(member, None)
