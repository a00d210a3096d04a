"""The inbox's loop: clients in, questions to the opener, answers out.

Runs in: inbox, without any right. An attacker controls what clients send, when, and whether they read.

While a question is with the opener, nothing is written to that client and none of its further messages is looked at:
so answers keep the order of the requests, and opener and inbox never write at the same time.
"""

from __future__ import annotations

import errno
import select
import socket
import time

from fdbroker import limits
from fdbroker.errors import ClientNotReading, LinkViolation, ProtocolViolation, RateLimited
from fdbroker.inbox import dispatch
from fdbroker.inbox.attached import Ledger, Unread
from fdbroker.inbox.client import BROKE, DEAF, ENDED, FOREIGN, SLOW, Client
from fdbroker.inbox.messages import Messages
from fdbroker.inbox.topics import Topics
from fdbroker.inbox.turns import Turns
from fdbroker.kernel import sockets
from fdbroker.kernel.link import Link
from fdbroker.terms import Offer
from fdbroker.wire import frame, link, rights
from fdbroker.wire.frame import TooLong

_READ_BYTES = 65536
_MESSAGE_S = limits.MESSAGE_SECONDS
_UNSENT_BYTES = limits.UNSENT_BYTES
_MESSAGES_PER_TURN = 64
# How often we look whether what an ended connection left unread is gone.
_LINGER_S = 1.0
# How late a message that is not complete in time may be noticed.
_SLOW_S = 0.05
_BYTES_PER_UNIT = limits.BYTES_PER_UNIT
_UNITS_PER_RESOURCE = limits.UNITS_PER_RESOURCE


