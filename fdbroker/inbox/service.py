"""The inbox's loop: what the other processes say, and whose turn it is.

Runs in: inbox, without any right. An attacker controls what clients send (clients.py), and when.
"""

from __future__ import annotations

import select
import socket
import time
from typing import assert_never

from fdbroker.errors import LinkViolation, RateLimited, Refused
from fdbroker.inbox import dispatch
from fdbroker.inbox.client import DEAF, ENDED, NOT_TAKEN, Client
from fdbroker.inbox.clients import Clients
from fdbroker.inbox.rights import Rights, Sender, rights_by
from fdbroker.inbox.topics import Topics
from fdbroker.kernel.link import Link
from fdbroker.kernel.received import let_descriptors
from fdbroker.limits import inbox as limits
from fdbroker.limits.opener import DRAIN_SECONDS, UNIT_US
from fdbroker.offers import Offer
from fdbroker.policy.compiled import Policy
from fdbroker.policy.messages import messages
from fdbroker.renewal import Renewal
from fdbroker.wire import admin, findings, link, lists
from fdbroker.wire.connections import Came, Use
from fdbroker.wire.launcher import DRAINED, LAUNCHER_TO_INBOX

_to_opener = link.INBOX_TO_OPENER.encode
_UNSENT_BYTES, _UNIT_S = limits.UNSENT_BYTES, UNIT_US / 1e6
_MESSAGES_PER_TURN = 64
_LINGER_S = 1.0  # how often we look whether descriptors that were unread still are
_UNITS_PER_RESOURCE = limits.UNITS_PER_RESOURCE


