"""One connection of the inbox: what has come of it, what is owed to it, in what state it is; and its user.

Runs in: inbox. An attacker controls what is in `decoder`, and whether `out` is ever read.
"""

from __future__ import annotations

import errno
import re
import select
import socket
from collections import deque
from collections.abc import Sequence

from fdbroker.errors import ClientNotReading, Refused
from fdbroker.inbox import dispatch
from fdbroker.inbox.attached import Attached, Unread
from fdbroker.inbox.decode import Decoder
from fdbroker.inbox.member import BEGIN, Member
from fdbroker.inbox.rights import Rights, Sender
from fdbroker.kernel import sockets
from fdbroker.limits import inbox as limits
from fdbroker.offers import Offer
from fdbroker.pace import Pace
from fdbroker.terms import Resource
from fdbroker.wire import link, lists

_UNITS_PER_REQUEST = limits.UNITS_PER_REQUEST
_LOST = re.compile(re.escape(BEGIN) + rb'"lost":([0-9]+),')  # as Member.take says it
# The kernel sends no descriptor of ours now, to nobody; or none to this client, who wants none (SO_PASSRIGHTS).
_NO_DESCRIPTORS = errno.ETOOMANYREFS, errno.EPERM
ENDED, BROKE, FOREIGN, SLOW, DEAF, NOT_TAKEN = range(len(link.CLOSED_REASONS))


class User:
    """One user, over all its connections: what is left of its budget, and which of them wait for its turn."""

    __slots__ = (
        "asked",
        "clients",
        "forgiven_s",
        "held",
        "owed",
        "owner",
        "pace",
        "quiet_until_s",
        "rate",
        "rests",
        "rests_until_s",
        "size",
        "stalled_s",
        "used",
        "waiting",
    )

    def __init__(self, owner: int, allowed: Rights, now_s: float) -> None:
        self.owner = owner
        self.allow(allowed)
        self.pace = Pace(self.size, now_s)
        self.clients = 0
        self.used = 0  # units of work, in this turn
        self.owed = 0  # units that are not yet taken from the budget
        self.rests_until_s = 0.0  # 0 while it does not rest
        self.stalled_s = 0.0  # what took longest of all that nobody could come between, since the last rest
        self.rests = 0  # how often it had to, each time twice as long, until that is forgiven
        self.forgiven_s = 0.0
        self.held: dict[int, Client] = {}  # that have something to read, or to do, when the rest is over
        self.asked = 0  # resources that the opener is being asked for
        self.waiting: dict[int, Client] = {}  # whose question comes when those are answered
        self.quiet_until_s = 0.0  # nobody is told again that it rests

    def allow(self, allowed: Rights) -> None:
        """The budget is as large as the policy's limits for this user make it."""
        self.rate = allowed.messages_per_second * _UNITS_PER_REQUEST
        self.size = allowed.burst * _UNITS_PER_REQUEST


