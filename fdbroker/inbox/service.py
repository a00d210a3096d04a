"""The inbox's loop: clients in, questions to the opener, answers out.

Runs in: inbox, without any right. An attacker controls what clients send, when, and whether they read.

While a question is with the opener, nothing is written to that client and none of its further messages is looked at:
so answers keep the order of the requests, and opener and inbox never write at the same time.
"""

from __future__ import annotations

import errno
import select
import socket
from collections.abc import Iterable
from typing import assert_never

from fdbroker import limits
from fdbroker.errors import LinkViolation, ProtocolViolation, RateLimited, Refused
from fdbroker.inbox import dispatch
from fdbroker.inbox.attached import Unread
from fdbroker.inbox.client import BROKE, DEAF, ENDED, FOREIGN, NOT_TAKEN, SLOW, Client
from fdbroker.inbox.deadlines import Deadlines
from fdbroker.inbox.memory import Memory
from fdbroker.inbox.messages import Messages
from fdbroker.inbox.receive import READ_BYTES, Receiver
from fdbroker.inbox.topics import Topics
from fdbroker.inbox.turns import Turns, timed
from fdbroker.kernel.jobs import Jobs
from fdbroker.kernel.link import Link
from fdbroker.offers import Offer
from fdbroker.wire import admin, frame, link, lists, rights
from fdbroker.wire.frame import TooLong
from fdbroker.wire.keeper import ListRefused

# After these nothing may be asked any more: what a client sends then ends its connection.
_LAST = ("watching", "subscribed")
_to_opener = link.INBOX_TO_OPENER.encode
_UNSENT_BYTES, _UNIT_S = limits.UNSENT_BYTES, limits.UNIT_US / 1e6
_MESSAGES_PER_TURN = 64
_LINGER_S = 1.0  # how often we look whether descriptors that were unread still are
_BYTES_PER_UNIT, _UNITS_PER_RESOURCE = limits.BYTES_PER_UNIT, limits.UNITS_PER_RESOURCE


