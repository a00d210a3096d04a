"""Who is let in: the stages accept and identify of one connection after the other, and what those hear who are not.

Runs in: opener. An attacker controls how many connections come, how fast, and from how many processes.
"""

from __future__ import annotations

import errno
import resource
import socket
import time

from fdbroker import limits
from fdbroker.errors import QuotaExceeded
from fdbroker.kernel import sockets
from fdbroker.kernel.link import Link
from fdbroker.opener.accept import Acceptor, OutOfDescriptors
from fdbroker.opener.audit import Audit, Record
from fdbroker.opener.authorize import Account, Accounts, Connection, authorize_connection, message_rights
from fdbroker.opener.identify import Identifier
from fdbroker.opener.send import say_refusal
from fdbroker.policy.compiled import Policy
from fdbroker.policy.decide import view
from fdbroker.terms import Subject
from fdbroker.wire import rights
from fdbroker.wire.rights import Sender

_ACCEPTS_PER_TURN = limits.ACCEPTS_PER_TURN
_ACCEPT_PAUSE_S = limits.ACCEPT_PAUSE_MS / 1000
# How often we look whether what an ended connection left unread is gone.
_LINGER_S = 1.0


class Door:
    """Takes the listening socket; borrows the link to the inbox, and puts who is let in into `connections`.

    `policy` is the one that the next connection is judged by.
    """

    def __init__(
        self, listener: socket.socket, inbox: Link, policy: Policy, audit: Audit, connections: dict[int, Connection]
    ) -> None:
        self.policy = policy
        self._acceptor: Acceptor | None = Acceptor(listener)
        self._inbox = inbox
        self._audit = audit
        self._connections = connections
        self._identifier = Identifier()
        self._accounts = Accounts()
        self._last_number = 0
        self._held: tuple[socket.socket, Subject, Account] | None = None  # accepted, not yet handed on
        self._lingering: set[Account] = set()  # whose ended connections have grants unread
        self._linger_at_s = 0.0
        self._paused_until_s = 0.0
        descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._connections_max = descriptors - limits.reserved(descriptors)

    def fileno(self) -> int:
        """For epoll, while it is not `closed`."""
        return -1 if self._acceptor is None else self._acceptor.fileno()

    @property
    def closed(self) -> bool:
        """Whether nobody is let in any more."""
        return self._acceptor is None

    @property
    def holds(self) -> bool:
        """Whether somebody waits for room in the inbox's link; then none must be accepted."""
        return self._held is not None

    def paused(self) -> bool:
        """Whether there are no descriptors for more connections now."""
        if self._paused_until_s and time.monotonic() >= self._paused_until_s:
            self._paused_until_s = 0.0
        return bool(self._paused_until_s)

    @property
    def busy(self) -> bool:
        """Whether `paused` and `sweep` have anything to look at."""
        return bool(self._paused_until_s or self._lingering)

    @property
    def timeout_s(self) -> float:
        """When `paused` and `sweep` must be asked again, -1 for never."""
        if self._paused_until_s:
            return _ACCEPT_PAUSE_S
        return _LINGER_S if self._lingering else -1

    def sweep(self, now_s: float) -> None:
        """Look, from time to time, whether what ended connections left unread is gone."""
        if self._lingering and now_s >= self._linger_at_s:
            self._linger_at_s = now_s + _LINGER_S
            for account in tuple(self._lingering):
                account.count_connections()
                if not account.lingering:
                    self._lingering.discard(account)

    def note_ended(self, account: Account) -> None:
        """A connection of this user has ended."""
        if account.lingering:
            self._lingering.add(account)

    def accept(self) -> None:
        """Let some of those in who wait."""
        if self._acceptor is None:
            return
        for _ in range(_ACCEPTS_PER_TURN):
            try:
                if len(self._connections) + self._count_lingering() >= self._connections_max:
                    self._acceptor.turn_one_away()
                    raise OutOfDescriptors
                sock = self._acceptor.accept()
            except OutOfDescriptors:
                self._pause()
                self._turned_away("accept", None, "no descriptors left")
                return
            if sock is None:
                return
            self._welcome(sock)
            if self._inbox.waiting or self._held:
                return

    def _count_lingering(self) -> int:
        return sum(len(account.lingering) for account in self._lingering)

    def _pause(self) -> None:
        self._paused_until_s = time.monotonic() + _ACCEPT_PAUSE_S

    def _welcome(self, sock: socket.socket) -> None:
        """Identify one client and hand its socket on; `sock` is taken, and closed if the client is turned away."""
        try:
            subject = self._identifier.identify(sock)
            seen = view(self.policy, subject)
            account = self._accounts.of(subject.uid, seen.limits["burst"], time.monotonic())
            authorize_connection(account, seen)
            subject = self._identifier.describe(sock, subject)
        except QuotaExceeded as refusal:
            self._turn_away(sock, refusal, subject)
        except OSError as error:
            # EMFILE, or the kernel does not say who it is: this client alone is refused
            self._turn_away(sock, QuotaExceeded("descriptors", self._connections_max), None, error.strerror or "")
            self._pause()
        else:
            self._hand_on(sock, subject, account)

    def hand_on_held(self) -> None:
        """Try again to hand on who is held, if there is room now."""
        if self._held is not None and not self._inbox.waiting:
            held, self._held = self._held, None
            self._hand_on(*held)

    def _hand_on(self, sock: socket.socket, subject: Subject, account: Account) -> None:
        """Give the inbox its copy; without room in its link the client is held, and none is accepted meanwhile."""
        seen = view(self.policy, subject)
        sender = Sender(subject.uid, subject.gid, subject.pid, subject.session)
        allowed = message_rights(seen, self.policy.topics)
        sockets.let_descriptors(sock, allowed=bool(allowed.send))
        message = rights.encode_connected(self._last_number + 1, sender, allowed)
        try:
            if not self._inbox.send_with_descriptors(message, [sock.fileno()]):
                self._held = (sock, subject, account)
                return
        except OSError as error:
            if error.errno not in (errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM):
                raise
            self._turn_away(sock, QuotaExceeded("descriptors", self._connections_max), subject, error.strerror or "")
            self._pause()
            return
        self._last_number += 1
        self._connections[self._last_number] = Connection(self._last_number, sock, subject, seen, account)

    def _turn_away(self, sock: socket.socket, refusal: QuotaExceeded, subject: Subject | None, why: str = "") -> None:
        """Say the refusal and hang up; takes `sock`."""
        self._turned_away("identify" if subject is None else "accept", subject, why or str(refusal))
        say_refusal(sock, refusal)
        sockets.hang_up(sock)
        sock.close()

    def _turned_away(self, stage: str, subject: Subject | None, reason: str) -> None:
        self._audit.refuse(Record("turned-away", stage, 0, subject, None, reason), time.monotonic())

    def close(self) -> None:
        """Let nobody in any more."""
        if self._acceptor is not None:
            self._acceptor.close()
            self._acceptor = None
        if self._held is not None:
            self._held[0].close()
            self._held = None
        self._paused_until_s = 0.0
