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
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import assert_never

from fdbroker import limits
from fdbroker.kernel import memfd
from fdbroker.kernel.jobs import Jobs
from fdbroker.kernel.link import Link
from fdbroker.kernel.records import NotRecorded
from fdbroker.opener.ask import Asking
from fdbroker.opener.audit import Audit, Record
from fdbroker.opener.authorize import (
    Connection,
    authorize_administrator,
    authorize_request,
)
from fdbroker.opener.close import Closing
from fdbroker.opener.door import Door, came
from fdbroker.opener.open import Nodes
from fdbroker.opener.request import THREAD, WORKER, Opening, answer
from fdbroker.opener.views import views
from fdbroker.policy.compiled import Policy, from_bytes
from fdbroker.refusals import Denied, LinkViolation, RateLimited, Refused
from fdbroker.terms import Resource
from fdbroker.wire import admin, keeper, link
from fdbroker.wire.connections import Use

_RETRY_MS = limits.JOURNAL_RETRY_MS
_to_inbox, _to_launcher = link.OPENER_TO_INBOX.encode, link.OPENER_TO_LAUNCHER.encode
_to_keeper = keeper.OPENER_TO_KEEPER.encode


class Opener:
    """All that the opener holds. `serve` returns when it is told to stop and all is answered."""

    def __init__(
        self,
        listener: socket.socket,
        launcher: Link,
        inbox: Link,
        to_keeper: Link,
        asking: Asking,
        policy: Policy,
        nodes: Nodes,
        audit: Audit,
    ) -> None:
        self._launcher = launcher
        self._inbox = inbox
        self._keeper = to_keeper
        self._asking = asking
        self._views = views(policy)
        asking.owners = policy.owners
        self._nodes = nodes
        self._audit = audit
        self._connections: dict[int, Connection] = {}
        self._closing = Closing()
        self._slow = Jobs(limits.OPENING_THREADS)
        self._opened: deque[Opening] = deque()  # by a thread, which then writes to `_woken`
        self._later: deque[Opening] = deque()  # one goes on in each turn of the loop
        self._woken = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._door = Door(listener, inbox, to_keeper, self._views, audit, self._connections, self._closing)
        self._pings = 0  # sent to the inbox and not answered
        self._spare = os.dup(self._woken)
        self._accepting = False
        self._epoll = select.epoll()

    def serve(self) -> None:
        """Serve until the launcher says stop, or goes. Raises LinkViolation and OSError: then the process must end."""
        try:
            self._serve()
        except ConnectionError:
            if not self._door.closed:
                raise
            # the inbox has drained, and what was to be said was for a client that it has closed since

    def _serve(self) -> None:
        poll = self._epoll
        self._launcher.poll(poll)
        poll.register(self._woken, select.EPOLLIN)
        if self._asking.fileno() >= 0:
            poll.register(self._asking.fileno(), select.EPOLLIN)
        self._launcher.send(link.READY)
        inbox, keeper_, launcher = self._inbox.fileno(), self._keeper.fileno(), self._launcher.fileno()
        timeout_s = -1.0
        while True:
            self._arm()
            for descriptor, events in poll.poll(timeout_s):
                if descriptor == inbox:
                    if events & select.EPOLLOUT:
                        self._inbox.flush()
                        self._door.hand_on_held()
                    if events & ~select.EPOLLOUT and not self._read_inbox():
                        return
                elif descriptor == keeper_:
                    if events & select.EPOLLOUT:
                        self._keeper.flush()
                        self._door.hand_on_held()
                    if events & ~select.EPOLLOUT:
                        self._read_keeper()
                elif descriptor == launcher:
                    if not self._read_launcher():
                        return
                elif descriptor == self._asking.fileno():
                    self._asking.read()
                    self._go_on_with_ready()
                elif descriptor == self._woken:
                    os.eventfd_read(self._woken)
                    while self._opened:
                        self._go_on(self._opened.popleft())
                else:
                    self._door.accept()
            timeout_s = self._timers()

    def _arm(self) -> None:
        """Poll for what can be used: room in a link if messages wait for it, and else new connections."""
        full = bool(self._inbox.waiting or (self._door.holds and not self._keeper.waiting))
        # while it does not take our answers, its next questions wait: what waits for it stays bounded
        self._inbox.poll(self._epoll, read=not full, write=full)
        self._keeper.poll(self._epoll)
        if self._door.closed:
            return
        wanted = not (full or self._keeper.waiting or self._door.paused())
        if wanted != self._accepting:
            self._accepting = wanted
            if wanted:
                self._epoll.register(self._door.fileno(), select.EPOLLIN)
            else:
                self._epoll.unregister(self._door.fileno())

    # ---- timers

    def _timers(self) -> float:
        """Do what is due now, and return in how many seconds something will be; -1: nothing before a message comes."""
        if self._later:
            self._go_on(self._later.popleft())
        if not (self._later or self._door.busy or self._audit.counting or self._asking.busy):
            return -1
        now_s = time.monotonic()
        self._door.sweep(now_s)
        if self._audit.counting:
            self._audit.flush(now_s)
        if self._asking.timeout_s == 0:
            if self._asking.expire():
                self._launcher.send(link.WORKER_STUCK)
            self._go_on_with_ready()
        ends_s = [self._asking.timeout_s, self._door.timeout_s, 0.0 if self._later else -1]
        if self._audit.counting:
            ends_s.append(float(limits.AUDIT_REPEAT_SECONDS))
        return min((end_s for end_s in ends_s if end_s >= 0), default=-1)

    # ---- the inbox's link

    def _read_inbox(self) -> bool:
        """Answer one message of the inbox; false when it is gone as it should be."""
        data = self._inbox.receive()
        if data is None:
            return True
        if not data:
            if self._door.closed:  # it was told to drain
                return False
            raise LinkViolation("the inbox is gone")
        self._answer(link.INBOX_TO_OPENER.decode(data))
        return True

    def _answer(self, message: link.FromInbox) -> None:
        match message:
            case link.Open(number, resources):
                self._open(self._turn(number, "Open"), resources)
            case link.Shutdown(number):
                self._administer(self._turn(number, "Shutdown"))
            case admin.Reload(number):
                self._administer(self._turn(number, "Reload"))
            case link.Closed(number, reason):
                self._close(self._turn(number, "Closed"), reason)
            case link.DeniedUse(number, use):
                connection = self._turn(number, "DeniedUse")
                why = "no rule allows it"
                record = Record("refused", "authorize", number, connection.subject, use, why, cause=Denied.cause)
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
            case other:
                assert_never(other)

    def _turn(self, number: int, event: str) -> Connection:
        """The connection of that number, in the state after `event`. Raises LinkViolation when it is not its turn."""
        connection = self._connections.get(number)
        if connection is None:
            raise LinkViolation(f"{event} in the name of connection {number}, which does not exist")
        connection.turn(event)
        self._door.note_work(connection.account)
        return connection

    def _open(self, connection: Connection, resources: Sequence[Resource]) -> None:
        opening = Opening(connection, resources, self._closing)
        opening.steps = answer(opening, self._nodes, self._audit)
        self._go_on(opening)

    def _go_on(self, opening: Opening, refusal: Refused | None = None) -> None:
        """Until it waits, or has its outcome; `refusal` is the worker's."""
        connection, steps = opening.connection, opening.steps
        if connection.number not in self._connections:  # it has ended meanwhile
            opening.close()
            return
        try:
            waits_for = next(steps) if refusal is None else steps.throw(refusal)
        except StopIteration as end:
            self._end_turn(connection, end.value, opening.sent_s)
            return
        opening.wait()
        if waits_for == WORKER:
            self._asking.ask(opening)
            self._go_on_with_ready()
        elif waits_for == THREAD:
            self._slow.put(connection.subject.owner, partial(self._open_slowly, opening))
        else:
            self._later.append(opening)

    def _go_on_with_ready(self) -> None:
        """Those for which the worker has no more to do."""
        for opening, refusal in self._asking.ready():
            self._go_on(opening, refusal)

    def _open_slowly(self, opening: Opening) -> None:
        """Runs in a thread."""
        opening.open_nodes(self._nodes)
        self._opened.append(opening)
        os.eventfd_write(self._woken, 1)

    def _end_turn(self, connection: Connection, refusal: Refused | None, sent_s: float = 0.0) -> None:
        connection.turn("Outcome")
        self._inbox.send(_to_inbox(link.Outcome(connection.number, refusal, int(sent_s * 1e6))))

    def _refuse(self, connection: Connection, refusal: Refused) -> None:
        """Record and answer a refusal of a request that names no resource."""
        number, subject, why = connection.number, connection.subject, str(refusal)
        record = Record("refused", "authorize", number, subject, None, why, cause=refusal.cause)
        self._audit.refuse(record, time.monotonic())
        self._end_turn(connection, refusal)

    def _close(self, connection: Connection, reason: int) -> None:
        if reason:
            why = link.CLOSED_REASONS[reason]
            record = Record("disconnected", "decode", connection.number, connection.subject, None, why)
            self._audit.refuse(record, time.monotonic())
            if reason == link.NOT_TAKEN:
                self._closing.hang_up(connection.release(), connection.subject.owner)
            else:
                self._door.note_broken(connection)
        del self._connections[connection.number]
        self._keeper.send(_to_keeper(keeper.Ended(connection.number)))
        self._asking.drop(connection)
        if reason != link.NOT_TAKEN:
            began_s = time.thread_time()
            connection.close()
            self._door.note_ended(connection.account, time.thread_time() - began_s)

    # ---- administrators

    def _administer(self, connection: Connection) -> None:
        """Have it judged whether an administrator asks from our own user namespace; `_judged` goes on."""
        try:
            authorize_request(connection, time.monotonic())
            authorize_administrator(connection)
            try:
                pidfd = self._door.identifier.process(connection.sock, connection.subject, connection.let_in_s)
            except OSError:  # no descriptor is left for it
                raise RateLimited(_RETRY_MS, "busy") from None
            if pidfd is None:
                raise Denied("the kernel does not say which process it is")
            try:
                if not self._launcher.send_with_descriptors(_to_launcher(admin.Judge(connection.number)), [pidfd]):
                    raise RateLimited(_RETRY_MS, "busy")
            finally:
                os.close(pidfd)
        except Refused as refusal:
            self._refuse(connection, refusal)

    def _judged(self, connection: Connection, *, home: bool) -> None:
        """Have the launcher do what an administrator asks for."""
        stop = connection.state == "stopping"
        try:
            if not home:
                raise Denied("it is not shown to be in the user namespace of the service")
            kind = "stopping" if stop else "reloading"
            record = Record(kind, "authorize", connection.number, connection.subject, None, "it was asked to")
            self._audit.write(record)
        except NotRecorded:
            self._end_turn(connection, RateLimited(_RETRY_MS, "journal"))
        except Refused as refusal:
            self._refuse(connection, refusal)
        else:
            self._launcher.send(_to_launcher(link.StopAsked() if stop else admin.ReloadAsked(connection.number)))

    # ---- the keeper's link

    def _read_keeper(self) -> None:
        """Record what the keeper has refused."""
        data = self._keeper.receive()
        if data is None:
            return
        if not data:
            raise LinkViolation("the keeper is gone")
        number, wait_ms = keeper.KEEPER_TO_OPENER.decode(data)
        if number > self._door.last_number:
            raise LinkViolation(f"ListRefused of connection {number}, which does not exist")
        if number in self._connections:  # else it has ended meanwhile
            subject, refusal = self._connections[number].subject, RateLimited(wait_ms, "rate")
            record = Record("refused", "authorize", number, subject, None, str(refusal), cause=refusal.cause)
            self._audit.refuse(record, time.monotonic())

    # ---- the launcher's link

    def _read_launcher(self) -> bool:
        """Do what the launcher says; false when it is gone, which ends the service."""
        os.close(self._spare)  # a place for the policy, however many descriptors clients make us hold
        try:
            received = self._launcher.receive_with_descriptors(1)
            return received is None or self._obey(*received)
        finally:
            self._spare = os.dup(self._woken)

    def _obey(self, data: bytes, descriptors: list[int]) -> bool:
        if not data:
            return False
        try:
            match link.LAUNCHER_TO_OPENER.decode(data):
                case link.Policy(number):
                    self._use(from_bytes(memfd.read(descriptors[0], limits.POLICY_LINK_BYTES)), number)
                    self._launcher.send(_to_launcher(link.Applied(number)))
                case admin.Judged(number, home):
                    if self._state_of(number) in ("stopping", "reloading"):
                        self._judged(self._connections[number], home=home)
                case admin.Reloaded(number, _):
                    if self._state_of(number) == "reloading":
                        connection = self._connections[number]
                        connection.turn("Reloaded")
                        self._inbox.send(data)
                case link.Stop():
                    self._stop()
                case link.Ping():
                    self._pings += 1
                    self._inbox.send(link.PING)
                case other:
                    assert_never(other)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return True

    def _state_of(self, number: int) -> str:
        """Of a connection for which the launcher has done something; it may have ended meanwhile."""
        connection = self._connections.get(number)
        return "gone" if connection is None else connection.state

    def _use(self, policy: Policy, number: int) -> None:
        """Judge by `policy` from the next request on; inbox and keeper have it, too, by that number."""
        self._views = self._door.views = views(policy)
        self._asking.owners = policy.owners
        message = _to_inbox(Use(number, len(self._connections)))
        self._inbox.send(message)
        self._keeper.send(message)
        for connection in self._connections.values():
            connection.judge_by(*self._views.of(connection.subject))
            message = came(connection.number, connection.subject, self._views)
            self._inbox.send(message)
            self._keeper.send(message)

    def _stop(self) -> None:
        if not self._door.closed:
            if self._accepting:
                self._epoll.unregister(self._door.fileno())
                self._accepting = False
            self._door.close()
            self._asking.hurry()
            self._audit.flush(time.monotonic(), everything=True)  # now, for there may be no later
            self._inbox.send(link.DRAIN)

    def report_violation(self, violation: LinkViolation) -> None:
        """Record why the service ends."""
        with contextlib.suppress(NotRecorded):
            self._audit.write(Record("violation", "decode", 0, None, None, f"between our processes: {violation}"))
