"""Stage authorize: the policy and the per-user limits.

Runs in: opener. An attacker controls the asked paths and how often it asks.
"""

from __future__ import annotations

import errno
import socket
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import islice

from fdbroker.bucket import Bucket
from fdbroker.kernel import processes, sockets
from fdbroker.limits import opener as limits
from fdbroker.opener.views import Permit, Seen
from fdbroker.policy.decide import View, decide
from fdbroker.refusals import ClientNotReading, Denied, LinkViolation, QuotaExceeded, RateLimited
from fdbroker.terms import Resource, Subject
from fdbroker.wire.link import turned

# The least that a message takes of a socket's queue, beside its bytes: the kernel's struct sk_buff.
_SKB_BYTES = 512
_ACCOUNTS_KEPT = 1024
_KEPT_CHARACTERS = 256  # of a resource: for longer ones no permit is kept
_LOOK_S = limits.FLIGHT_LOOK_MS / 1000
_BUSY_MS = limits.BUSY_RETRY_MS
_CLOSING_HELD, _OPENING_HELD = limits.CLOSING_HELD, limits.OPENING_HELD


class Account:
    """What one owner has in use, over all of its connections."""

    __slots__ = (
        *("bucket", "closed", "closing", "connections", "namespaces"),
        *("opening", "records", "unread", "unread_most"),
    )

    def __init__(self, maxima: Mapping[str, int], now_s: float) -> None:
        self.connections: set[Connection] = set()  # with those that we have ended and the client has not read
        self.unread: set[Connection] = set()  # those that may have grants unread
        self.unread_most = 0  # upper bound of the grants unread in these: exact when each was asked last
        self.namespaces: tuple[int, ...] = ()  # inode numbers of those made for it that may be living
        self.bucket = Bucket(maxima["burst"], now_s)
        self.records = Bucket(maxima["record_burst"], now_s)
        self.opening = 0  # resources of requests that wait: for the worker, a thread, their next turn
        self.closing = 0  # descriptors that were given to a thread to be closed, and how many of these it has closed
        self.closed = 0

    def has_unread(self, above: int) -> bool:
        """True if more descriptors than that may be unread in all connections of the owner.

        The kernel is asked only when our own count is above.
        """
        if self.unread_most > above:
            for connection in tuple(self.unread):
                connection.unread_grants()
        return self.unread_most > above

    def leaving(self) -> int:
        """How many of its connections their clients have closed, as the inbox has yet to say; few are looked at."""
        some = islice((one.sock for one in self.connections if one.state != "gone"), limits.LEAVING_LOOKED)
        return sockets.hung_up(*some)

    def is_idle(self, now_s: float) -> bool:
        """Whether nothing would be lost if a new account took this one's place."""
        in_use = self.connections or self.namespaces or self.opening or self.closing != self.closed
        return not in_use and self.bucket.is_idle(now_s) and self.records.is_idle(now_s)


class Flight:
    """All descriptors that were sent and not read: the kernel sends none to anybody at RLIMIT_NOFILE of them.

    A part of `most` is kept for owners without unread descriptors. Source: unix(7), ETOOMANYREFS.
    """

    def __init__(self, most: int, reserved: int = limits.DESCRIPTORS_RESERVED) -> None:
        self.most = most
        self.held_most = reserved - limits.OWN_DESCRIPTORS
        self.held = 0  # by requests that wait: of each resource the node, and what is opened
        self.closing = 0  # given to threads to be closed, and how many of these they have closed
        self.closed = 0
        self.count = 0  # upper bound: exact when each connection was asked last
        self.unread: set[Connection] = set()
        self._looked_s = 0.0

    def can_hold(self, account: Account, count: int) -> bool:
        """Whether a request of that owner for `count` resources may wait: else threads could use up all descriptors."""
        some = account.opening or account.closing != account.closed
        most = limits.shared(self.held_most) if some else self.held_most
        return self.held + 2 * count + self.closing - self.closed <= most

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

    def __init__(self, flight_most: int, reserved: int) -> None:
        self.flight = Flight(flight_most, reserved)
        self._by_owner: dict[int, Account] = {}

    def of(self, owner: int, maxima: Mapping[str, int], now_s: float) -> Account:
        """The owner's account; `maxima` are the limits that a new one begins with."""
        account = self._by_owner.get(owner)
        if account is None:
            if len(self._by_owner) >= _ACCOUNTS_KEPT:
                self._forget_idle(now_s)
            account = self._by_owner[owner] = Account(maxima, now_s)
        return account

    def _forget_idle(self, now_s: float) -> None:
        for owner, account in list(self._by_owner.items()):
            if account.is_idle(now_s):
                del self._by_owner[owner]


