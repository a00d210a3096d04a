"""Who is let in: the stages accept and identify of one connection after the other, and what those hear who are not.

Runs in: opener. An attacker controls how many connections come, how fast, and from how many processes. A taken-over
keeper controls when a connection may come in; neither how many an owner has, nor anybody's identity.
"""

from __future__ import annotations

import errno
import resource
import socket
import time
from typing import assert_never

from fdbroker.kernel import sockets
from fdbroker.kernel.link import Link
from fdbroker.kernel.refusal import say_refusal
from fdbroker.limits import opener as limits
from fdbroker.opener.accept import Acceptor, OutOfDescriptors
from fdbroker.opener.audit import Audit
from fdbroker.opener.authorize import Accounts, Connection, authorize_connection
from fdbroker.opener.close import Closing
from fdbroker.opener.identify import Identifier, WhoseUnknown
from fdbroker.opener.views import Seen
from fdbroker.policy.views import Views
from fdbroker.refusals import LinkViolation, QuotaExceeded
from fdbroker.terms import OTHERS, Subject
from fdbroker.wire import keeper, link
from fdbroker.wire.audit import Record
from fdbroker.wire.connections import Came

_ACCEPT_PAUSE_S = limits.ACCEPT_PAUSE_MS / 1000
# How often we look whether what an ended connection left unread is gone, and whether who waits has.
_LINGER_S = 1.0
_STALL_S = limits.STALL_UNITS * limits.UNIT_US / 1e6
# The keeper hears that several owners have work so often that it counts all the time.
_CONTEST_S = limits.CONTEST_SECONDS / 4
# At most so many accepted connections await the keeper's answer, which one message wakes for all of them. Each may be
# slow to close, if it is turned away.
_KNOCKING = 32
_WHOSE = "its process has ended, or /proc hides it, and its uid alone does not say whose it is"
_to_keeper = keeper.OPENER_TO_KEEPER.encode


