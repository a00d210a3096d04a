"""Stage authorize: the policy and the per-user limits.

Runs in: opener. An attacker controls the asked paths and how often it asks.
"""

from __future__ import annotations

import errno
import socket
from collections import deque
from collections.abc import Mapping, Sequence

from fdbroker import limits
from fdbroker.bucket import Bucket
from fdbroker.kernel import processes, sockets
from fdbroker.pace import Pace
from fdbroker.policy.decide import View, decide
from fdbroker.refusals import ClientNotReading, Denied, LinkViolation, QuotaExceeded, RateLimited
from fdbroker.terms import Resource, Rule, Subject
from fdbroker.wire.link import turned

# The least that a message takes of a socket's queue, beside its bytes: the kernel's struct sk_buff.
_SKB_BYTES = 512
_ACCOUNTS_KEPT = 1024
_DECIDED_CHARACTERS = 256  # of a resource: for longer ones no decision is kept
_LOOK_S = limits.FLIGHT_LOOK_MS / 1000
_BUSY_MS = limits.BUSY_RETRY_MS
_STALL_S = limits.STALL_UNITS * limits.UNIT_US / 1e6
_CLOSING_HELD, _OPENING_HELD = limits.CLOSING_HELD, limits.OPENING_HELD


class Account:
    """What one owner has in use, over all of its connections."""

    __slots__ = (
        *("bucket", "closed", "closing", "connections", "knocking_since_s", "knocks", "lingering"),
        *("maxima", "namespaces", "opening", "pace", "records", "unread", "unread_most", "waiting"),
    )

    def __init__(self, maxima: Mapping[str, int], now_s: float) -> None:
        self.maxima = maxima  # of the connection that came last
        self.connections: set[Connection] = set()
        self.unread: set[Connection] = set()  # those that may have grants unread
        self.unread_most = 0  # so many are unread in these at most, as it was when each was looked at last
        self.lingering: set[Connection] = set()  # ended by us, with grants that the client has not read
        self.namespaces: tuple[int, ...] = ()  # inode numbers of those made for it that may be living
        self.bucket = Bucket(maxima["burst"], now_s)
        self.records = Bucket(maxima["record_burst"], now_s)
        self.pace = Pace(max(maxima["burst"], maxima["connections"]), now_s)
        self.knocks = 0  # that came while others waited, in a second from then on
        self.knocking_since_s = now_s
        self.waiting: deque[socket.socket] = deque()  # accepted, to be let in when the debt is over
        self.opening = 0  # descriptors of requests that a thread is opening
        self.closing = 0  # descriptors that were given to a thread to be closed, and how many of these it has closed
        self.closed = 0

    def count_connections(self, maximum: int = 0) -> int:
        """Connections in use: the open ones, and the ended ones whose unread grants still weigh on us.

        Each ended one is looked at only where the count would be `maximum` or more.
        """
        if len(self.connections) + len(self.lingering) >= maximum:
            for connection in tuple(self.lingering):
                connection.linger()
        return len(self.connections) + len(self.lingering)

    def has_unread(self, above: int) -> bool:
        """Whether more descriptors than that are unread in all connections of the owner: the kernel knows, if need be.

        Never false when it is so.
        """
        if self.unread_most > above:
            for connection in tuple(self.unread):
                connection.unread_grants()
        return self.unread_most > above

    def note_records(self, now_s: float, records: int) -> None:
        """So many records were written that nobody was asked for: of a refusal, or that a grant did not happen."""
        self.records.charge(self.maxima["records_per_second"], self.maxima["record_burst"], now_s, records)

    def is_idle(self, now_s: float) -> bool:
        """Whether nothing would be lost if a new account took this one's place."""
        in_use = self.namespaces or self.waiting or self.opening or self.closing != self.closed
        buckets = (self.bucket, self.records, self.pace)
        return not (in_use or self.count_connections()) and all(one.is_idle(now_s) for one in buckets)

    def note_connect(self, now_s: float, groups: int) -> None:
        """One connection more has been let in, of a process in so many groups."""
        self.pace.spend(1 + groups // limits.GROUPS_PER_CONNECT, *self._rate(), now_s)

    def note_stall(self, now_s: float, took_s: float) -> None:
        """To say something to a client of the owner, or to hang up, took so long: what it waits for with epoll(7)."""
        if took_s > _STALL_S:
            self.pace.spend(int(took_s * self.maxima["requests_per_second"] * limits.STALL_PAUSE), *self._rate(), now_s)

    def offend(self, now_s: float) -> bool:
        """The user broke a rule, or comes again and again; returns whether that costs something for the first time."""
        return self.pace.offend(*self._rate(), now_s)

    def wait_s(self, now_s: float) -> float:
        """In how many seconds the next connection may be let in."""
        return self.pace.wait_s(*self._rate(), now_s)

    def _rate(self) -> tuple[int, int]:
        return self.maxima["requests_per_second"], max(self.maxima["burst"], self.maxima["connections"])


class Flight:
    """All descriptors that were sent and not read: the kernel sends none to anybody at RLIMIT_NOFILE of them.

    A part of `most` is kept for owners of whom none is unread. Source: unix(7), ETOOMANYREFS.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.count = 0  # as it was when each connection was looked at last: never too few
        self.unread: set[Connection] = set()
        self._looked_s = 0.0

    def has_room(self, account: Account, count: int, now_s: float) -> bool:
        """Whether `count` more may be sent to that owner."""
        if self.count + count <= limits.shared(self.most):
            return True
        if now_s - self._looked_s >= _LOOK_S:
            self._looked_s = now_s
            for connection in tuple(self.unread):
                connection.unread_grants()
        most = limits.shared(self.most) if account.has_unread(0) else self.most
        return self.count + count <= most


class Accounts:
    """One account an owner. It outlives the connections, or a new connection would bring a new bucket.

    `flight` is what all of them have in flight.
    """

    def __init__(self, flight_most: int) -> None:
        self.flight = Flight(flight_most)
        self._by_owner: dict[int, Account] = {}

    def known(self, owner: int) -> Account | None:
        """The owner's account, if it was here lately."""
        return self._by_owner.get(owner)

    def of(self, owner: int, maxima: Mapping[str, int], now_s: float) -> Account:
        """The owner's account; `maxima` are its limits now."""
        account = self._by_owner.get(owner)
        if account is None:
            if len(self._by_owner) >= _ACCOUNTS_KEPT:
                self._forget_idle(now_s)
            account = self._by_owner[owner] = Account(maxima, now_s)
        account.maxima = maxima
        return account

    def note_refusal(self, owner: int, now_s: float) -> None:
        """A refusal of that owner has been recorded."""
        account = self._by_owner.get(owner)
        if account is not None:
            account.note_records(now_s, 1)

    def _forget_idle(self, now_s: float) -> None:
        for owner, account in list(self._by_owner.items()):
            if account.is_idle(now_s):
                del self._by_owner[owner]


class Connection:
    """One client: its number, our copy of its socket, and who it is. Owns the socket until `close`."""

    __slots__ = (
        *("_count", "_queued", "_sent", "account", "decided", "flight", "let_in_s", "number", "recorded", "sock"),
        *("state", "subject", "view"),
    )

    def __init__(
        self, number: int, sock: socket.socket, subject: Subject, seen: View, account: Account, flight: Flight
    ) -> None:
        self.number = number
        self.sock = sock
        self.subject = subject
        self.view = seen  # it is judged by
        self.decided: dict[Resource, tuple[Rule, ...]] = {}  # by that view
        self.account = account
        self.state = "idle"  # one of link.STATES
        self.recorded = False  # whether a record of it has been counted
        self.let_in_s = processes.boot_s()
        self._sent: deque[tuple[int, int]] = deque()  # (bytes in the socket's queue, grants) of messages maybe unread
        self._queued = 0  # what was in the socket's queue when we last looked
        self._count = 0  # descriptors that were unread then, or were sent since
        self.flight = flight
        account.connections.add(self)

    def turn(self, event: str) -> None:
        """Something happens on it. Raises LinkViolation when that is out of turn."""
        self.state = turned(self.number, self.state, event)

    def judge_by(self, seen: View, decided: dict[Resource, tuple[Rule, ...]]) -> None:
        """By this view from now on, and what was decided by it lately, for whomever."""
        self.view, self.decided = seen, decided

    def note_sent(self, size: int, grants: int) -> None:
        """A message of `size` bytes with `grants` descriptors has left."""
        before, self._queued = self._queued, sockets.unread_bytes(self.sock)
        # what was read since then makes it look smaller: so more messages count as unread, never fewer
        self._sent.append((max(self._queued - before, size + _SKB_BYTES), grants))
        self._note(self._count + grants)

    def _note(self, unread: int) -> None:
        """So many descriptors are unread now, as far as we know."""
        self.flight.count += unread - self._count
        self.account.unread_most += unread - self._count
        self._count = unread
        if unread:
            self.account.unread.add(self)
            self.flight.unread.add(self)
        else:
            self.account.unread.discard(self)
            self.flight.unread.discard(self)

    def unread_grants(self) -> int:
        """How many descriptors wait unread, never too few: the newest messages that fill the socket's queue."""
        self._queued = queued = sockets.unread_bytes(self.sock)
        unread = 0
        kept: deque[tuple[int, int]] = deque()
        while self._sent and queued > 0:
            size, grants = self._sent.pop()
            kept.appendleft((size, grants))
            queued -= size
            unread += grants
        self._sent = kept
        self._note(unread)
        return unread

    def close(self) -> None:
        """Hang up, for the inbox's copy too, and free what the user had in use.

        What waits unread in the client's queue is memory that counts for this service, and grants in it count as in
        flight, until the client reads or closes its end: for so long the connection lingers, and counts for its owner.
        """
        self.account.connections.discard(self)
        sockets.hang_up(self.sock)
        self.account.lingering.add(self)
        self.linger()

    def release(self) -> socket.socket:
        """The socket, owned by the caller, of a connection that the inbox never had. Raises LinkViolation if it had."""
        if self.unread_grants() or self._queued:
            raise LinkViolation(f"connection {self.number} was answered, and is said never to have come")
        self.account.connections.discard(self)
        return self.sock

    def linger(self) -> None:
        """Close our copy of an ended connection once its client has read everything and no descriptor waits in it.

        The inbox reads those. Bytes alone are not waited for: an inbox without a copy of the socket reads nothing.
        """
        self.unread_grants()
        if not self._queued and sockets.only_bytes_wait(self.sock):
            self.account.lingering.discard(self)
            self.sock.close()


def authorize_connection(account: Account, seen: View) -> None:
    """One connection more for this owner? Raises QuotaExceeded."""
    maximum = seen.limits["connections"]
    if account.count_connections(maximum) >= maximum:
        raise QuotaExceeded("connections", maximum)


def authorize_request(connection: Connection, now_s: float, cost: int = 1) -> None:
    """One request more, of whatever kind, which names `cost` resources? Raises RateLimited."""
    maxima = connection.view.limits
    wait_ms = connection.account.bucket.take(maxima["requests_per_second"], maxima["burst"], now_s, cost)
    if wait_ms:
        raise RateLimited(wait_ms, "rate")


def authorize_presence(connection: Connection, count: int) -> None:
    """Can the client still get `count` descriptors? Raises ConnectionError when it has hung up.

    The inbox lets few requests of an owner wait here, but does not count those of connections that have ended: judging
    them all would delay everybody. A request of one resource costs as little as this question, which it is spared.
    """
    if count > 1 and sockets.has_hung_up(connection.sock):
        raise ConnectionError(errno.EPIPE, "the client has hung up")


def authorize_grants(connection: Connection, count: int, now_s: float) -> None:
    """Whether `count` descriptors may be opened for this client, and sent to it.

    Raises ClientNotReading, QuotaExceeded, or RateLimited when others, or what is not closed yet, leave no room.
    """
    account, maximum = connection.account, connection.view.limits["unread_grants"]
    if account.has_unread(maximum - account.opening - count):
        if connection.unread_grants() >= maximum:
            raise ClientNotReading
        raise QuotaExceeded("unread_grants", maximum)
    if account.closing - account.closed + count > _CLOSING_HELD or account.opening + count > _OPENING_HELD:
        raise RateLimited(_BUSY_MS, "busy")
    if not connection.flight.has_room(account, count, now_s):
        raise RateLimited(_BUSY_MS, "in flight")


def authorize_records(connection: Connection, count: int, now_s: float) -> None:
    """May `count` records be written for this client's owner? Raises RateLimited.

    The first of a connection costs more: who it is takes room in the journal, which keeps equal fields once.
    """
    maxima = connection.view.limits
    if not connection.recorded:
        count += limits.RECORDS_PER_CONNECTION
    wait_ms = connection.account.records.take(maxima["records_per_second"], maxima["record_burst"], now_s, count)
    if wait_ms:
        raise RateLimited(wait_ms, "records")
    connection.recorded = True


def authorize_administrator(connection: Connection) -> None:
    """May this client administer the broker? Raises Denied."""
    if not connection.view.administrator:
        raise Denied("it is no administrator")


def authorize_resources(connection: Connection, resources: Sequence[Resource]) -> list[tuple[Rule, ...]]:
    """The rules that allow each resource, never none. Raises Denied for the first that nothing allows."""
    allowed = []
    for index, resource in enumerate(resources):
        rules = connection.decided.get(resource)
        if rules is None:
            decision = decide(connection.view, resource)
            if not decision.rules:
                by = decision.denied_by
                if by is not None:
                    raise Denied(f"a deny rule for {by.source}", index=index, rule=by.where)
                raise Denied("no rule allows it", index=index)
            rules = decision.rules
            if len(resource.text) <= _DECIDED_CHARACTERS:
                if len(connection.decided) >= limits.KEPT_VALUES:
                    connection.decided.clear()
                connection.decided[resource] = rules
        allowed.append(rules)
    return allowed