class Connection:
    """One client: its number, our copy of its socket, and who it is. Owns the socket until `close`."""

    __slots__ = (
        *("_count", "_queued", "account", "flight", "let_in_s", "number", "recorded", "sent", "sock"),
        *("state", "subject", "view"),
    )

    def __init__(
        self, number: int, sock: socket.socket, subject: Subject, seen: Seen, account: Account, flight: Flight
    ) -> None:
        self.number = number
        self.sock = sock
        self.subject = subject
        self.view = seen  # it is judged by
        self.account = account
        self.state = "idle"  # as link.TURNS has it
        self.recorded = False  # whether a record of it has been counted
        self.let_in_s = processes.boot_s()
        self.sent: deque[tuple[int, int]] = deque()  # (bytes in the socket's queue, grants) of messages maybe unread
        self._queued = 0  # what was in the socket's queue when we last looked
        self._count = 0  # descriptors that were unread then, or were sent since
        self.flight = flight
        account.connections.add(self)

    def turn(self, event: str) -> None:
        """Something happens on it. Raises LinkViolation when that is out of turn."""
        self.state = turned(self.number, self.state, event)

    def note_sent(self, size: int, grants: int) -> None:
        """A message of `size` bytes with `grants` descriptors has left."""
        before, self._queued = self._queued, sockets.unread_bytes(self.sock)
        # what was read since then makes it look smaller: so more messages count as unread, never fewer
        self.sent.append((max(self._queued - before, size + _SKB_BYTES), grants))
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
        while self.sent and queued > 0:
            size, grants = self.sent.pop()
            kept.appendleft((size, grants))
            queued -= size
            unread += grants
        self.sent = kept
        self._note(unread)
        return unread

    def close(self) -> None:
        """Hang up, for the inbox's copy too.

        What waits unread in the client's queue is memory that counts for this service, and grants in it count as in
        flight, until the client reads or closes its end: for so long the connection `lingers`.
        """
        sockets.hang_up(self.sock)

    def release(self) -> socket.socket:
        """The socket, owned by the caller, of a connection that the inbox never had. Raises LinkViolation if it had."""
        if self.unread_grants() or self._queued:
            raise LinkViolation(f"connection {self.number} was answered, and is said never to have come")
        self.account.connections.discard(self)
        return self.sock

    def lingers(self) -> bool:
        """Whether something waits in an ended connection; once its client has read everything, our copy is closed.

        The inbox reads descriptors that the client has sent. Bytes alone are not waited for: an inbox without a copy of
        the socket reads nothing.
        """
        self.unread_grants()
        if self._queued or not sockets.only_bytes_wait(self.sock):
            return True
        self.account.connections.discard(self)
        self.sock.close()
        return False


def authorize_connection(seen: View, account: Account, left: int, most: int) -> None:
    """Whether an owner may have one connection more, when there are places for `left` more, of `most`.

    The last ones are for owners without any other, the very last ones for administrators. Raises QuotaExceeded.
    """
    maximum, connections = seen.limits["connections"], len(account.connections)
    if connections >= maximum and connections - account.leaving() >= maximum:
        raise QuotaExceeded("connections", maximum)
    free = left > most - limits.shared(most) or not connections
    if not (seen.administrator if left <= limits.FOR_ADMINISTRATORS else free):
        raise QuotaExceeded("descriptors", most)


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
    if count > 1 and sockets.hung_up(connection.sock):
        raise ConnectionError(errno.EPIPE, "the client has hung up")


def authorize_grants(connection: Connection, count: int, now_s: float) -> None:
    """Whether `count` descriptors may be opened for this client, and sent to it.

    Raises ClientNotReading, QuotaExceeded, or RateLimited when others, or what is not closed yet, leave no room.
    """
    account, maximum = connection.account, connection.view.limits["unread_grants"]
    if connection.sent:  # else what has been read since then makes the next message look smaller than it is
        connection.unread_grants()
    if account.has_unread(maximum - account.opening - count):
        if connection.unread_grants() >= maximum:
            raise ClientNotReading
        raise QuotaExceeded("unread_grants", maximum)
    busy = account.closing - account.closed + count > _CLOSING_HELD or account.opening + count > _OPENING_HELD
    if busy or not connection.flight.can_hold(account, count):
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


def authorize_resources(connection: Connection, resources: Sequence[Resource]) -> list[Permit]:
    """What allows each resource. Raises Denied for the first that nothing allows."""
    permits, kept = [], connection.view.permits
    for index, resource in enumerate(resources):
        permit = kept.get(resource)
        if permit is None:
            rules, by = decide(connection.view, resource)
            if by is not None:
                raise Denied(f"a deny rule for {by.source}", index=index, rule=by.where)
            if not rules:
                raise Denied("no rule allows it", index=index)
            permit = Permit(resource, rules)
            if len(resource.text) <= _KEPT_CHARACTERS:
                if len(kept) >= limits.KEPT_VALUES:
                    kept.clear()
                kept[resource] = permit
        permits.append(permit)
    return permits
