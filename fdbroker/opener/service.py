"""The opener's loop: the listening socket, the links, and what each message of them sets off.

Runs in: opener. A taken-over inbox controls every message of its link: whatever is unknown, mis-sized or out of turn
raises LinkViolation, which ends the service.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time

from fdbroker import limits
from fdbroker.errors import LinkViolation, RateLimited, Refused
from fdbroker.kernel import inotify, memfd, sockets
from fdbroker.kernel.link import Link
from fdbroker.kernel.records import NotRecorded
from fdbroker.opener.ask import Asking
from fdbroker.opener.audit import Audit, Record
from fdbroker.opener.authorize import Connection, authorize_administrator, authorize_request, message_rights
from fdbroker.opener.door import Door
from fdbroker.opener.listing import Listed, listing
from fdbroker.opener.open import Nodes
from fdbroker.opener.request import Opening, finish_open, refuse_open, start_open
from fdbroker.policy.compiled import Policy, from_bytes
from fdbroker.wire import link, rights

# Several nodes come together, each is made, renamed, given its owner: one listing for all of them.
_SETTLE_S = 0.1
_RETRY_MS = limits.JOURNAL_RETRY_MS


class Opener:
    """All that the opener holds. `serve` returns when it is told to stop and all is answered."""

    def __init__(
        self,
        listener: socket.socket,
        launcher: Link,
        inbox: Link,
        asking: Asking,
        policy: Policy,
        nodes: Nodes,
        audit: Audit,
    ) -> None:
        self._launcher = launcher
        self._inbox = inbox
        self._asking = asking
        self._policy = policy
        self._nodes = nodes
        self._audit = audit
        self._connections: dict[int, Connection] = {}
        self._door = Door(listener, inbox, policy, audit, self._connections)
        self._watching: dict[int, list[bytes]] = {}  # connection -> the listing that it was sent last
        self._pings = 0  # sent to the inbox and not answered
        self._inotify = inotify.create()
        self._spare = os.dup(self._inotify)
        self._changed_at_s: float | None = None
        self._accepting = False
        self._inbox_full = False
        self._epoll = select.epoll()

    def serve(self) -> None:
        """Serve until the launcher says stop, or goes. Raises LinkViolation and OSError: then the process must end."""
        poll = self._epoll
        poll.register(self._launcher.fileno(), select.EPOLLIN)
        poll.register(self._inbox.fileno(), select.EPOLLIN)
        poll.register(self._inotify, select.EPOLLIN)
        if self._asking.fileno() >= 0:
            poll.register(self._asking.fileno(), select.EPOLLIN)
        self._tell_topics()
        self._launcher.send(link.READY)
        inbox, launcher, asking = self._inbox.fileno(), self._launcher.fileno(), self._asking.fileno()
        timeout_s = -1.0
        while True:
            self._arm()
            for descriptor, events in poll.poll(timeout_s):
                if descriptor == inbox:
                    if events & select.EPOLLOUT:
                        self._flush_inbox()
                    if events & ~select.EPOLLOUT and not self._read_inbox():
                        return
                elif descriptor == launcher:
                    if not self._read_launcher():
                        return
                elif descriptor == asking:
                    self._asking.read()
                    self._finish_ready()
                elif descriptor == self._inotify:
                    inotify.drain(self._inotify)
                    self._changed_at_s = self._changed_at_s or time.monotonic()
                else:
                    self._door.accept()
            timeout_s = self._timers()

    def _arm(self) -> None:
        """Poll for what can be used: room in the inbox's link if messages wait for it, and else new connections."""
        full = bool(self._inbox.waiting or self._door.holds)
        if full != self._inbox_full:
            self._inbox_full = full
            # while it does not take our answers, its next questions wait: what waits for it stays bounded
            self._epoll.modify(self._inbox.fileno(), select.EPOLLOUT if full else select.EPOLLIN)
        if self._door.closed:
            return
        wanted = not full and not self._door.paused()
        if wanted != self._accepting:
            self._accepting = wanted
            if wanted:
                self._epoll.register(self._door.fileno(), select.EPOLLIN)
            else:
                self._epoll.unregister(self._door.fileno())

    # ---- timers

    def _timers(self) -> float:
        """Do what is due now, and return in how many seconds something will be; -1: nothing before a message comes."""
        watched = self._changed_at_s is not None and self._watching
        if not (watched or self._door.busy or self._audit.counting or self._asking.busy):
            return -1
        now_s = time.monotonic()
        if self._changed_at_s is not None and now_s - self._changed_at_s >= _SETTLE_S:
            self._changed_at_s = None
            self._list_again()
        self._door.sweep(now_s)
        if self._audit.counting:
            self._audit.flush(now_s)
        if self._asking.timeout_s == 0:
            if self._asking.expire():
                self._launcher.send(link.WORKER_STUCK)
            self._finish_ready()
        ends_s = [self._asking.timeout_s, self._door.timeout_s]
        if self._changed_at_s is not None and self._watching:
            ends_s.append(_SETTLE_S)
        if self._audit.counting:
            ends_s.append(float(limits.AUDIT_REPEAT_SECONDS))
        return min((end_s for end_s in ends_s if end_s >= 0), default=-1)

    # ---- the inbox's link

    def _flush_inbox(self) -> None:
        self._inbox.flush()
        self._door.hand_on_held()

    def _read_inbox(self) -> bool:
        """Answer one message of the inbox; false when it is gone as it should be."""
        data = self._inbox.receive()
        if data is None:
            return True
        if not data:
            if self._door.closed:  # it was told to drain
                return False
            raise LinkViolation("the inbox is gone")
        try:
            self._answer(link.decode(link.INBOX_TO_OPENER, data))
        except ConnectionError:
            if self._door.closed:  # it has drained, and this was in the name of a client that it has closed since
                return False
            raise
        return True

    def _answer(self, message: link.Message) -> None:
        match message:
            case link.Open(number, resources):
                self._open(Opening(self._turn(number, "Open"), resources))
            case link.List(number, watch):
                self._list(self._turn(number, "Watch" if watch else "List"))
            case link.Shutdown(number):
                self._shutdown(self._turn(number, "Shutdown"))
            case link.Closed(number, reason):
                self._close(self._turn(number, "Closed"), reason)
            case rights.DeniedUse(number, use):
                connection = self._turn(number, "DeniedUse")
                record = Record("refused", "authorize", number, connection.subject, use, "no rule allows it")
                self._audit.refuse(record, time.monotonic())
            case link.Slowed(number):
                subject = self._turn(number, "Slowed").subject
                record = Record("slowed", "decode", number, subject, None, "it is read more slowly than it sends")
                self._audit.refuse(record, time.monotonic())
            case link.Pong():
                if not self._pings:
                    raise LinkViolation("a Pong without a Ping")
                self._pings -= 1
                self._launcher.send(link.PONG)
            case link.Drained():
                if not self._door.closed:
                    raise LinkViolation("the inbox drained without being told to")

    def _turn(self, number: int, event: str) -> Connection:
        """The connection of that number, in the state after `event`. Raises LinkViolation when it is not its turn."""
        connection = self._connections.get(number)
        if connection is None:
            raise LinkViolation(f"{event} in the name of connection {number}, which does not exist")
        state = link.TURNS.get((connection.state, event))
        if state is None:
            raise LinkViolation(f"{event} on connection {number}, which is {connection.state}")
        connection.state = state
        self._door.note_work(connection.account)
        return connection

    def _open(self, opening: Opening) -> None:
        refusal = start_open(opening, self._audit)
        if refusal is None and opening.missing() is not None:
            self._asking.ask(opening)
            self._finish_ready()
        else:
            self._finish(opening, refusal)

    def _finish_ready(self) -> None:
        """Go on with those for which the worker has no more to do."""
        for opening, refusal in self._asking.ready():
            self._finish(opening, None if refusal is None else refuse_open(opening, refusal, self._audit))

    def _finish(self, opening: Opening, refusal: Refused | None) -> None:
        if refusal is None:
            refusal = finish_open(opening, self._nodes, self._audit)
        self._end_turn(opening.connection, refusal)

    def _end_turn(self, connection: Connection, refusal: Refused | None) -> None:
        connection.state = link.TURNS[connection.state, "Outcome"]
        self._inbox.send(link.encode_outcome(connection.number, refusal))

    def _refuse(self, connection: Connection, refusal: Refused) -> None:
        """Record and answer a refusal of a request that names no resource."""
        number, subject, sort = connection.number, connection.subject, refusal.wire_name
        record = Record("refused", "authorize", number, subject, None, str(refusal), sort=sort)
        self._audit.refuse(record, time.monotonic())
        self._end_turn(connection, refusal)

    def _close(self, connection: Connection, reason: int) -> None:
        if reason:
            why = link.CLOSED_REASONS[reason]
            record = Record("disconnected", "decode", connection.number, connection.subject, None, why)
            self._audit.refuse(record, time.monotonic())
            self._door.note_broken(connection)
        del self._connections[connection.number]
        self._watching.pop(connection.number, None)
        self._asking.drop(connection)
        connection.close()
        self._door.note_ended(connection.account)

    def _shutdown(self, connection: Connection) -> None:
        """Have the launcher stop the service, if an administrator asks for it."""
        try:
            authorize_request(connection, time.monotonic())
            authorize_administrator(connection)
            self._audit.write(
                Record("stopping", "authorize", connection.number, connection.subject, None, "it was asked to")
            )
        except NotRecorded:
            self._end_turn(connection, RateLimited(_RETRY_MS))
        except Refused as refusal:
            self._refuse(connection, refusal)
        else:
            self._launcher.send(link.STOP_ASKED)

    # ---- listings

    def _list(self, connection: Connection) -> None:
        try:
            authorize_request(connection, time.monotonic())
        except Refused as refusal:
            self._refuse(connection, refusal)
            return
        parts = listing(connection, self._nodes, self._inotify)
        if connection.state == "watching":
            self._watching[connection.number] = parts
        connection.state = link.TURNS[connection.state, "Offered"]
        for part in parts:
            self._inbox.send(part)

    def _list_again(self) -> None:
        """Tell every watching client whose list has changed; the rest later while the inbox's link is full."""
        listed: Listed = {}
        for number, before in list(self._watching.items()):
            if self._inbox.waiting:
                self._changed_at_s = time.monotonic()
                return
            parts = listing(self._connections[number], self._nodes, self._inotify, listed)
            if parts != before:
                self._watching[number] = parts
                for part in parts:
                    self._inbox.send(part)

    # ---- the launcher's link

    def _read_launcher(self) -> bool:
        """Do what the launcher says; false when it is gone, which ends the service."""
        os.close(self._spare)  # a place for the policy, however many descriptors clients make us hold
        try:
            received = self._launcher.receive_with_descriptors(1)
            return received is None or self._obey(*received)
        finally:
            self._spare = os.dup(self._inotify)

    def _obey(self, data: bytes, descriptors: list[int]) -> bool:
        if not data:
            return False
        try:
            match link.decode(link.LAUNCHER_TO_OPENER, data):
                case link.Policy(generation) if descriptors:
                    self._use(from_bytes(memfd.read(descriptors[0], limits.POLICY_LINK_BYTES)))
                    self._launcher.send(link.encode_applied(generation))
                case link.Stop():
                    self._stop()
                case link.Ping():
                    self._pings += 1
                    self._inbox.send(link.PING)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return True

    def _use(self, policy: Policy) -> None:
        """Judge by `policy` from the next request on."""
        self._policy = policy
        self._door.policy = policy
        self._tell_topics()
        for connection in self._connections.values():
            connection.see(policy)
            allowed = message_rights(connection.view, policy.topics)
            sockets.let_descriptors(connection.sock, allowed=bool(allowed.send))
            self._inbox.send(rights.encode_changed(connection.number, allowed))
        self._list_again()

    def _tell_topics(self) -> None:
        for message in rights.encode_users(self._policy.users):
            self._inbox.send(message)
        self._inbox.send(rights.encode_topics(self._policy.topics))  # now all of it is in force

    def _stop(self) -> None:
        if not self._door.closed:
            if self._accepting:
                self._epoll.unregister(self._door.fileno())
                self._accepting = False
            self._door.close()
            self._asking.hurry()
            self._inbox.send(link.DRAIN)

    def report_violation(self, violation: LinkViolation) -> None:
        """Record why the service ends."""
        with contextlib.suppress(NotRecorded):
            self._audit.write(Record("violation", "decode", 0, None, None, f"between our processes: {violation}"))
