"""Messages: who may send and subscribe, to whom each goes, and what waits for whom.

Runs in: inbox. An attacker controls payloads and the names of topics; who sends, the opener has said.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable

from fdbroker import limits
from fdbroker.bucket import Bucket
from fdbroker.errors import MessageTooLong, QuotaExceeded, RateLimited, TopicDenied
from fdbroker.kernel.records import NotRecorded, Records
from fdbroker.terms import Topic
from fdbroker.wire import varlink
from fdbroker.wire.rights import Rights, Sender

_MESSAGES, _BYTES = limits.SUBSCRIBER_MESSAGES, limits.SUBSCRIBER_BYTES
_JOURNAL_RETRY_MS = limits.JOURNAL_RETRY_MS
_BUCKETS_KEPT = 4096
MESSAGE_ID = "6c0b6a1d5fd94b6c8f0d2b5b1f1f7a08"
# how every message begins: where `lost` is put, when there is something to say
_BEGIN = b'{"parameters":{"message":{'


class Member:
    """One connection's part in it: who it is, what it may do, and, once it has subscribed, what waits for it."""

    __slots__ = ("lost", "maxima", "queue", "queued_bytes", "send", "sender", "subscribe", "subscribed")

    def __init__(self, sender: Sender) -> None:
        self.sender = sender
        self.send: frozenset[str] = frozenset()
        self.subscribe: frozenset[str] = frozenset()
        self.maxima = Rights()
        self.subscribed: frozenset[str] = frozenset()
        self.queue: deque[bytes] = deque()
        self.queued_bytes = 0
        self.lost = 0

    def put(self, data: bytes) -> None:
        """One message more that waits; the oldest ones go where there are too many."""
        self.queue.append(data)
        self.queued_bytes += len(data)
        while len(self.queue) > _MESSAGES or self.queued_bytes > _BYTES:
            self.queued_bytes -= len(self.queue.popleft())
            self.lost += 1

    def take(self) -> bytes:
        """All that waits, for one send; the first one says how many were lost before it."""
        if self.lost and self.queue:
            first = self.queue.popleft()
            self.queue.appendleft(b'%s"lost":%d,%s' % (_BEGIN, self.lost, first[len(_BEGIN) :]))
            self.lost = 0
        data = b"".join(self.queue)
        self.queue.clear()
        self.queued_bytes = 0
        return data


class Topics:
    """All topics, their subscribers, and the rate of every user. `records` is where the journal handler writes."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self._topics: dict[str, Topic] = {}
        self._order: tuple[Topic, ...] = ()
        self._subscribers: dict[str, dict[Member, None]] = {}
        self._buckets: dict[int, Bucket] = {}  # by uid
        # larger than any before a restart, as long as no more than a million came in a second
        self._number = time.time_ns() // 1000
        self.fresh: dict[Member, None] = {}  # for whom something has come

    def use(self, topics: tuple[Topic, ...]) -> None:
        """The policy's topics, from now on."""
        self._order = topics
        self._topics = {topic.name: topic for topic in topics}

    def allow(self, member: Member, rights: Rights) -> None:
        """What a connection may do from now on, by the topics that were told last.

        Raises TopicDenied when it may no longer have what it has subscribed to: then that has ended.
        """
        member.send, member.subscribe = (
            frozenset(self._order[position].name for position in positions if position < len(self._order))
            for positions in (rights.send, rights.subscribe)
        )
        member.maxima = rights
        for topic in member.subscribed - member.subscribe:
            self.forget(member)
            raise TopicDenied(topic)

    # ---- sending

    def publish(self, member: Member, name: str, payload: bytes, *, text: str, encoding: str) -> None:
        """Hand a message to every handler of its topic; `text` is the payload as it travels.

        Raises TopicDenied, MessageTooLong or RateLimited: then no handler has it.
        """
        self._take_token(member)  # first: who is denied must not be quicker
        topic = self._topics.get(name) if name in member.send else None
        if topic is None:
            raise TopicDenied(name)
        if len(payload) > topic.maximum_bytes:
            raise MessageTooLong(topic.maximum_bytes)
        sender = member.sender
        message: dict[str, str | int] = {
            "number": self._number + 1,
            "topic": name,
            "uid": sender.uid,
            "gid": sender.gid,
            "pid": sender.pid,
            **({"session": sender.session} if sender.session else {}),
            "time": time.time_ns() // 1000,
            "payload": text,
            "encoding": encoding,
        }
        if "journal" in topic.deliver:  # the one that can fail comes first
            self._record(message, payload)
        self._number += 1
        if "subscribers" in topic.deliver:
            subscribers = self._subscribers.get(name)
            if subscribers:
                data = varlink.encode_reply({"message": message}, continues=True)
                for subscriber in subscribers:
                    subscriber.put(data)
                self.fresh |= subscribers

    def _record(self, message: dict[str, str | int], payload: bytes) -> None:
        fields = {
            "MESSAGE": f"message {message['number']} on topic {message['topic']} from uid {message['uid']}",
            "MESSAGE_ID": MESSAGE_ID,
            "PRIORITY": "6",
            "SYSLOG_IDENTIFIER": "fdbroker-inbox",
            **{f"FDBROKER_{name.upper()}": str(message[name]) for name in ("number", "topic", "uid", "gid", "pid")},
            **({"FDBROKER_SESSION": str(message["session"])} if "session" in message else {}),
            "FDBROKER_PAYLOAD": payload.decode(errors="backslashreplace"),
        }
        try:
            self._records.write(fields)
        except NotRecorded:
            raise RateLimited(_JOURNAL_RETRY_MS) from None

    def _take_token(self, member: Member) -> None:
        """Count one message against its user's token bucket."""
        maxima, uid, now_s = member.maxima, member.sender.uid, time.monotonic()
        bucket = self._buckets.get(uid)
        if bucket is None:
            if len(self._buckets) >= _BUCKETS_KEPT:
                self._buckets = {one: kept for one, kept in self._buckets.items() if not kept.is_idle(now_s)}
            bucket = self._buckets[uid] = Bucket(maxima.burst, now_s)
        wait_ms = bucket.take(maxima.messages_per_second, maxima.burst, now_s)
        if wait_ms:
            raise RateLimited(wait_ms)

    # ---- subscribing

    def subscribe(self, member: Member, names: Iterable[str], others: int) -> None:
        """From now on `member` gets the messages of these topics; `others` of its user's connections do already.

        Raises TopicDenied, QuotaExceeded or RateLimited.
        """
        self._take_token(member)
        wanted = frozenset(names)
        for name in wanted:
            if name not in member.subscribe or name not in self._topics:
                raise TopicDenied(name)
        if others >= member.maxima.subscriptions:
            raise QuotaExceeded("subscriptions", member.maxima.subscriptions)
        member.subscribed = wanted
        for name in wanted:
            self._subscribers.setdefault(name, {})[member] = None

    def forget(self, member: Member) -> None:
        """It gets no more messages."""
        for name in member.subscribed:
            self._subscribers.get(name, {}).pop(member, None)
        member.subscribed = frozenset()
        self.fresh.pop(member, None)