class Inbox:
    """All that the inbox holds. `serve` returns when it has drained, or the opener or the launcher is gone."""

    def __init__(self, launcher: Link, opener: Link, keeper: Link, topics: Topics, unit_s: float = _UNIT_S) -> None:
        self._launcher = launcher
        self._opener = opener
        self._keeper = keeper
        self._topics = topics
        closing = Jobs(limits.CLOSING_THREADS, limits.STUCK_THREADS)
        self._receiver = Receiver(closing)
        self._unread = Unread(closing)
        self.turns = Turns(unit_s)  # how long a unit of work takes here
        self._messages = Messages(topics, opener, self._unread, self.turns)
        self._by_number: dict[int, Client] = {}
        self._by_descriptor: dict[int, Client] = {}
        self._deadlines = Deadlines()
        self._memory = Memory()
        self._more: dict[int, Client] = {}  # whose whole messages wait for the next turn
        self.draining = False  # told to take nothing more
        self._in_force = admin.InForce(0, "", 0)
        self._epoll = select.epoll()

    def serve(self) -> None:
        """Serve. Raises LinkViolation when the opener breaks its rules, OSError when it is gone in mid-sentence."""
        poll = self._epoll
        self._launcher.poll(poll)
        self._launcher.send(link.READY)
        while not (self.draining and not self._by_number):
            self._opener.poll(poll)
            self._keeper.poll(poll)
            ready = dict(poll.poll(self._timeout_s()))
            # first these two: a client that has its answer asks again, and should find itself idle
            for one, read in ((self._opener, self._read_opener), (self._keeper, self._read_keeper)):
                events = ready.pop(one.fileno(), 0)
                if events & select.EPOLLOUT:
                    one.flush()
                if events & ~select.EPOLLOUT and not read():
                    return
            if ready.pop(self._launcher.fileno(), 0) and self._launcher.receive() == b"":
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
            if self._messages.unsaid and not self._opener.waiting:
                self._go_on(self._messages.say_denied())
            self.turns.end()
            if self.turns.slowed:
                self._messages.say_slowed(self._by_number.values())
            if self._deadlines.busy:
                self._end_slow()
            if self._unread.waiting:
                self._unread.sweep_at_times()
        self._opener.send(link.DRAINED)

    def _go_on(self, clients: Iterable[Client]) -> None:
        for client in clients:
            if client.number in self._by_number:
                self._work_timed(client)

    def _timeout_s(self) -> float:
        if self._more or self._messages.due or (self._messages.replaying and self._messages.pressing):
            return 0
        ends_s = [_LINGER_S] if self._unread.waiting else []
        if self.turns.resting:
            ends_s.append(self.turns.timeout_s())
        if self._deadlines.busy:
            ends_s.append(self._deadlines.timeout_s())
        return min(ends_s, default=-1)

    def _end_slow(self) -> None:
        """Disconnect clients whose message is not complete in time, or that do not take their answers."""
        for number in self._deadlines.unsent():
            self._close(self._by_number[number], DEAF)
        for number in self._deadlines.partial():
            client = self._by_number[number]
            if number not in client.user.held and not self._receiver.peek(client):
                self._close(client, SLOW)
            self._deadlines.completed(number)  # else it is we who do not read, and the rest has its time anew

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
                case rights.Connected() as connected:
                    self._connected(connected, descriptors)
                case rights.RightsChanged(number, allowed):
                    if known := self._by_number.get(number):
                        known.user.allow(allowed)
                        if not self._messages.allow(known, allowed):
                            self._end_turn(known, "Unsubscribe")
                case rights.Topics(topics):
                    self._topics.use(topics)
                case rights.Users(users):
                    self._topics.add_users(users)
                case link.Outcome(number, refusal):
                    self._outcome(number, refusal)
                    return True  # mostly nothing else waits: to look takes as long as the next turn of the loop
                case admin.Reloaded(number, findings):
                    if known := self._by_number.get(number):
                        known.out += dispatch.reloaded_reply(findings)
                        self._end_turn(known, "Reloaded")
                case admin.InForce() as said:
                    self._in_force = said
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
            link.turned(known.number, known.state, "Offered")  # a refusal, too, is for who asks the keeper
            if isinstance(message, ListRefused):
                self._outcome(message.connection, RateLimited(message.wait_ms, "rate"))
            else:
                self._offered(known, message.offers, last=message.last)
        return data != b""

    def _outcome(self, number: int, refusal: Refused | None) -> None:
        if known := self._by_number.get(number):
            if refusal is not None:
                known.refuse(refusal)
                if refusal.offends:
                    self.turns.offend(known.user)
            self._answered(known)
            self._end_turn(known, "Outcome")

    def _connected(self, connected: rights.Connected, descriptors: list[int] | None) -> None:
        number, sender, allowed = connected
        if descriptors is None:  # no descriptor was left here for the client's socket: nobody serves it
            self._opener.send(_to_opener(link.Closed(number, NOT_TAKEN)))
            return
        if not descriptors:
            raise LinkViolation("Connected without a socket")
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, descriptors[0])
        client = Client(number, sender, sock, self.turns.join(sender.owner, allowed))
        self._topics.allow(client.member, allowed)
        self._by_number[client.number] = client
        self._by_descriptor[client.sock.fileno()] = client
        self._epoll.register(client.sock.fileno(), client.events)
        if self.draining:
            self._close(client, ENDED)

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

    @timed
    def _end_turn(self, client: Client, event: str) -> None:
        client.turn(event)
        client.asked = ()
        self._work(client)

    def _answered(self, client: Client) -> None:
        """The opener needs to answer this one no more: another of the same user may ask."""
        after = self.turns.answered(client.user, client)
        if after is not None:
            self._work(after)

    def _drain(self) -> None:
        """Answer what has been asked, read nothing more."""
        self.draining = True
        for client in list(self._by_number.values()):
            if client.state in ("watching", "stopping", "reloading", "subscribed"):  # nothing more is owed to them
                self._close(client, ENDED)
            elif client.state == "idle":
                if not client.out and client.question is None:
                    self._read(client)
                if client.number in self._by_number:
                    self._settle(client)

    # ---- clients

    @timed
    def _client_event(self, client: Client, events: int) -> None:
        if events & select.EPOLLOUT:
            self._work(client)
        if client.number not in self._by_number:
            return
        if client.state != "idle" and events & (select.EPOLLHUP | select.EPOLLERR):
            self._close(client, ENDED)  # nobody is there to hear the answer
        elif client.state in _LAST and events & select.EPOLLIN:
            self._end_asking(client)
        elif events & ~select.EPOLLOUT:
            if client.number in client.user.held:
                return
            if client.state == "idle" and not client.out and not client.ended and self._awaits(client):
                if self.turns.may_work(client.user):
                    self._read(client)
                elif client.user.rests_until_s:
                    client.user.held[client.number] = client
                    client.wait(self._epoll, readable=False)
                # else its user's share of this turn is used up: epoll tells it again
            elif events & (select.EPOLLHUP | select.EPOLLERR):
                self._close(client, ENDED)
            else:
                client.wait(self._epoll, readable=False)  # what waits now comes first

    def _awaits(self, client: Client) -> bool:
        """Whether nothing that it sent before is still to be done."""
        number = client.number
        return client.question is None and number not in self._more and number not in self._messages.unsaid

    def _end_asking(self, client: Client) -> None:
        """Something came after Subscribe or a watch, and must not stay: it could be the connection's own other end."""
        said = self._receiver.peek(client)
        if said == b"":  # it sends no more, and may go on to listen
            client.ended = True
            self._settle(client)
        elif said is not None:
            self._close(client, BROKE)

    def _read(self, client: Client) -> None:
        try:
            received = self._receiver.read(client)
        except BlockingIOError:
            return
        except OSError:
            self._close(client, ENDED)
            return
        self.turns.work(client.user, 1 + len(received.data) // _BYTES_PER_UNIT + received.descriptors * 2)
        if received.broken:
            self._close(client, BROKE)
        elif not received.data:
            client.ended = True
            self._settle(client)
        elif received.uid != client.uid:
            self._close(client, FOREIGN)
        else:
            client.decoder.feed(received.data, received.attached)
            self._work(client)

    def _work(self, client: Client) -> None:
        """Take the client's whole messages in order, until one waits for the opener or for the client to read."""
        self._more.pop(client.number, None)
        try:
            while self.turns.may_work(client.user):
                if client.state != "idle" or client.doomed or client.number in self._messages.unsaid:
                    break
                if client.question is None and not self._take(client):
                    break
                if client.question is not None and not self._put(client):
                    break
                if len(client.out) > READ_BYTES and not self._send(client):
                    break
            else:
                waiting = client.user.held if client.user.rests_until_s else self._more
                waiting[client.number] = client
        except TooLong:
            if client.decoder.framed:
                client.answer(frame.encode_status(errno.EMSGSIZE))
            client.doomed, client.reason = True, BROKE
        except ProtocolViolation:
            client.doomed, client.reason = True, BROKE  # what was answered before is still sent
        self._settle(client)

    _work_timed = timed(_work)

    def _take(self, client: Client) -> bool:
        """Decode and dispatch one message; false when no whole one is there."""
        received = client.decoder.next_message()
        if received is None:
            return False
        message, attached = received
        self._deadlines.completed(client.number)
        dispatched = dispatch.dispatch_frame if client.decoder.framed else dispatch.dispatch_varlink
        action = dispatched(message, attached)
        match action:
            case dispatch.Answer(data):
                client.answer(data)
            case dispatch.TellAbout():
                client.answer(dispatch.about_reply(self._in_force))
            case dispatch.Publish():
                self._messages.publish(client, action, attached)
            case dispatch.Receive(_, acknowledge):
                self.turns.work(client.user, len(acknowledge))
                client.question = action
            case dispatch.AskOpen(resources):
                self.turns.work(client.user, len(resources) * _UNITS_PER_RESOURCE)
                client.question = action
            case _:
                client.question = action
        self.turns.work(client.user, dispatch.units(message))
        return True

    def _put(self, client: Client) -> bool:
        """Put the question, mostly to the opener, once all answers before it are sent; false when they are not."""
        if client.uncommitted or (client.out and not self._send(client)):
            return False
        weight = dispatch.weight(client.question)
        if weight and not self.turns.may_ask(client.user, client, weight):
            return False
        asked, client.question = client.question, None
        match asked:
            case dispatch.Subscribe(topics, after):
                self._messages.subscribe(client, topics, after)
            case dispatch.Receive():
                self._messages.receive(client, asked)
            case dispatch.AskShutdown() if self.draining:
                client.doomed = True  # it stops already
            case dispatch.AskList(watch):
                client.turn("Watch" if watch else "List")
                self._keeper.send(lists.INBOX_TO_KEEPER.encode(lists.List(client.number, watch)))
            case dispatch.AskOpen() | dispatch.AskReload() | dispatch.AskShutdown():
                if isinstance(asked, dispatch.AskOpen):
                    client.asked = asked.resources
                event, message = dispatch.question(asked, client.number)
                client.turn(event)
                self._opener.send(_to_opener(message))
        if client.state in _LAST and client.decoder.partial:  # that was its last request, and another one came with it
            client.doomed, client.reason = True, BROKE
        return True

    def _send(self, client: Client) -> bool:
        """Send what waits; true when all of it is sent. A client that is gone is noticed when it is read."""
        if client.out:
            before = len(client.out)
            try:
                client.send(self._unread)
            except BlockingIOError:
                return False
            except OSError:
                client.lose()
                return True
            finally:
                if len(client.out) < before:
                    self._deadlines.took(client.number)
        return not client.out

    def _settle(self, client: Client) -> None:
        """After whatever happened: send, close if that was all, and wait for what can come next."""
        sent = (not client.out or self._send(client)) and not client.uncommitted
        if sent and client.member.queue and client.member.replayed is None:
            client.fill(self._unread)
            sent = self._send(client)
        if not sent or client.member.replayed is not None:
            client.shed()
        idle = client.state == "idle" and self._awaits(client) and client.number not in client.user.held
        ends = client.doomed or client.ended or self.draining
        if (sent and idle and ends) or (client.state in _LAST and client.doomed):
            self._close(client, client.reason)
            return
        size = len(client.out) + client.member.queued_bytes + client.decoder.held
        if (size or self._memory.waiting) and self._memory.is_too_much(client.user.owner, client.number, size):
            self._close(client, DEAF)
            return
        self._deadlines.note(
            client.number,
            unsent=client.state not in _LAST and bool(client.out),
            partial=idle and sent and client.decoder.partial,
        )
        readable = (idle and sent) or client.state in _LAST or bool(client.events & select.EPOLLIN)
        client.wait(self._epoll, readable=readable and not client.ended)

    _settle_timed = timed(_settle)

    def _close(self, client: Client, reason: int) -> None:
        del self._by_number[client.number]
        del self._by_descriptor[client.sock.fileno()]
        self._more.pop(client.number, None)
        self._deadlines.forget(client.number)
        self._memory.forget(client.user.owner, client.number)
        self._messages.forget(client)
        self.turns.leave(client.user, client)
        # taken out by hand: epoll would keep it for as long as the opener's copy is open
        self._epoll.unregister(client.sock.fileno())
        client.let_go()
        self._unread.end(client.user.owner, client.sock)
        self._opener.send(_to_opener(link.Closed(client.number, reason)))
        if reason:
            self.turns.offend(client.user)
        self._answered(client)
