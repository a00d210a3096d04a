"""The clients of the inbox: what each sends, what it is owed, and when its connection ends.

Runs in: inbox, without any right. An attacker controls what clients send, when, and whether they read.

While a question is with the opener, nothing is written to that client and none of its further messages is looked at:
so answers keep the order of the requests, and opener and inbox never write at the same time.
"""

from __future__ import annotations

import errno
import select
from collections.abc import Iterable

from fdbroker.errors import ProtocolViolation
from fdbroker.inbox import dispatch
from fdbroker.inbox.attached import Unread
from fdbroker.inbox.client import BROKE, DEAF, ENDED, FOREIGN, SLOW, Client
from fdbroker.inbox.deadlines import Deadlines
from fdbroker.inbox.memory import Memory
from fdbroker.inbox.messages import Messages
from fdbroker.inbox.receive import READ_BYTES, Receiver
from fdbroker.inbox.topics import Topics
from fdbroker.inbox.turns import Turns, timed
from fdbroker.kernel.jobs import Jobs
from fdbroker.kernel.link import Link
from fdbroker.limits import opener as limits
from fdbroker.limits.inbox import BYTES_PER_UNIT, UNITS_PER_RESOURCE
from fdbroker.policy.compiled import Policy
from fdbroker.wire import admin, frame, link, lists
from fdbroker.wire.frame import TooLong

# After these nothing may be asked any more: what a client sends then ends its connection.
_LAST = ("watching", "subscribed")
_to_opener = link.INBOX_TO_OPENER.encode
_BYTES_PER_UNIT, _UNITS_PER_RESOURCE = BYTES_PER_UNIT, UNITS_PER_RESOURCE


