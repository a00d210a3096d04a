"""Stage authorize: the policy and the per-user limits.

Runs in: opener. An attacker controls the asked paths and how often it asks.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Mapping, Sequence

from fdbroker.bucket import Bucket
from fdbroker.errors import ClientNotReading, Denied, QuotaExceeded, RateLimited
from fdbroker.kernel import sockets
from fdbroker.pace import Pace
from fdbroker.policy.compiled import Policy
from fdbroker.policy.decide import View, decide, view
from fdbroker.terms import TOPIC_VERBS, Resource, Rule, Subject, Topic, TopicUse
from fdbroker.wire.rights import Rights

# The least that a message takes of a socket's queue, beside its bytes: the kernel's struct sk_buff.
_SKB_BYTES = 512
_ACCOUNTS_KEPT = 1024


class Account:
    """What one user has in use, over all of its connections."""

    __slots__ = (
        "bucket",
        "connections",
        "knocking_since_s",
        "knocks",
        "lingering",
        "maxima",
        "namespaces",
        "pace",
        "unread",
        "waiting",
    )

    def __init__(self, maxima: Mapping[str, int], now_s: float) -> None:
        self.maxima = maxima  # of the connection that came last
        self.connections: set[Connection] = set()
        self.unread: set[Connection] = set()  # those that may have grants unread
        self.lingering: set[Connection] = set()  # ended by us, with grants that the client has not read
        self.namespaces: tuple[int, ...] = ()  # inode numbers of those made for it that may be living
        self.bucket = Bucket(maxima["burst"], now_s)
        self.pace = Pace(max(maxima["burst"], maxima["connections"]), now_s)
        self.knocks = 0  # that came while others waited, in a second from then on
        self.knocking_since_s = now_s
        self.waiting: deque[socket.socket] = deque()  # accepted, to be let in when the debt is over

    def count_connections(self) -> int:
        """Connections in use: the open ones, and the ended ones whose unread grants still weigh on us."""
        for connection in tuple(self.lingering):
            connection.linger()
        return len(self.connections) + len(self.lingering)

    def note_connect(self, now_s: float) -> None:
        """One connection more has been let in."""
        self.pace.spend(1, *self._rate(), now_s)

    def offend(self, now_s: float) -> bool:
        """The user broke a rule, or comes again and again; returns whether that costs something for the first time."""
        return self.pace.offend(*self._rate(), now_s)

    def wait_s(self, now_s: float) -> float:
        """In how many seconds the next connection may be let in."""
        return self.pace.wait_s(*self._rate(), now_s)

    def _rate(self) -> tuple[int, int]:
        return self.maxima["requests_per_second"], max(self.maxima["burst"], self.maxima["connections"])


class Accounts:
    """One account a user. It outlives the user's connections, or a new connection would bring a new bucket."""

    def __init__(self) -> None:
        self._by_uid: dict[int, Account] = {}

    def known(self, uid: int) -> Account | None:
        """The user's account, if it was here lately."""
        return self._by_uid.get(uid)

    def of(self, uid: int, maxima: Mapping[str, int], now_s: float) -> Account:
        """The user's account; `maxima` are its limits now."""
        account = self._by_uid.get(uid)
        if account is None:
            if len(self._by_uid) >= _ACCOUNTS_KEPT:
                self._forget_idle(now_s)
            account = self._by_uid[uid] = Account(maxima, now_s)
        account.maxima = maxima
        return account

    def _forget_idle(self, now_s: float) -> None:
        for uid, account in list(self._by_uid.items()):
            if account.count_connections() or account.namespaces or account.waiting:
                continue
            if account.bucket.is_idle(now_s) and account.pace.is_idle(now_s):
                del self._by_uid[uid]


