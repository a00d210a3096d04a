"""Messages of clients: what each is answered and when, who has subscribed, what is sent on at the end of a turn.

Runs in: inbox. An attacker controls what is sent, and how many subscribe. `topics.py` knows topics and rights, and
`client.py` one connection; here they meet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fdbroker.errors import RateLimited, Refused, TopicDenied
from fdbroker.inbox import dispatch
from fdbroker.inbox.attached import Attached, Unread
from fdbroker.inbox.client import Client
from fdbroker.inbox.member import Member
from fdbroker.inbox.rights import Rights
from fdbroker.inbox.topics import Topics
from fdbroker.inbox.turns import Turns, clock
from fdbroker.kernel.link import Link
from fdbroker.limits import inbox as limits
from fdbroker.topics import TopicUse
from fdbroker.wire import lists

_BYTES_PER_UNIT = limits.BYTES_PER_UNIT


class Messages:
    """Borrows the link to the keeper, which writes down who was denied."""

    def __init__(self, topics: Topics, keeper: Link, unread: Unread, turns: Turns) -> None:
        self._topics = topics
        self._keeper = keeper
        self._unread = unread
        self._turns = turns
        self._subscribed: dict[Member, Client] = {}
        self._uncommitted: dict[int, Client] = {}  # whose answers wait for the commit
        self.replaying: dict[int, Client] = {}  # subscribers that still get what is stored
        self.due = False  # whether something has come since the last `commit`
        self.unsaid: dict[int, tuple[Client, bytes]] = {}  # denials for which there was no room in the keeper's link

    @property
    def pressing(self) -> bool:
        """Whether there is something to do although nothing comes."""
        return self.due or any(not one.out and not one.user.rests_until_s for one in self.replaying.values())

    def publish(self, client: Client, message: dispatch.Publish, attached: Attached | None) -> None:
        """Hand a message to the handlers of its topic, and answer it."""
        self.due = True
        answer: bytes | None
        try:
            to_commit = self._topics.publish(client.member, message, attached)
            answer = None if to_commit else client.sent
        except Refused as refusal:
            self._note(client, refusal, "send")
            if isinstance(refusal, RateLimited):
                self._turns.offend(client.user)
            answer = client.message_refused(refusal)
        if answer is None:
            self._uncommitted[client.number] = client
        client.answer(answer if not message.silent else b"")
        self._turns.work(client.user, self._topics.take_work())

    def commit(self) -> Iterator[Client]:
        """Write down what this turn brought to be stored, once for all, and then give its answers: to these clients."""
        self.due = False
        waiting, self._uncommitted = self._uncommitted, {}
        refusal, unacknowledged = self._topics.commit()
        for client in waiting.values():
            answers, client.uncommitted = client.uncommitted, []
            for answer in answers:
                if isinstance(answer, bytes):
                    client.out += answer
                elif answer is not None and answer.silent:
                    continue
                elif answer is None:
                    client.out += client.sent if refusal is None else client.message_refused(refusal)
                elif unacknowledged is not None and answer.acknowledge:
                    client.out += client.message_refused(unacknowledged)
                else:
                    began_s = clock()
                    stored = self._topics.receive(client.member, answer.maximum)
                    client.out += dispatch.messages_reply(stored)
                    self._turns.spend(client.user, began_s, len(stored))
            yield client

    def subscribe(self, client: Client, topics: list[str], after: int | None) -> None:
        """From now on the client gets these topics' messages, or is told why not."""
        others = sum(member.sender.owner == client.user.owner for member in self._subscribed)
        try:
            self._topics.subscribe(client.member, topics, after, others)
        except Refused as refusal:
            self._note(client, refusal, "subscribe")
            client.answer(client.message_refused(refusal))
        else:
            client.turn("Subscribe")
            self._subscribed[client.member] = client
            if client.member.replayed is not None:
                self.replaying[client.number] = client

    def receive(self, client: Client, asked: dispatch.Receive) -> None:
        """Acknowledge; what is stored for the client comes once that is committed."""
        self.due = True
        try:
            self._topics.acknowledge(client.member, asked.acknowledge)
        except Refused as refusal:
            self._turns.offend(client.user)
            client.answer(b"" if asked.silent else client.message_refused(refusal))
        else:
            client.answer(asked)
            self._uncommitted[client.number] = client

    def allow(self, client: Client, allowed: Rights) -> bool:
        """Other rights for a client; false when they ended its subscription, which it is told."""
        try:
            self._topics.allow(client.member, allowed)
        except TopicDenied as refusal:
            del self._subscribed[client.member]
            client.fill(self._unread)
            client.out += client.message_refused(refusal)
            return False
        return True

    def _note(self, client: Client, refusal: Refused, verb: str) -> None:
        """Have a denial recorded; while there is no room in the keeper's link, the client's next message waits."""
        if isinstance(refusal, TopicDenied):
            denied = lists.INBOX_TO_KEEPER.encode(lists.DeniedUse(client.number, TopicUse(verb, refusal.topic)))
            if self._keeper.waiting or self.unsaid:
                self.unsaid[client.number] = client, denied
            else:
                self._keeper.send(denied)

    def say_denied(self) -> list[Client]:
        """Say what was denied, as far as there is room in the keeper's link; these clients may go on."""
        said = []
        while self.unsaid and not self._keeper.waiting:
            client, denied = self.unsaid.pop(next(iter(self.unsaid)))
            self._keeper.send(denied)
            said.append(client)
        return said

    def say_slowed(self, clients: Iterable[Client]) -> None:
        """Have it recorded whose work has begun to wait, as far as there is room in the keeper's link."""
        while self._turns.slowed and not self._keeper.waiting:
            user = self._turns.slowed.popitem()[0]
            number = next((client.number for client in clients if client.user is user), None)
            if number is not None:
                self._keeper.send(lists.INBOX_TO_KEEPER.encode(lists.Slowed(number)))

    def deliver(self) -> Iterator[Client]:
        """Those that something waits for, of each all of it at once; also what is stored, for those who asked."""
        for member, data in self._topics.take_shared(self._is_ready):
            subscriber = self._subscribed[member]
            subscriber.push(data, None)
            yield subscriber
        while self._topics.fresh:
            member, _ = self._topics.fresh.popitem()
            client = self._subscribed.get(member)
            if client is not None and client.user.rests_until_s:
                client.user.held[client.number] = client
            elif client is not None:
                yield client
        for client in list(self.replaying.values()):
            if not client.out and self._turns.may_work(client.user):
                before, began_s = len(client.out), clock()
                client.out += self._topics.replay(client.member)
                self._turns.spend(client.user, began_s, 1 + (len(client.out) - before) // _BYTES_PER_UNIT)
                if client.member.replayed is None:
                    del self.replaying[client.number]
                yield client

    def _is_ready(self, member: Member) -> bool:
        """Whether a subscriber can be sent something now: it may have less than its queue has room for."""
        client = self._subscribed.get(member)
        return client is not None and not client.out and not client.user.rests_until_s and not client.doomed

    def forget(self, client: Client) -> None:
        """Its connection has ended."""
        if client.number in self.unsaid:  # one of each connection can always be queued
            self._keeper.send(self.unsaid.pop(client.number)[1])
        self._uncommitted.pop(client.number, None)
        self.replaying.pop(client.number, None)
        self._subscribed.pop(client.member, None)
        self._topics.forget(client.member)
