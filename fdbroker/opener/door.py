"""Who is let in: the stages accept and identify of one connection after the other, and what those hear who are not.

Runs in: opener. An attacker controls how many connections come, how fast, and from how many processes.
"""

from __future__ import annotations

import errno
import resource
import socket
import time

from fdbroker import limits
from fdbroker.kernel import sockets
from fdbroker.kernel.link import Link
from fdbroker.kernel.refusal import say_refusal
from fdbroker.opener.accept import Acceptor, OutOfDescriptors
from fdbroker.opener.audit import Audit, Record
from fdbroker.opener.authorize import Account, Accounts, Connection, authorize_connection
from fdbroker.opener.close import Closing
from fdbroker.opener.identify import Identifier, WhoseUnknown
from fdbroker.opener.views import Seen
from fdbroker.policy.decide import View
from fdbroker.policy.views import Views
from fdbroker.refusals import QuotaExceeded
from fdbroker.terms import OTHERS, Subject
from fdbroker.wire import link
from fdbroker.wire.connections import Came

_ACCEPT_PAUSE_S = limits.ACCEPT_PAUSE_MS / 1000
# How often we look whether what an ended connection left unread is gone.
_LINGER_S = 1.0
_FOR_ADMINISTRATORS = limits.FOR_ADMINISTRATORS
_KNOCKS_FREE = limits.KNOCKS_FREE
_WHOSE = "its process has ended, or /proc hides it, and its uid alone does not say whose it is"
_SLOWED = "it connects, or breaks its connections, too often: the next ones wait"


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
        self._connections_max = descriptors - limits.reserved(descriptors)
        # of connections that wait to be closed: the others are left for clients
        self._closing_max = self._connections_max - limits.shared(self._connections_max)
        self._accounts = Accounts(self._connections_max)
        audit.charge = self._accounts.note_refusal
        self.last_number = 0  # of a connection
        self._held: tuple[socket.socket, Subject, Account] | None = None  # accepted, not yet handed on
        self._lingering: set[Account] = set()  # whose ended connections have grants unread
        self._linger_at_s = 0.0
        self._paused_until_s = 0.0
        self._waiting: set[Account] = set()  # whose connections wait to be let in
        self._waiting_count = 0
        self._waiting_until_s = 0.0  # when the first of them may
        self._latest: Account | None = None  # who had work here last
        self._contested_s = -float(limits.CONTEST_SECONDS)  # when another user than before had

    def fileno(self) -> int:
        """For epoll, while it is not `closed`."""
        return -1 if self._acceptor is None else self._acceptor.fileno()

    @property
    def closed(self) -> bool:
        """Whether nobody is let in any more."""
        return self._acceptor is None

    @property
    def holds(self) -> bool:
        """Whether somebody waits for room in the links; then none must be accepted."""
        return self._held is not None

    @property
    def _full(self) -> bool:
        return bool(self._inbox.waiting or self._keeper.waiting)

    def paused(self) -> bool:
        """Whether there are no descriptors for more connections now."""
        if self._paused_until_s and time.monotonic() >= self._paused_until_s:
            self._paused_until_s = 0.0
        return bool(self._paused_until_s)

    @property
    def busy(self) -> bool:
        """Whether `paused` and `sweep` have anything to look at."""
        return bool(self._paused_until_s or self._lingering or self._waiting)

    @property
    def timeout_s(self) -> float:
        """When `paused` and `sweep` must be asked again, -1 for never."""
        if self._waiting and not (self._full or self._held):  # else nobody is let in before there is room
            return min(max(0.0, self._waiting_until_s - time.monotonic()), _LINGER_S)
        if self._paused_until_s:
            return _ACCEPT_PAUSE_S
        return _LINGER_S if self._lingering else -1

    def sweep(self, now_s: float) -> None:
        """Let in whose time has come; look, from time to time, whether what ended connections left unread is gone."""
        if self._waiting and now_s >= self._waiting_until_s and not (self._full or self._held):
            self._let_in(now_s)
        if self._lingering and now_s >= self._linger_at_s:
            self._linger_at_s = now_s + _LINGER_S
            for account in tuple(self._lingering):
                account.count_connections()
                if not account.lingering:
                    self._lingering.discard(account)

    def note_ended(self, account: Account, took_s: float) -> None:
        """A connection of this user has ended, and to hang up took so much of this thread's time."""
        account.note_stall(time.monotonic(), took_s)
        if account.lingering:
            self._lingering.add(account)

    def accept(self) -> None:
        """Let the next of those in who wait: one for each turn, so that requests do not wait for many of them."""
        if self._acceptor is None:
            return
        try:
            if self._closing.waiting >= self._closing_max:
                raise OutOfDescriptors  # and nobody is told, for that could be one more to close
            if self._count() >= self._connections_max:
                self._acceptor.turn_one_away()
                raise OutOfDescriptors
            sock = self._acceptor.accept()
        except OutOfDescriptors:
            self._pause()
            self._turned_away("accept", None, "no descriptors left")
            return
        if sock is not None and not self._must_wait(sock):
            self._welcome(sock)

    def _must_wait(self, sock: socket.socket) -> bool:
        """Whether this client's owner comes too often: then it is taken, and let in later, or turned away.

        Nothing but its uid and owner is asked for before that. Many that come while others wait are an offence each.
        """
        try:
            credentials = sockets.peer_credentials(sock)
            owner = self.identifier.owner(sock, credentials, self.views.policy.owners)
        except WhoseUnknown:
            subject = Subject(credentials.uid, frozenset(), credentials.gid, credentials.pid, "", "", foreign=True)
            self._turn_away(sock, QuotaExceeded("connections", 0), subject, _WHOSE)
            return True
        except OSError:
            return False  # identifying it will fail as well
        account, now_s = self._accounts.known(owner), time.monotonic()
        if account is None:
            return False
        self.note_work(account)
        if not (account.waiting or self._wait_s(account, now_s)):
            return False
        uid, gid, pid = credentials.uid, credentials.gid, credentials.pid
        subject = Subject(uid, frozenset(), gid, pid, "", "", foreign=True, owner=owner)
        if now_s - account.knocking_since_s > limits.DEBT_SECONDS:
            account.knocks, account.knocking_since_s = 0, now_s
        account.knocks += 1
        if account.knocks > _KNOCKS_FREE and account.offend(now_s):
            self._slowed(subject)
        maximum = account.maxima["connections"]
        if len(account.connections) + len(account.waiting) >= maximum:
            refusal = QuotaExceeded("connections", maximum)
            self._turned_away("accept", subject, str(refusal), refusal.cause)
            self._let_go(sock, refusal, owner)
            return True
        account.waiting.append(sock)
        self._waiting_count += 1
        self._waiting.add(account)
        self._waiting_until_s = min(self._wait_s(account, now_s) for account in self._waiting) + now_s
        return True

    def note_work(self, account: Account) -> None:
        """This user has work here: only while several have must any of them wait."""
        if account is not self._latest:
            if self._latest is not None:
                self._contested_s = time.monotonic()
            self._latest = account

    def _wait_s(self, account: Account, now_s: float) -> float:
        return account.wait_s(now_s) if now_s - self._contested_s < limits.CONTEST_SECONDS else 0.0

    def _let_in(self, now_s: float) -> None:
        """One of each user whose debt is over."""
        for account in tuple(self._waiting):
            if self._full or self._held:
                return
            if not self._wait_s(account, now_s):
                self._waiting_count -= 1
                self._welcome(account.waiting.popleft())
            if not account.waiting:
                self._waiting.discard(account)
        self._waiting_until_s = min((self._wait_s(account, now_s) for account in self._waiting), default=0) + now_s

    def note_broken(self, connection: Connection) -> None:
        """The connection ended because its client broke a rule."""
        if connection.account.offend(time.monotonic()):
            self._slowed(connection.subject)

    def _slowed(self, subject: Subject) -> None:
        self._audit.refuse(Record("slowed", "accept", 0, subject, None, _SLOWED), time.monotonic())

    def _count(self) -> int:
        """All connections that have a descriptor here."""
        lingering = sum(len(account.lingering) for account in self._lingering)
        return len(self._connections) + self._waiting_count + lingering + self._closing.waiting

    def _authorize(self, account: Account, subject: Subject, seen: View) -> None:
        """One connection more? The last ones are for owners without any, the very last ones for administrators.

        Raises QuotaExceeded.
        """
        authorize_connection(account, seen)
        left = self._connections_max - self._count()
        if left <= _FOR_ADMINISTRATORS:
            free = self.views.of(subject._replace(foreign=False)).view.administrator
        else:
            free = (
                left > self._connections_max - limits.shared(self._connections_max) or not account.count_connections()
            )
        if not free:
            raise QuotaExceeded("descriptors", self._connections_max)

    def _pause(self) -> None:
        self._paused_until_s = time.monotonic() + _ACCEPT_PAUSE_S

    def _welcome(self, sock: socket.socket) -> None:
        """Identify one client and hand its socket on; `sock` is taken, and closed if the client is turned away."""
        try:
            subject = self.identifier.identify(sock, self.views.policy.owners)
            seen = self.views.of(subject).view
            now_s = time.monotonic()
            account = self._accounts.of(subject.owner, seen.limits, now_s)
            account.note_connect(now_s, len(subject.gids))
            self.note_work(account)
            self._authorize(account, subject, seen)
            subject = self.identifier.describe(sock, subject)
        except QuotaExceeded as refusal:
            self._turn_away(sock, refusal, subject)
        except WhoseUnknown:
            self._turn_away(sock, QuotaExceeded("connections", 0), None, _WHOSE)
        except OSError as error:
            # EMFILE, or the kernel does not say who it is: this client alone is refused
            self._turn_away(sock, QuotaExceeded("descriptors", self._connections_max), None, error.strerror or "")
            self._pause()
        else:
            self._hand_on(sock, subject, account)

    def hand_on_held(self) -> None:
        """Try again to hand on who is held, if there is room now."""
        if self._held is not None and not self._full:
            held, self._held = self._held, None
            self._hand_on(*held)

    def _hand_on(self, sock: socket.socket, subject: Subject, account: Account) -> None:
        """Tell the keeper who came, and give the inbox its copy, in this order.

        Without room in their links the client is held, and told of again later; none is accepted meanwhile.
        """
        seen, decided = self.views.of(subject)
        sockets.hear_urgent(sock)
        message = came(self.last_number + 1, subject, self.views)
        self._keeper.send(message)
        try:
            if self._keeper.waiting or not self._inbox.send_with_descriptors(message, [sock.fileno()]):
                self._held = (sock, subject, account)
                return
        except OSError as error:
            if error.errno not in (errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM):
                raise
            self._turn_away(sock, QuotaExceeded("descriptors", self._connections_max), subject, error.strerror or "")
            self._pause()
            return
        self.last_number += 1
        connection = Connection(self.last_number, sock, subject, seen, account, self._accounts.flight)
        connection.judge_by(seen, decided)
        self._connections[self.last_number] = connection

    def _turn_away(self, sock: socket.socket, refusal: QuotaExceeded, subject: Subject | None, why: str = "") -> None:
        """Say the refusal and hang up; takes `sock`."""
        stage = "identify" if subject is None else "accept"
        self._turned_away(stage, subject, why or str(refusal), refusal.cause)
        self._let_go(sock, refusal, OTHERS if subject is None else subject.owner)

    def _let_go(self, sock: socket.socket, refusal: QuotaExceeded, owner: int) -> None:
        """Say the refusal and hang up, which wakes all who wait for that socket: how long it takes counts."""
        began_s = time.thread_time()
        say_refusal(sock, refusal)
        self._closing.hang_up(sock, owner)
        account = self._accounts.known(owner)
        if account is not None:
            account.note_stall(time.monotonic(), time.thread_time() - began_s)

    def _turned_away(self, stage: str, subject: Subject | None, reason: str, cause: str = "limit descriptors") -> None:
        self._audit.refuse(Record("turned-away", stage, 0, subject, None, reason, cause=cause), time.monotonic())

    def close(self) -> None:
        """Let nobody in any more."""
        if self._acceptor is not None:
            self._acceptor.close()
            self._acceptor = None
        if self._held is not None:
            self._closing.hang_up(self._held[0], self._held[1].owner)
            self._held = None
        for account in self._waiting:
            while account.waiting:
                self._closing.hang_up(account.waiting.pop(), OTHERS)  # by whichever thread: nobody waits for it
        self._waiting.clear()
        self._paused_until_s = 0.0


def came(number: int, subject: Subject, views: Views[Seen]) -> bytes:
    """What keeper and inbox are told of a connection."""
    return link.OPENER_TO_INBOX.encode(Came.of(number, subject, views.groups(subject)))