class Door:
    """Takes the listening socket; borrows the links to inbox and keeper; puts who is let in into `connections`.

    `views` are those of the policy that the next connection is judged by.
    """

    def __init__(
        self,
        listener: socket.socket,
        inbox: Link,
        to_keeper: Link,
        views: Views[Seen],
        audit: Audit,
        connections: dict[int, Connection],
        closing: Closing,
    ) -> None:
        self.views = views
        self._closing = closing
        self._acceptor: Acceptor | None = Acceptor(listener, closing)
        self._inbox = inbox
        self._keeper = to_keeper
        self._audit = audit
        self._connections = connections
        self.identifier = Identifier()
        descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        reserved = limits.reserved(descriptors)
        self._connections_max = descriptors - reserved
        # of connections that wait to be closed: the others are left for clients
        self._closing_max = self._connections_max - limits.shared(self._connections_max)
        self.accounts = Accounts(self._connections_max, reserved)
        self.last_number = 0  # of a connection
        self._knocking: dict[int, tuple[socket.socket, Subject]] = {}  # accepted; the keeper has not answered yet
        self._waiting: dict[int, tuple[socket.socket, Subject]] = {}  # it has: they are to wait
        self._held: tuple[int, socket.socket, Subject] | None = None  # let in, not yet handed on
        self._lingering: dict[int, set[Connection]] = {}  # by owner: ended connections that have grants unread
        self._linger_at_s = 0.0
        self._paused_until_s = 0.0
        self._latest: int | None = None  # the owner who had work here last
        self._contested_s = 0.0  # when another one than before had, as the keeper knows

    def fileno(self) -> int:
        """For epoll, while it is not `closed`."""
        return -1 if self._acceptor is None else self._acceptor.fileno()

    @property
    def closed(self) -> bool:
        """Whether nobody is let in any more."""
        return self._acceptor is None

    @property
    def holds(self) -> bool:
        """Whether somebody waits for room in the inbox's link; then nobody else can be let in."""
        return self._held is not None

    @property
    def knocks(self) -> bool:
        """Whether the keeper has so many to answer that no more are to be accepted."""
        return len(self._knocking) >= _KNOCKING

    @property
    def paused(self) -> bool:
        """Whether there are no descriptors for more connections now: then nobody is accepted, let in or turned away."""
        return bool(self._paused_until_s)

    @property
    def busy(self) -> bool:
        """Whether somebody is held, as many knock as may, or `sweep` has anything to look at."""
        return bool(self._held or self.knocks or self._closing.waiting or self.timeout_s >= 0)

    @property
    def timeout_s(self) -> float:
        """When `sweep` must be asked again, -1 for never."""
        if self._paused_until_s:
            return _ACCEPT_PAUSE_S
        return _LINGER_S if self._lingering or self._waiting else -1

    def sweep(self, now_s: float) -> None:
        """Look whether there are descriptors again and, from time to time, what of all that we keep is gone."""
        if now_s >= self._paused_until_s:
            self._paused_until_s = 0.0
            if self._closing.waiting >= self._closing_max:
                # and nobody who waits is told, for that could be one more to close
                self._no_descriptors("too many connections wait to be closed")
        if (self._lingering or self._waiting) and now_s >= self._linger_at_s:
            self._linger_at_s = now_s + _LINGER_S
            for number, (sock, _) in self._waiting.items():
                if sockets.hung_up(sock):
                    self._keeper.send(_to_keeper(keeper.HungUp(number)))
            for owner in tuple(self._lingering):
                self._look(owner)

    def note_work(self, owner: int) -> None:
        """This owner has work here: only while several have must any of them wait, and the keeper hears of it."""
        if owner != self._latest:
            now_s = time.monotonic()
            if self._latest is not None and now_s - self._contested_s >= _CONTEST_S:
                self._contested_s = now_s
                self._keeper.send(_to_keeper(keeper.Contested()))
            self._latest = owner

    # ---- in

    def accept(self) -> None:
        """Take the next of those in who wait: one for each turn, so that requests do not wait for many of them."""
        if self._acceptor is None:
            return
        try:
            if self._left() <= len(self._knocking):
                self._acceptor.turn_one_away()
                raise OutOfDescriptors
            sock = self._acceptor.accept()
        except OutOfDescriptors:
            self._no_descriptors()
        else:
            if sock is not None:
                self._knock(sock)

    def _knock(self, sock: socket.socket) -> None:
        """Ask the keeper when this client may come in; nothing but its uid and owner is looked at before that."""
        self.last_number += 1
        try:
            subject = self.identifier.arrived(sock, self.views.policy.owners)
        except WhoseUnknown as unknown:
            (subject,) = unknown.args
            self._turn_away(self.last_number, sock, QuotaExceeded("connections", 0), subject, _WHOSE)
        except OSError as error:
            self._unidentified(self.last_number, sock, error)
        else:
            self.note_work(subject.owner)
            self._knocking[self.last_number] = sock, subject
            knock = keeper.Knock(self.last_number, subject.uid, subject.gid, subject.pid, subject.owner)
            self._keeper.send(_to_keeper(knock))

    def answered(self, said: keeper.LetIn | keeper.Waits | keeper.TurnAway) -> None:
        """What the keeper says of who knocks, or waits. Raises LinkViolation when that one does not.

        Of those who wait it turns nobody away but who has hung up.
        """
        if self.closed:
            return  # all have been turned away
        number = said.connection
        waited = number in self._waiting
        here = self._waiting if waited else self._knocking
        who = here.get(number)
        if who is not None and waited and not isinstance(said, keeper.LetIn):
            who = who if isinstance(said, keeper.TurnAway) and sockets.hung_up(who[0]) else None
        if who is None:
            raise LinkViolation(f"{type(said).__name__} of connection {number}, which does not wait for that")
        del here[number]
        match said:
            case keeper.LetIn():
                self._welcome(number, *who)
            case keeper.Waits():
                self._waiting[number] = who
            case keeper.TurnAway() if waited:
                self._closing.hang_up(who[0], who[1].owner)
            case keeper.TurnAway():
                self._turn_away(number, who[0], QuotaExceeded("connections", said.maximum), who[1])
            case other:
                assert_never(other)

    def _welcome(self, number: int, sock: socket.socket, subject: Subject) -> None:
        """Identify one client and hand its socket on; `sock` is taken, and closed if the client is turned away."""
        try:
            subject = self.identifier.identify(sock, subject)
            if len(subject.gids) >= limits.GROUPS_PER_CONNECT:
                weight = len(subject.gids) // limits.GROUPS_PER_CONNECT
                self._keeper.send(_to_keeper(keeper.Weighs(number, weight)))
            seen = self.views.of(subject._replace(foreign=False))
            account = self.accounts.of(subject.owner, seen.limits, time.monotonic())
            if len(account.connections) >= seen.limits["connections"]:  # but for those that have been read meanwhile
                self._look(subject.owner)
            authorize_connection(seen, account, self._left(), self._connections_max)
            subject = self.identifier.describe(sock, subject)
        except QuotaExceeded as refusal:
            self._turn_away(number, sock, refusal, subject)
        except OSError as error:
            self._unidentified(number, sock, error)
        else:
            self._hand_on(number, sock, subject)

    def hand_on_held(self) -> None:
        """Try again to hand on who is held, if there is room now."""
        if self._held is not None and not self._inbox.waiting:
            held, self._held = self._held, None
            self._hand_on(*held)

    def _hand_on(self, number: int, sock: socket.socket, subject: Subject) -> None:
        """Tell the keeper who came, and give the inbox its copy, in this order.

        Without room in the inbox's link the client is held, and told of again later; none is let in meanwhile.
        """
        seen = self.views.of(subject)
        sockets.hear_urgent(sock)
        message = came(number, subject, self.views)
        self._keeper.send(message)
        try:
            if not self._inbox.send_with_descriptors(message, [sock.fileno()]):
                self._held = number, sock, subject
                return
        except OSError as error:
            if error.errno not in (errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM):
                raise
            self._unidentified(number, sock, error, subject)
            return
        account = self.accounts.of(subject.owner, seen.limits, time.monotonic())
        self._connections[number] = Connection(number, sock, subject, seen, account, self.accounts.flight)

    def _left(self) -> int:
        """How many connections more there are descriptors for. Those that knock are not counted; `accept` does that."""
        ended = sum(map(len, self._lingering.values())) + self._closing.waiting
        return self._connections_max - len(self._connections) - len(self._waiting) - ended

    def _no_descriptors(self, why: str = "no descriptors left") -> None:
        self._paused_until_s = time.monotonic() + _ACCEPT_PAUSE_S
        self._turned_away("accept", None, why)

    # ---- out

    def end(self, connection: Connection, *, never_taken: bool) -> None:
        """The inbox has closed its copy, if it was not `never_taken`. What waits unread still counts for the owner."""
        number, owner = connection.number, connection.subject.owner
        if never_taken:
            self._closing.hang_up(connection.release(), owner)
        else:
            began_s = time.thread_time()
            connection.close()
            self._note_stall(owner, time.thread_time() - began_s)
            if connection.lingers():
                self._lingering.setdefault(owner, set()).add(connection)
                self._keeper.send(_to_keeper(keeper.Lingers(number)))
                return
        self._keeper.send(_to_keeper(keeper.Ended(number)))

    def _look(self, owner: int) -> None:
        """Let go of those ended connections of that owner in which nothing is unread any more."""
        here = self._lingering.get(owner, set())
        for connection in [one for one in here if not one.lingers()]:
            here.discard(connection)
            self._keeper.send(_to_keeper(keeper.Ended(connection.number)))
        if not here:
            self._lingering.pop(owner, None)

    def _note_stall(self, owner: int, took_s: float) -> None:
        """So much of this thread's time it took to say something to a client of that owner, or to hang up."""
        if took_s > _STALL_S:
            self._keeper.send(_to_keeper(keeper.Stalled(owner, int(took_s * 1e6))))

    def _unidentified(self, number: int, sock: socket.socket, error: OSError, subject: Subject | None = None) -> None:
        """EMFILE, or the kernel does not say who it is: this client alone is refused."""
        refusal = QuotaExceeded("descriptors", self._connections_max)
        self._turn_away(number, sock, refusal, subject, error.strerror or "")
        self._paused_until_s = time.monotonic() + _ACCEPT_PAUSE_S

    def _turn_away(
        self, number: int, sock: socket.socket, refusal: QuotaExceeded, subject: Subject | None, why: str = ""
    ) -> None:
        """Say the refusal and hang up, which wakes all who wait for that socket; takes `sock`."""
        self._turned_away("identify" if subject is None else "accept", subject, why or str(refusal), refusal.cause)
        owner, began_s = OTHERS if subject is None else subject.owner, time.thread_time()
        say_refusal(sock, refusal)
        self._closing.hang_up(sock, owner)
        self._note_stall(owner, time.thread_time() - began_s)
        self._keeper.send(_to_keeper(keeper.Ended(number)))

    def _turned_away(self, stage: str, subject: Subject | None, reason: str, cause: str = "limit descriptors") -> None:
        self._audit.refuse(Record("turned-away", stage, 0, subject, reason, cause))

    def close(self) -> None:
        """Let nobody in any more."""
        if self._acceptor is not None:
            self._acceptor.close()
            self._acceptor = None
        if self._held is not None:
            self._closing.hang_up(self._held[1], self._held[2].owner)
            self._held = None
        for waiting in (self._knocking, self._waiting):
            while waiting:
                self._closing.hang_up(waiting.popitem()[1][0], OTHERS)  # the service ends: the owner does not matter
        self._paused_until_s = 0.0


def came(number: int, subject: Subject, views: Views[Seen]) -> bytes:
    """What keeper and inbox are told of a connection."""
    return link.OPENER_TO_INBOX.encode(Came.of(number, subject, views.groups(subject)))