class Inbox(Clients):
    """All that the inbox holds. `serve` returns when it has drained, or the opener or the launcher is gone."""

    def __init__(
        self, launcher: Link, opener: Link, keeper: Link, policy: Policy, topics: Topics, unit_s: float = _UNIT_S
    ) -> None:
        super().__init__(opener, keeper, topics, unit_s)
        self._launcher = launcher
        self._last = 0  # the highest number of a connection so far
        self._drained_at_s = 0.0
        self._renewal = Renewal(launcher)
        self._use(policy)

    def serve(self) -> None:
        """Serve. Raises LinkViolation when the opener breaks its rules, OSError when it is gone in mid-sentence."""
        poll, only_opener = self._epoll, select.poll()
        only_opener.register(self._opener.fileno(), select.POLLIN)
        links = (  # in this order: who has its answer should find itself idle
            (self._opener.fileno(), self._opener, self._read_opener),
            (self._keeper.fileno(), self._keeper, self._read_keeper),
            (self._launcher.fileno(), self._launcher, self._read_launcher),
        )
        for _, one, _ in links:
            one.poll(poll)
        self._launcher.send(link.READY)
        while not (self.draining and not (self._by_number or self._keeper.waiting)):
            for _, one, _ in links:
                if one.waiting:
                    one.poll(poll)
            ready = dict(poll.poll(self._timeout_s()))
            for number, one, read in links:
                events = ready.pop(number, 0)
                if events & select.EPOLLOUT:
                    one.flush()
                    one.poll(poll)
                if events & ~select.EPOLLOUT and not read():
                    return
            while self._renewal.to_come:  # nobody is served before all have come again, with another policy
                only_opener.poll()
                if not self._read_opener():
                    return
            for descriptor, client_events in ready.items():
                if (known := self._by_descriptor.get(descriptor)) is not None:
                    self._client_event(known, client_events)
            if self.turns.resting or self._more:
                self._go_on((*self.turns.rested(), *self._more.values()))
            if self._messages.due or self._messages.replaying:
                self._go_on(self._messages.commit())
                for client in self._messages.deliver():
                    self._settle_timed(client)
            if self._messages.unsaid and not self._keeper.waiting:
                self._go_on(self._messages.say_denied())
            self.turns.end()
            if self.turns.slowed:
                self._messages.say_slowed(self._by_number.values())
            if self._memory.waiting:  # something of whoever has a deadline
                self._end_slow()
            if self._unread.waiting:
                self._unread.sweep_at_times()
            if self.draining and time.monotonic() >= self._drained_at_s:
                for client in list(self._by_number.values()):
                    self._close(client, DEAF)
        self._opener.send(DRAINED)

    def _timeout_s(self) -> float:
        if self._more or self._messages.due or (self._messages.replaying and self._messages.pressing):
            return 0
        ends_s = [_LINGER_S] if self._unread.waiting else []
        if self.draining:
            ends_s.append(max(0.0, self._drained_at_s - time.monotonic()))
        if self.turns.resting:
            ends_s.append(self.turns.timeout_s())
        if self._memory.waiting:
            ends_s += self._deadlines.timeouts_s()
        return min(ends_s) if ends_s else -1

    # ---- the opener's link

    def _read_opener(self) -> bool:
        """Do what the opener says; false when it is gone."""
        for _ in range(_MESSAGES_PER_TURN):
            received = self._opener.receive_whole(1)
            if received is None:
                return True
            data, descriptors = received
            if not data:
                return False
            match link.OPENER_TO_INBOX.decode(data):
                case link.Outcome(number, refusal, sent_us):
                    self._outcome(number, refusal, sent_us / 1e6)
                    return True  # mostly nothing else waits: to look takes as long as the next turn of the loop
                case Came() as came:
                    self._came(came, descriptors)
                case Use(number, count):
                    if not self._renewal.knows(number):
                        self._read_launcher()  # which has sent it to us before
                    self._use(self._renewal.use(number, count))
                case admin.Reloaded(number, told):
                    if known := self._by_number.get(number):
                        known.out += dispatch.reloaded_reply(findings.from_bytes(told))
                        self._end_turn(known, "Reloaded")
                case link.Drain():
                    self._drain()
                case link.Ping():
                    self._opener.send(link.PONG)
                case other:
                    assert_never(other)
        return True

    def _read_keeper(self) -> bool:
        """Take one message of the keeper; false when it is gone. Raises LinkViolation when it is out of turn."""
        data = self._keeper.receive()
        if data and (known := self._by_number.get((message := lists.KEEPER_TO_INBOX.decode(data)).connection)):
            lists.turned(known.number, known.state, "Offered")  # a refusal, too, is for who asks the keeper
            if isinstance(message, lists.ListRefused):
                self._outcome(message.connection, RateLimited(message.wait_ms, "rate"))
            else:
                self._offered(known, message.offers, last=message.last)
        return data != b""

    def _outcome(self, number: int, refusal: Refused | None, sent_s: float = 0.0) -> None:
        if known := self._by_number.get(number):
            self.turns.sent(known.user, sent_s)
            if refusal is not None:
                known.refuse(refusal)
                if refusal.offends:
                    self.turns.offend(known.user)
            self._answered(known)
            self._end_turn(known, "Outcome")

    def _read_launcher(self) -> bool:
        """Take the policies that the launcher sends; false when it is gone."""
        while (received := self._launcher.receive_with_descriptors(1)) is not None:
            data, descriptors = received
            if not data:
                return False
            self._renewal.put(LAUNCHER_TO_INBOX.decode(data).number, descriptors)
        return True

    def _use(self, policy: Policy) -> None:
        """Judge by that policy whoever comes from now on."""
        said = messages(policy)
        self._policy = policy._replace(messages=said)
        self._rights = rights_by(self._policy)
        self._topics.use(said.topics, said.users)

    def _came(self, came: Came, descriptors: list[int] | None) -> None:
        self._renewal.came()
        number, allowed = came.connection, self._rights.of(came.subject)
        if known := self._by_number.get(number):
            known.user.allow(allowed)
            let_descriptors(known.sock, allowed=bool(allowed.send))
            if not self._messages.allow(known, allowed):
                self._end_turn(known, "Unsubscribe")
        elif descriptors != [] or number > self._last:  # else one comes again that has ended meanwhile
            self._connected(came, allowed, descriptors)

    def _connected(self, came: Came, allowed: Rights, descriptors: list[int] | None) -> None:
        number = came.connection  # they may come in another order than they were accepted
        self._last = max(self._last, number)
        if descriptors is None:  # no descriptor was left here for the client's socket: nobody serves it
            self._opener.send(_to_opener(link.Closed(number, NOT_TAKEN)))
            return
        if not descriptors:
            raise LinkViolation("Came without a socket")
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, descriptors[0])
        let_descriptors(sock, allowed=bool(allowed.send))
        sender = Sender(came.uid, came.gid, came.pid, came.session, came.owner)
        client = Client(number, sender, sock, self.turns.join(sender.owner, allowed))
        self._topics.allow(client.member, allowed)
        self._by_number[client.number] = client
        self._by_descriptor[client.sock.fileno()] = client
        self._epoll.register(client.sock.fileno(), client.events)
        self._look_timed(client)

    def _offered(self, client: Client, offers: list[Offer], *, last: bool) -> None:
        client.offers += offers
        if client.state != "watching":  # else somebody changed a node, who may be another
            self.turns.work(client.user, len(offers) * _UNITS_PER_RESOURCE)
        if not last:
            return
        watching = client.state == "watching"
        deaf = watching and len(client.out) > _UNSENT_BYTES  # of the listings before, not of this one
        client.out += dispatch.offers_reply(client.offers, continues=watching)
        client.offers = []
        self._answered(client)
        if not watching:
            self._end_turn(client, "Offered")
        elif self.draining:
            self._send(client)
            self._close(client, ENDED)  # nothing more is owed to it
        elif deaf:
            self._close(client, DEAF)
        else:
            self._settle(client)

    def _drain(self) -> None:
        """Answer what has been asked, read nothing more; who has not taken its answers in DRAIN_SECONDS gets none."""
        self.draining = True
        self._drained_at_s = time.monotonic() + DRAIN_SECONDS
        for client in list(self._by_number.values()):
            if client.state in ("watching", "stopping", "reloading", "subscribed"):  # nothing more is owed to them
                self._close(client, ENDED)
            elif client.state == "idle":
                if not client.out and client.question is None:
                    self._read(client)
                if client.number in self._by_number:
                    self._settle(client)