class Clients:
    """All clients; borrows the links to opener and keeper, whom it asks for them. `unit_s`: how long a unit takes."""

    _policy: Policy  # in force

    def __init__(self, opener: Link, keeper: Link, topics: Topics, unit_s: float) -> None:
        self._opener = opener
        self._keeper = keeper
        self._topics = topics
        closing = Jobs(limits.CLOSING_THREADS, limits.STUCK_THREADS)
        self._receiver = Receiver(closing)
        self._unread = Unread(closing)
        self.turns = Turns(unit_s)
        self._messages = Messages(topics, keeper, self._unread, self.turns)
        self._by_number: dict[int, Client] = {}
        self._by_descriptor: dict[int, Client] = {}
        self._deadlines = Deadlines()
        self._memory = Memory()
        self._more: dict[int, Client] = {}  # whose whole messages wait for the next turn
        self.draining = False  # told to take nothing more
        self._epoll = select.epoll()

    @timed
    def _end_turn(self, client: Client, event: str) -> None:
        client.turn(event)
        client.asked = ()
        self._look(client)

    def _look(self, client: Client) -> None:
        """Go on with a client that has come, or has its answer: mostly it has asked already, before epoll tells so."""
        done = self._is_quiet(client) and not client.decoder.held and not self.draining
        if done and self.turns.may_work(client.user):
            self._read(client)
        else:
            self._work(client)

    _look_timed = timed(_look)

    def _answered(self, client: Client) -> None:
        """The opener needs to answer this one no more: another of the same user may ask, later in this turn.

        Not now: what that one asks can end it, while somebody goes through the connections and closes this one.
        """
        after = self.turns.answered(client.user, client)
        if after is not None:
            self._more[after.number] = after

    def _go_on(self, clients: Iterable[Client]) -> None:
        for client in clients:
            if client.number in self._by_number:
                self._work_timed(client)

    def _end_slow(self) -> None:
        """Disconnect clients whose message is not complete in time, or that do not take their answers."""
        for number in self._deadlines.unsent():
            self._close(self._by_number[number], DEAF)
        for number in self._deadlines.partial():
            client = self._by_number[number]
            if number not in client.user.held and not self._receiver.peek(client):
                self._close(client, SLOW)
            self._deadlines.completed(number)  # else it is we who do not read, and the rest has its time anew
        for number in self._deadlines.attached():  # also of who rests
            self._close(self._by_number[number], SLOW)

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
            if self._is_quiet(client) and not client.ended:
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

    def _is_quiet(self, client: Client) -> bool:
        """Whether nothing is owed to it, and nothing that it sent before is still to be done."""
        number, done = client.number, client.state == "idle" and client.question is None and not client.out
        return done and number not in self._more and number not in self._messages.unsaid

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
            self._settle(client)
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
            while client.decoder.held or client.question is not None:
                if not self.turns.may_work(client.user):
                    waiting = client.user.held if client.user.rests_until_s else self._more
                    waiting[client.number] = client
                    break
                if client.state != "idle" or client.doomed or client.number in self._messages.unsaid:
                    break
                if client.question is None and not self._take(client):
                    break
                if client.question is not None and not self._put(client):
                    break
                if len(client.out) > READ_BYTES and not self._send(client):
                    break
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
        self._deadlines.completed(client.number, attached=attached is not None)
        dispatched = dispatch.dispatch_frame if client.decoder.framed else dispatch.dispatch_varlink
        action = dispatched(message, attached)
        match action:
            case dispatch.Answer(data):
                client.answer(data)
            case dispatch.AskOpen(resources):
                self.turns.work(client.user, len(resources) * _UNITS_PER_RESOURCE)
                client.question = action
            case dispatch.Publish():
                self._messages.publish(client, action, attached)
            case dispatch.TellAbout():
                client.answer(dispatch.about_reply(self._policy))
            case dispatch.Receive(_, acknowledge):
                self.turns.work(client.user, len(acknowledge))
                client.question = action
            case _:
                client.question = action
        self.turns.work(client.user, dispatch.units(message))
        return True

    def _put(self, client: Client) -> bool:
        """Put the question, mostly to the opener, once all answers before it are sent; false when they are not."""
        asked = client.question
        if asked is None or client.uncommitted or (client.out and not self._send(client)):
            return False
        if asked.weight and not self.turns.may_ask(client.user, client, asked.weight):
            return False
        client.question = None
        match asked:
            case dispatch.AskOpen(resources):
                client.asked = resources
                self._ask(client, "Open", link.Open(client.number, resources))
            case dispatch.Subscribe(topics, after):
                self._messages.subscribe(client, topics, after)
            case dispatch.Receive():
                self._messages.receive(client, asked)
            case dispatch.AskReload():
                self._ask(client, "Reload", admin.Reload(client.number))
            case dispatch.AskShutdown() if self.draining:
                client.doomed = True  # it stops already
            case dispatch.AskShutdown():
                self._ask(client, "Shutdown", link.Shutdown(client.number))
            case dispatch.AskList(watch):
                client.turn("Watch" if watch else "List")
                self._keeper.send(lists.INBOX_TO_KEEPER.encode(lists.List(client.number, watch)))
        if client.state in _LAST and client.decoder.held:  # that was its last request, and another one came with it
            client.doomed, client.reason = True, BROKE
        return True

    def _ask(self, client: Client, event: str, message: link.FromInbox) -> None:
        client.turn(event)
        self._opener.send(_to_opener(message))

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
        last = client.state in _LAST
        idle = sent and self._is_quiet(client) and client.number not in client.user.held
        if (idle and (client.doomed or client.ended or self.draining)) or (last and client.doomed):
            self._close(client, client.reason)
            return
        size = len(client.out) + client.member.queued_bytes + client.decoder.held
        if size or client.number in self._memory.waiting:
            if self._memory.is_too_much(client.user.owner, client.number, size):
                self._close(client, DEAF)
                return
            partial, unsent = idle and client.decoder.held > 0, bool(client.out) and not last
            attached = client.decoder.has_attached
            self._deadlines.note(client.number, unsent=unsent, partial=partial, attached=attached)
        # not while the opener is asked: what comes then would wake us for nothing, mostly just before the outcome
        readable = idle or last or (client.state == "idle" and bool(client.events & select.EPOLLIN))
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