class Inbox:
    """All that the inbox holds. `serve` returns when it has drained, or the opener or the launcher is gone."""

    def __init__(self, launcher: Link, opener: Link, topics: Topics) -> None:
        self._launcher = launcher
        self._opener = opener
        self._topics = topics
        self._ledger = Ledger()
        self._unread = Unread()
        self._turns = Turns()
        self._messages = Messages(topics, opener, self._unread, self._turns)
        self._opener_full = False
        self._by_number: dict[int, Client] = {}
        self._by_descriptor: dict[int, Client] = {}
        self._partial: dict[int, float] = {}  # number -> when its message began; in order of time
        self._more: dict[int, Client] = {}  # whose whole messages wait for the next turn
        self._draining = False
        self._epoll = select.epoll()

    def serve(self) -> None:
        """Serve. Raises LinkViolation when the opener breaks its rules, OSError when it is gone in mid-sentence."""
        poll, launcher, opener = self._epoll, self._launcher.fileno(), self._opener.fileno()
        poll.register(launcher, select.EPOLLIN)
        poll.register(opener, select.EPOLLIN)
        self._launcher.send(link.READY)
        while not (self._draining and not self._by_number):
            full = bool(self._opener.waiting)
            if full != self._opener_full:
                self._opener_full = full
                poll.modify(opener, select.EPOLLIN | (select.EPOLLOUT if full else 0))
            ready = dict(poll.poll(self._timeout_s()))
            # first the opener: a client that has its answer asks again, and should find itself idle
            events = ready.pop(opener, 0)
            if events & select.EPOLLOUT:
                self._opener.flush()
            if events & ~select.EPOLLOUT and not self._read_opener():
                return
            if ready.pop(launcher, 0) and self._launcher.receive() == b"":
                return
            for descriptor, client_events in ready.items():
                client = self._by_descriptor.get(descriptor)
                if client is not None:
                    self._client_event(client, client_events)
            for client in (*self._turns.rested(), *self._more.values()):
                if client.number in self._by_number:
                    self._work(client)
            for client in self._messages.commit():
                if client.number in self._by_number:
                    self._work(client)
            for client in self._messages.deliver():
                self._settle(client)
            self._turns.end()
            self._say_slowed()
            self._end_slow()
            if self._unread.lingering:
                self._unread.sweep()
        self._opener.send(link.DRAINED)

    def _timeout_s(self) -> float:
        if self._more or self._messages.pressing:
            return 0
        end_s = self._turns.timeout_s()
        if self._partial:
            began_s = next(iter(self._partial.values()))
            slow_s = max(_SLOW_S, began_s + _MESSAGE_S - time.monotonic())
            end_s = slow_s if end_s < 0 else min(end_s, slow_s)
        if self._unread.lingering:
            end_s = _LINGER_S if end_s < 0 else min(end_s, _LINGER_S)
        return end_s

    def _end_slow(self) -> None:
        """Disconnect whose message is not complete in time, and who does not take its last answer."""
        if not self._partial:
            return
        limit_s = time.monotonic() - _MESSAGE_S
        for number, began_s in list(self._partial.items()):
            if began_s > limit_s:
                return
            client = self._by_number[number]
            if number not in client.user.held:  # else the rest of it may be there, and it is we who do not read
                self._close(client, SLOW)

    def _say_slowed(self) -> None:
        """Have it recorded whose work has begun to wait."""
        while self._turns.slowed:
            uid = self._turns.slowed.pop().uid
            number = next((client.number for client in self._by_number.values() if client.uid == uid), None)
            if number is not None and not self._opener.waiting:
                self._opener.send(link.encode_slowed(number))

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
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, descriptors[0]) if descriptors else None
            match link.decode(link.OPENER_TO_INBOX, data):
                case rights.Connected(number, sender, allowed) if sock is not None:
                    client = Client(number, sender, sock, self._turns.join(sender.uid, allowed))
                    self._topics.allow(client.member, allowed)
                    self._welcome(client)
                case rights.Connected(number, _, _) if descriptors is None:  # none is left here: nobody serves it
                    self._opener.send(link.encode_closed(number, ENDED))
                case rights.RightsChanged(number, allowed):
                    if number in self._by_number:
                        client = self._by_number[number]
                        client.user.allow(allowed)
                        if not self._messages.allow(client, allowed):
                            self._end_turn(client)
                case rights.Topics(topics):
                    self._topics.use(topics)
                case rights.Users(users):
                    self._topics.add_users(users)
                case link.Outcome(number, refusal):
                    if number in self._by_number:
                        client = self._by_number[number]
                        if refusal is not None:
                            client.out += client.refused(refusal)
                            client.doomed |= isinstance(refusal, ClientNotReading)
                            if isinstance(refusal, RateLimited | ClientNotReading):
                                self._turns.offend(client.user)
                        self._answered(client)
                        self._end_turn(client)
                    return True  # mostly nothing else waits: to look takes as long as the next turn of the loop
                case link.Offered(number, last, offers):
                    if number in self._by_number:
                        self._offered(self._by_number[number], offers, last=last)
                case link.Drain():
                    self._drain()
                case link.Ping():
                    self._opener.send(link.PONG)
                case other:
                    raise LinkViolation(f"{other!r} with the wrong descriptors")
        return True

    def _welcome(self, client: Client) -> None:
        self._by_number[client.number] = client
        self._by_descriptor[client.sock.fileno()] = client
        self._epoll.register(client.sock.fileno(), client.events)
        if self._draining:
            self._close(client, ENDED)

    def _offered(self, client: Client, offers: list[Offer], *, last: bool) -> None:
        client.offers += offers
        self._turns.work(client.user, len(offers) * _UNITS_PER_RESOURCE)
        if not last:
            return
        watching = client.state == "watching"
        deaf = watching and len(client.out) > _UNSENT_BYTES  # of the listings before, not of this one
        client.out += dispatch.offers_reply(client.offers, continues=watching)
        client.offers = []
        self._answered(client)
        if not watching:
            self._end_turn(client)
        elif self._draining:
            self._send(client)
            self._close(client, ENDED)  # nothing more is owed to it
        elif deaf:
            self._close(client, DEAF)
        else:
            self._settle(client)

    def _end_turn(self, client: Client) -> None:
        client.state = "idle"
        client.asked = ()
        self._work(client)

    def _answered(self, client: Client) -> None:
        """The opener needs to answer this one no more: another of the same user may ask."""
        after = self._turns.answered(client.user, client)
        if after is not None:
            self._work(after)

    def _drain(self) -> None:
        """Answer what has been asked, read nothing more."""
        self._draining = True
        for client in list(self._by_number.values()):
            if client.state in ("watching", "stopping", "subscribed"):  # nothing more is owed to them
                self._close(client, ENDED)
            elif client.state == "idle":
                if not client.out and client.question is None:
                    self._read(client)
                if client.number in self._by_number:
                    self._settle(client)

    # ---- clients

    def _client_event(self, client: Client, events: int) -> None:
        if events & select.EPOLLOUT:
            self._work(client)
        if client.number not in self._by_number:
            return
        if client.state != "idle" and events & (select.EPOLLHUP | select.EPOLLERR):
            self._close(client, ENDED)  # nobody is there to hear the answer
        elif events & ~select.EPOLLOUT:
            if client.number in client.user.held:
                return
            if client.state == "idle" and not client.out and not client.ended and self._awaits(client):
                if self._turns.may_work(client.user):
                    self._read(client)
                elif client.user.rests_until_s:
                    client.user.held[client.number] = client
                    self._interest(client, readable=False)
                # else its user's share of this turn is used up: epoll tells it again
            elif events & (select.EPOLLHUP | select.EPOLLERR):
                self._close(client, ENDED)
            else:
                self._interest(client, readable=False)  # what waits now comes first

    def _awaits(self, client: Client) -> bool:
        """Whether nothing that it sent before is still to be done."""
        return client.question is None and client.number not in self._more

    def _read(self, client: Client) -> None:
        room = limits.DESCRIPTORS_PER_MESSAGE if client.member.send and self._ledger.has_room(client.uid) else 0
        try:
            data, uid, numbers, cut = sockets.receive_with_sender(client.sock, _READ_BYTES, room)
        except BlockingIOError:
            return
        except OSError:
            self._close(client, ENDED)
            return
        # whatever comes of it, they have an owner; without room, or where we have none left, none came
        attached = self._ledger.take(client.uid, numbers) if numbers or cut else None
        self._turns.work(client.user, 1 + len(data) // _BYTES_PER_UNIT + len(numbers) * 2)
        if not data:
            client.ended = True
            self._settle(client)
        elif uid != client.uid:
            self._close(client, FOREIGN)
        elif cut and len(numbers) == limits.DESCRIPTORS_PER_MESSAGE:
            self._close(client, BROKE)  # it sent more than a message may have
        else:
            client.decoder.feed(data, attached if not cut else self._ledger.take(client.uid, ()))
            self._work(client)

    def _work(self, client: Client) -> None:
        """Take the client's whole messages in order, until one waits for the opener or for the client to read."""
        self._more.pop(client.number, None)
        try:
            while self._turns.may_work(client.user):
                if client.state != "idle" or client.doomed:
                    break
                if client.question is None and not self._take(client):
                    break
                if client.question is not None and not self._put(client):
                    break
                if len(client.out) > _READ_BYTES and not self._send(client):
                    break
            else:
                waiting = client.user.held if client.user.rests_until_s else self._more
                waiting[client.number] = client
        except TooLong:
            if client.decoder.framed:
                client.answer(frame.encode_status(errno.EMSGSIZE))
            client.doomed = True
            client.reason = BROKE
        except ProtocolViolation:
            client.doomed = True  # what was answered before is still sent
            client.reason = BROKE
        self._settle(client)

    def _take(self, client: Client) -> bool:
        """Decode and dispatch one message; false when no whole one is there."""
        received = client.decoder.next_message()
        if received is None:
            return False
        message, attached = received
        self._partial.pop(client.number, None)
        self._turns.work(client.user, 1)
        dispatch_message = dispatch.dispatch_frame if client.decoder.framed else dispatch.dispatch_varlink
        action = dispatch_message(message, attached)
        match action:
            case dispatch.Answer(data):
                client.answer(data)
            case dispatch.Publish():
                self._messages.publish(client, action, attached)
            case dispatch.Receive(_, acknowledge):
                self._turns.work(client.user, len(acknowledge))
                client.question = action
            case dispatch.AskOpen(resources):
                self._turns.work(client.user, len(resources) * _UNITS_PER_RESOURCE)
                client.question = action
            case _:
                client.question = action
        return True

    def _put(self, client: Client) -> bool:
        """Put the question, mostly to the opener, once all answers before it are sent; false when they are not."""
        if client.uncommitted or not self._send(client):
            return False
        weight = dispatch.weight(client.question)
        if weight and not self._turns.may_ask(client.user, client, weight):
            return False
        question, client.question = client.question, None
        match question:
            case dispatch.AskOpen(resources):
                client.state = link.TURNS[client.state, "Open"]
                client.asked = resources
                self._opener.send(link.encode_open(client.number, resources))
            case dispatch.AskList(watch):
                client.state = link.TURNS[client.state, "Watch" if watch else "List"]
                self._opener.send(link.encode_list(client.number, watch=watch))
            case dispatch.AskShutdown() if self._draining:
                client.doomed = True  # it stops already
            case dispatch.AskShutdown():
                client.state = link.TURNS[client.state, "Shutdown"]
                self._opener.send(link.encode_shutdown(client.number))
            case dispatch.Subscribe(topics, after):
                self._messages.subscribe(client, topics, after)
            case dispatch.Receive():
                self._messages.receive(client, question)
        return True

    def _send(self, client: Client) -> bool:
        """Send what waits; true when all of it is sent. A client that is gone is noticed when it is read."""
        if client.out:
            try:
                client.send(self._unread)
            except BlockingIOError:
                return False
            except OSError:
                client.doomed = True
                client.out.clear()
                client.attached.clear()
                return True
        return not client.out

    def _settle(self, client: Client) -> None:
        """After whatever happened: send, close if that was all, and wait for what can come next."""
        sent = self._send(client) and not client.uncommitted
        if sent and client.member.queue and client.member.replayed is None:
            client.fill(self._unread)
            sent = self._send(client)
        if not sent or client.member.replayed is not None:
            client.shed()
        idle = client.state == "idle" and self._awaits(client) and client.number not in client.user.held
        if sent and idle and (client.doomed or client.ended or self._draining):
            self._close(client, client.reason)
            return
        if (idle and sent and client.decoder.partial) or (client.doomed and not sent):
            self._partial.setdefault(client.number, time.monotonic())
        else:
            self._partial.pop(client.number, None)
        readable = (idle and sent) or bool(client.events & select.EPOLLIN)
        self._interest(client, readable=readable and not client.ended)

    def _interest(self, client: Client, *, readable: bool) -> None:
        events = (select.EPOLLIN if readable else 0) | (select.EPOLLOUT if client.out else 0)
        if client.number in client.user.held:  # and do not tell again and again that it has hung up
            events = events & ~select.EPOLLIN | select.EPOLLET
        if events != client.events:
            client.events = events
            self._epoll.modify(client.sock.fileno(), events)

    def _close(self, client: Client, reason: int) -> None:
        del self._by_number[client.number]
        del self._by_descriptor[client.sock.fileno()]
        self._more.pop(client.number, None)
        self._partial.pop(client.number, None)
        self._messages.forget(client)
        self._turns.leave(client.user, client)
        # taken out by hand: epoll would keep it for as long as the opener's copy is open
        self._epoll.unregister(client.sock.fileno())
        client.let_go()
        self._unread.end(client.uid, client.sock)
        self._opener.send(link.encode_closed(client.number, reason))
        if reason:
            self._turns.offend(client.user)
        self._answered(client)