class Connection:
    """One client: its number, our copy of its socket, and who it is. Owns the socket until `close`."""

    __slots__ = ("_queued", "_sent", "account", "number", "sock", "state", "subject", "view")

    def __init__(self, number: int, sock: socket.socket, subject: Subject, seen: View, account: Account) -> None:
        self.number = number
        self.sock = sock
        self.subject = subject
        self.view = seen
        self.account = account
        self.state = "idle"  # a state of link.TURNS
        self._sent: deque[tuple[int, int]] = deque()  # (bytes in the socket's queue, grants) of messages maybe unread
        self._queued = 0  # what was in the socket's queue when we last looked
        account.connections.add(self)

    def see(self, policy: Policy) -> None:
        """Judge by this policy from now on."""
        self.view = view(policy, self.subject)

    def note_sent(self, size: int, grants: int) -> None:
        """A message of `size` bytes with `grants` descriptors has left."""
        grown = sockets.unread_bytes(self.sock) - self._queued
        self._sent.append((max(grown, size + _SKB_BYTES), grants))
        self.account.unread.add(self)

    def unread_grants(self) -> int:
        """How many descriptors wait unread, never too few: the newest messages that fill the socket's queue."""
        self._queued = queued = sockets.unread_bytes(self.sock)
        if not queued:
            self._sent.clear()
            self.account.unread.discard(self)
            return 0
        unread = 0
        kept: deque[tuple[int, int]] = deque()
        while self._sent and queued > 0:
            size, grants = self._sent.pop()
            kept.appendleft((size, grants))
            queued -= size
            unread += grants
        self._sent = kept
        if not kept:
            self.account.unread.discard(self)
        return unread

    def close(self) -> None:
        """Hang up, for the inbox's copy too, and free what the user had in use.

        Grants that wait unread in the client's queue still count as in flight for us, until it reads them or closes
        its end: for so long the connection lingers, and counts for its user.
        """
        self.account.connections.discard(self)
        sockets.hang_up(self.sock)
        self.account.lingering.add(self)
        self.linger()

    def linger(self) -> None:
        """Close our copy of an ended connection once nothing of it is unread."""
        if not self.unread_grants():
            self.account.lingering.discard(self)
            self.account.unread.discard(self)
            self.sock.close()


def message_rights(seen: View, topics: Sequence[Topic]) -> Rights:
    """What a connection may do with messages; the inbox judges by it, for it alone could break it."""
    send, subscribe = (
        frozenset(index for index, topic in enumerate(topics) if decide(seen, TopicUse(verb, topic.name)).rules)
        for verb in TOPIC_VERBS
    )
    maxima = seen.limits
    return Rights(
        *(send, subscribe, maxima["requests_per_second"], maxima["burst"]),
        *(maxima["subscriptions"], maxima["stored_messages"], maxima["stored_bytes"]),
    )


def authorize_connection(account: Account, seen: View) -> None:
    """One connection more for this user? Raises QuotaExceeded."""
    maximum = seen.limits["connections"]
    if account.count_connections() >= maximum:
        raise QuotaExceeded("connections", maximum)


def authorize_request(connection: Connection, now_s: float) -> None:
    """One request more, of whatever kind? Raises RateLimited, ClientNotReading or QuotaExceeded."""
    maxima = connection.view.limits
    wait_ms = connection.account.bucket.take(maxima["requests_per_second"], maxima["burst"], now_s)
    if wait_ms:
        raise RateLimited(wait_ms)
    authorize_grants(connection)


def authorize_grants(connection: Connection) -> None:
    """May more be sent to this client? Raises ClientNotReading or QuotaExceeded."""
    maximum = connection.view.limits["unread_grants"]
    if connection.unread_grants() >= maximum:
        raise ClientNotReading
    if sum(one.unread_grants() for one in tuple(connection.account.unread)) >= maximum:
        raise QuotaExceeded("unread_grants", maximum)


def authorize_administrator(connection: Connection) -> None:
    """May this client administer the broker? Raises Denied."""
    if not connection.view.administrator:
        raise Denied("it is no administrator")


def authorize_resources(connection: Connection, resources: Sequence[Resource]) -> list[tuple[Rule, ...]]:
    """The rules that allow each resource, never none. Raises Denied for the first that nothing allows."""
    allowed = []
    for index, resource in enumerate(resources):
        decision = decide(connection.view, resource)
        if not decision.rules:
            by = decision.denied_by
            if by is not None:
                raise Denied(f"a deny rule for {by.source}", index=index, rule=by.where)
            raise Denied("no rule allows it", index=index)
        allowed.append(decision.rules)
    return allowed