class Client:
    """One connection: our copy of its socket, who it is (and all its messages must come from), what waits.

    `state` is one of lists.STATES. `uncommitted` are the answers from the first on that must wait for a
    commit: None for a message that is said to be stored, Receive for what its client then gets.
    """

    __slots__ = (
        "asked",
        "asking",
        "attached",
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
        "uncommitted",
        "user",
    )

    def __init__(self, number: int, sender: Sender, sock: socket.socket, user: User) -> None:
        self.number = number
        self.uid = sender.uid
        self.user = user
        self.member = Member(sender)
        self.sock = sock
        self.decoder = Decoder()
        self.state = "idle"
        self.question: dispatch.Question | None = None  # to put once `out` is sent
        self.asked: Sequence[Resource] = ()
        self.asking = 0  # what it counts for among the user's questions that are with the opener
        self.offers: list[Offer] = []
        self.out = bytearray()
        self.attached: deque[tuple[int, Attached]] = deque()  # what goes with which byte of `out`
        self.uncommitted: list[bytes | dispatch.Receive | None] = []
        self.events = 0  # that epoll tells of
        self.ended = False  # it sends no more
        self.doomed = False  # close once all is sent
        self.reason = ENDED  # why it will be closed

    def turn(self, event: str) -> None:
        """Something happens on it. Raises LinkViolation when that is out of turn: the opener breaks its rules."""
        self.state = lists.turned(self.number, self.state, event)

    def lose(self) -> None:
        """It is gone: nothing more is sent."""
        self.doomed = True
        self.out.clear()
        self.attached.clear()

    def refuse(self, refusal: Refused) -> None:
        """What it asked for last is refused."""
        self.out += self.refused(refusal)
        self.doomed |= isinstance(refusal, ClientNotReading)

    def wait(self, epoll: select.epoll, *, readable: bool) -> None:
        """Have `epoll` tell what can come next; of a client that rests only, and once, that it has hung up."""
        events = (select.EPOLLIN if readable else 0) | (select.EPOLLOUT if self.out else 0)
        if self.number in self.user.held:
            events = events & ~select.EPOLLIN | select.EPOLLET
        if events != self.events:
            self.events = events
            epoll.modify(self.sock.fileno(), events)

    @property
    def sent(self) -> bytes:
        """The answer to a message that every handler has."""
        return dispatch.SENT[not self.decoder.framed]

    def message_refused(self, refusal: Refused) -> bytes:
        """The answer to a message, or a subscription, that was refused."""
        return dispatch.message_refused(refusal, framed=self.decoder.framed)

    def refused(self, refusal: Refused) -> bytes:
        """The answer when the opener refuses."""
        if self.decoder.framed:
            return dispatch.refusal_status(refusal)
        if self.state == "reloading":
            return dispatch.reload_refused(refusal)
        return dispatch.refusal_reply(refusal, self.asked)

    def push(self, data: bytes, attached: Attached | None) -> None:
        """Bytes to be sent behind all others, and descriptors with the first of them."""
        if attached is not None:
            self.attached.append((len(self.out), attached))
        self.out += data

    def let_go(self) -> None:
        """Of all descriptors that wait here: it is over, and who knows what still refers to this object."""
        self.decoder = Decoder()
        self.attached.clear()
        self.member.queue.clear()

    def shed(self) -> None:
        """Lose the messages whose descriptors could not be sent at once: they count for who sent them."""
        for at, _ in reversed(self.attached):
            end = self.out.index(0, at) + 1
            told = _LOST.match(self.out[at:end])  # of those before it
            self.member.lost += 1 + (int(told[1]) if told else 0)
            del self.out[at:end]  # nothing of it is sent, for they go with its first byte
        self.attached.clear()
        self.member.shed()

    def count_attached(self) -> int:
        """How many descriptors are still to be sent."""
        return sum(len(one.numbers) for _, one in self.attached)

    def fill(self, unread: Unread) -> None:
        """Have all that waits for a subscriber sent."""
        for data, attached in self.member.take(
            lambda count: unread.may_send(self.user.owner, self.sock, count + self.count_attached())
        ):
            self.push(data, attached)

    def send(self, unread: Unread) -> None:
        """Send what there is room for. Raises BlockingIOError when there is none, OSError when the client is gone."""
        if not self.attached:
            del self.out[: self.sock.send(self.out, sockets.SEND)]
            return
        while self.out:
            numbers: tuple[int, ...] = ()
            end = len(self.out)
            if self.attached and self.attached[0][0] == 0:
                numbers = self.attached[0][1].numbers
                end = self.attached[1][0] if len(self.attached) > 1 else end
            elif self.attached:
                end = self.attached[0][0]
            try:
                sent = sockets.send(self.sock, self.out if end == len(self.out) else self.out[:end], numbers)
            except OSError as error:
                if not numbers or error.errno not in _NO_DESCRIPTORS:
                    raise
                self.shed()
                continue
            if numbers:
                unread.add(self.user.owner, self.sock, len(numbers))
                self.attached.popleft()
            del self.out[:sent]
            if self.attached:
                self.attached = deque((at - sent, one) for at, one in self.attached)
            elif self.out:
                return  # the socket took what it could

    def answer(self, data: bytes | dispatch.Receive | None) -> None:
        """Put an answer behind those before it; what is not bytes begins to wait for a commit."""
        if self.uncommitted or not isinstance(data, bytes):
            self.uncommitted.append(data)
        else:
            self.out += data
