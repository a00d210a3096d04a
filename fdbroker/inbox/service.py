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
from collections.abc import Sequence

from fdbroker import limits
from fdbroker.errors import ClientNotReading, LinkViolation, ProtocolViolation, Refused, TopicDenied
from fdbroker.inbox import dispatch
from fdbroker.inbox.decode import Decoder
from fdbroker.inbox.topics import Member, Topics
from fdbroker.kernel import sockets
from fdbroker.kernel.link import Link
from fdbroker.terms import Offer, Resource, TopicUse
from fdbroker.wire import frame, link
from fdbroker.wire.frame import TooLong
from fdbroker.wire.rights import Connected, Rights, RightsChanged, Sender, encode_denied_use
from fdbroker.wire.rights import Topics as TopicsChanged

_READ_BYTES = 65536
_MESSAGE_S = limits.MESSAGE_SECONDS
_UNSENT_BYTES = limits.UNSENT_BYTES
_MESSAGES_PER_TURN = 64
# Of one user, over all its connections: so a flood of one delays others by that many messages and no more.
_MESSAGES_PER_USER = 16
_ENDED, _BROKE, _FOREIGN, _SLOW, _DEAF = range(len(link.CLOSED_REASONS))


class Client:
    """One connection: our copy of its socket, who it is (and all its messages must come from), what waits."""

    __slots__ = (
        "asked",
        "decoder",
        "doomed",
        "ended",
        "events",
        "member",
        "number",
        "offers",
        "out",
        "question",
        "reason",
        "sock",
        "state",
        "uid",
    )

    def __init__(self, number: int, sender: Sender, sock: socket.socket) -> None:
        self.number = number
        self.uid = sender.uid
        self.member = Member(sender)
        self.sock = sock
        self.decoder = Decoder()
        self.state = "idle"  # a state of link.TURNS, or subscribed
        self.question: dispatch.Question | None = None  # to put once `out` is sent
        self.asked: Sequence[Resource] = ()
        self.offers: list[Offer] = []
        self.out = bytearray()
        self.events = select.EPOLLIN
        self.ended = False  # it sends no more
        self.doomed = False  # close once all is sent
        self.reason = _ENDED  # why it will be closed


class Inbox:
    """All that the inbox holds. `serve` returns when it has drained, or the opener or the launcher is gone."""

    def __init__(self, launcher: Link, opener: Link, topics: Topics) -> None:
        self._launcher = launcher
        self._opener = opener
        self._topics = topics
        self._subscribed: dict[Member, Client] = {}
        self._opener_full = False
        self._by_number: dict[int, Client] = {}
        self._by_descriptor: dict[int, Client] = {}
        self._partial: dict[int, float] = {}  # number -> when its message began; in order of time
        self._more: dict[int, Client] = {}  # whose whole messages wait for the next turn
        self._worked: dict[int, int] = {}  # uid -> messages taken in this turn of the loop
        self._draining = False
        self._epoll = select.epoll()

    def serve(self) -> None:
        """Serve. Raises LinkViolation when the opener breaks its rules, OSError when it is gone in mid-sentence."""
        poll = self._epoll
        poll.register(self._launcher.fileno(), select.EPOLLIN)
        poll.register(self._opener.fileno(), select.EPOLLIN)
        self._launcher.send(link.READY)
        while not (self._draining and not self._by_number):
            full = bool(self._opener.waiting)
            if full != self._opener_full:
                self._opener_full = full
                poll.modify(self._opener.fileno(), select.EPOLLIN | (select.EPOLLOUT if full else 0))
            ready = dict(poll.poll(self._timeout_s()))
            # first the opener: a client that has its answer asks again, and should find itself idle
            events = ready.pop(self._opener.fileno(), 0)
            if events & select.EPOLLOUT:
                self._opener.flush()
            if events & ~select.EPOLLOUT and not self._read_opener():
                return
            if ready.pop(self._launcher.fileno(), 0) and self._launcher.receive() == b"":
                return
            for descriptor, client_events in ready.items():
                client = self._by_descriptor.get(descriptor)
                if client is not None:
                    self._client_event(client, client_events)
            for client in list(self._more.values()):
                self._work(client)
            self._deliver()
            self._worked.clear()
            self._end_slow()
        self._opener.send(link.DRAINED)

    def _timeout_s(self) -> float:
        if self._more:
            return 0
        if self._partial:
            began_s = next(iter(self._partial.values()))
            return max(0.0, began_s + _MESSAGE_S - time.monotonic())
        return -1

    def _end_slow(self) -> None:
        """Disconnect whose message is not complete in time, and who does not take its last answer."""
        if not self._partial:
            return
        limit_s = time.monotonic() - _MESSAGE_S
        for number, began_s in list(self._partial.items()):
            if began_s > limit_s:
                return
            self._close(self._by_number[number], _SLOW)

    # ---- the opener's link

    def _read_opener(self) -> bool:
        """Do what the opener says; false when it is gone."""
        for _ in range(_MESSAGES_PER_TURN):
            received = self._opener.receive_with_descriptors(1)
            if received is None:
                return True
            data, descriptors = received
            if not data:
                return False
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, descriptors[0]) if descriptors else None
            match link.decode(link.OPENER_TO_INBOX, data):
                case Connected(number, sender, rights) if sock is not None:
                    client = Client(number, sender, sock)
                    self._topics.allow(client.member, rights)
                    self._welcome(client)
                case RightsChanged(number, rights):
                    if number in self._by_number:
                        self._allow(self._by_number[number], rights)
                case TopicsChanged(topics):
                    self._topics.use(topics)
                case link.Outcome(number, refusal):
                    if number in self._by_number:
                        client = self._by_number[number]
                        if refusal is not None:
                            client.out += self._refusal(client, refusal)
                            client.doomed |= isinstance(refusal, ClientNotReading)
                        self._end_turn(client)
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

    @staticmethod
    def _refusal(client: Client, refusal: Refused) -> bytes:
        if client.decoder.framed:
            return dispatch.refusal_status(refusal)
        return dispatch.refusal_reply(refusal, client.asked)

    def _welcome(self, client: Client) -> None:
        self._by_number[client.number] = client
        self._by_descriptor[client.sock.fileno()] = client
        self._epoll.register(client.sock.fileno(), client.events)
        if self._draining:
            self._close(client, _ENDED)

    def _offered(self, client: Client, offers: list[Offer], *, last: bool) -> None:
        client.offers += offers
        if not last:
            return
        watching = client.state == "watching"
        deaf = watching and len(client.out) > _UNSENT_BYTES  # of the listings before, not of this one
        client.out += dispatch.offers_reply(client.offers, continues=watching)
        client.offers = []
        if not watching:
            self._end_turn(client)
        elif self._draining:
            self._send(client)
            self._close(client, _ENDED)  # nothing more is owed to it
        elif deaf:
            self._close(client, _DEAF)
        else:
            self._settle(client)

    def _end_turn(self, client: Client) -> None:
        client.state = "idle"
        client.asked = ()
        self._work(client)

    def _drain(self) -> None:
        """Answer what has been asked, read nothing more."""
        self._draining = True
        for client in list(self._by_number.values()):
            if client.state in ("watching", "stopping", "subscribed"):  # nothing more is owed to them
                self._close(client, _ENDED)
            elif client.state == "idle":
                if not client.out:
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
            self._close(client, _ENDED)  # nobody is there to hear the answer
        elif events & ~select.EPOLLOUT:
            if client.state == "idle" and not client.out and not client.ended and client.number not in self._more:
                self._read(client)
            elif events & (select.EPOLLHUP | select.EPOLLERR):
                self._close(client, _ENDED)
            else:
                self._interest(client, readable=False)  # what waits now comes first

    def _read(self, client: Client) -> None:
        try:
            data, uid, cut = sockets.receive_with_sender(client.sock, _READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            self._close(client, _ENDED)
            return
        if not data:
            client.ended = True
            self._settle(client)
        elif uid != client.uid:
            self._close(client, _FOREIGN)
        elif cut:
            self._close(client, _BROKE)  # it sent descriptors, which nobody asked for
        else:
            client.decoder.feed(data)
            self._work(client)

    def _work(self, client: Client) -> None:
        """Take the client's whole messages in order, until one waits for the opener or for the client to read."""
        self._more.pop(client.number, None)
        try:
            while self._worked.get(client.uid, 0) < _MESSAGES_PER_USER:
                if client.state != "idle" or client.doomed:
                    break
                if client.question is None and not self._take(client):
                    break
                if client.question is not None and not self._ask(client):
                    break
                if len(client.out) > _READ_BYTES and not self._send(client):
                    break
            else:
                self._more[client.number] = client
        except TooLong:
            if client.decoder.framed:
                client.out += frame.encode_status(errno.EMSGSIZE)
            client.doomed = True
            client.reason = _BROKE
        except ProtocolViolation:
            client.doomed = True  # what was answered before is still sent
            client.reason = _BROKE
        self._settle(client)

    def _take(self, client: Client) -> bool:
        """Decode and dispatch one message; false when no whole one is there."""
        message = client.decoder.next_message()
        if message is None:
            return False
        self._partial.pop(client.number, None)
        self._worked[client.uid] = self._worked.get(client.uid, 0) + 1
        dispatch_message = dispatch.dispatch_frame if client.decoder.framed else dispatch.dispatch_varlink
        action = dispatch_message(message)
        match action:
            case dispatch.Answer(data):
                client.out += data
            case dispatch.Publish():
                self._publish(client, action)
            case dispatch.Subscribe(topics):
                self._subscribe(client, topics)
            case _:
                client.question = action
        return True

    # ---- messages

    def _publish(self, client: Client, message: dispatch.Publish) -> None:
        framed = client.decoder.framed
        try:
            self._topics.publish(
                client.member, message.topic, message.payload, text=message.text, encoding=message.encoding
            )
            answer = dispatch.SENT[not framed]
        except Refused as refusal:
            self._note(client, refusal, "send")
            answer = dispatch.message_refused(refusal, framed=framed)
        if not message.silent:
            client.out += answer

    def _subscribe(self, client: Client, topics: list[str]) -> None:
        others = sum(member.sender.uid == client.uid for member in self._subscribed)
        try:
            self._topics.subscribe(client.member, topics, others)
        except Refused as refusal:
            self._note(client, refusal, "subscribe")
            client.out += dispatch.message_refused(refusal, framed=False)
        else:
            client.state = "subscribed"
            self._subscribed[client.member] = client

    def _allow(self, client: Client, rights: Rights) -> None:
        """Other rights for a client; one that has subscribed to what it may not have any more is told so."""
        try:
            self._topics.allow(client.member, rights)
        except TopicDenied as refusal:
            del self._subscribed[client.member]
            client.out += client.member.take() + dispatch.message_refused(refusal, framed=False)
            self._end_turn(client)

    def _note(self, client: Client, refusal: Refused, verb: str) -> None:
        """Have a denial recorded, unless the opener has more to read than it can already."""
        if isinstance(refusal, TopicDenied) and not self._opener.waiting:
            self._opener.send(encode_denied_use(client.number, TopicUse(verb, refusal.topic)))

    def _deliver(self) -> None:
        """Send on what has come in this turn: of each subscriber all of it at once."""
        while self._topics.fresh:
            member, _ = self._topics.fresh.popitem()
            client = self._subscribed.get(member)
            if client is not None:
                self._settle(client)

    def _ask(self, client: Client) -> bool:
        """Put the question to the opener once all answers before it are sent; false when they are not."""
        if not self._send(client):
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
        return True

    def _send(self, client: Client) -> bool:
        """Send what waits; true when all of it is sent. A client that is gone is noticed when it is read."""
        if client.out:
            try:
                sent = sockets.send(client.sock, client.out)
            except BlockingIOError:
                return False
            except OSError:
                client.doomed = True
                client.out.clear()
                return True
            del client.out[:sent]
        return not client.out

    def _settle(self, client: Client) -> None:
        """After whatever happened: send, close if that was all, and wait for what can come next."""
        sent = self._send(client)
        if sent and client.member.queue:
            client.out += client.member.take()
            sent = self._send(client)
        idle = client.state == "idle" and client.question is None and client.number not in self._more
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
        if events != client.events:
            client.events = events
            self._epoll.modify(client.sock.fileno(), events)

    def _close(self, client: Client, reason: int) -> None:
        del self._by_number[client.number]
        del self._by_descriptor[client.sock.fileno()]
        self._more.pop(client.number, None)
        self._partial.pop(client.number, None)
        if self._subscribed.pop(client.member, None) is not None:
            self._topics.forget(client.member)
        # taken out by hand: epoll would keep it for as long as the opener's copy is open
        self._epoll.unregister(client.sock.fileno())
        client.sock.close()
        self._opener.send(link.encode_closed(client.number, reason))
