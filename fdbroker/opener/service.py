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
from functools import partial
from typing import assert_never

from fdbroker.kernel import memfd
from fdbroker.kernel.jobs import Jobs
from fdbroker.kernel.link import Link
from fdbroker.kernel.records import NotRecorded
from fdbroker.limits import opener as limits
from fdbroker.opener.ask import Asking
from fdbroker.opener.audit import Audit
from fdbroker.opener.authorize import (
    Connection,
    authorize_administrator,
    authorize_request,
)
from fdbroker.opener.close import Closing
from fdbroker.opener.door import Door, came
from fdbroker.opener.open import THREAD, WORKER, Nodes
from fdbroker.opener.request import Opening, answer
from fdbroker.opener.views import views
from fdbroker.policy.compiled import Policy, from_bytes
from fdbroker.refusals import Denied, LinkViolation, RateLimited, Refused
from fdbroker.wire import admin, keeper, link
from fdbroker.wire.audit import Record
from fdbroker.wire.connections import Use

_RETRY_MS = limits.JOURNAL_RETRY_MS
_OWED_S = _RETRY_MS / 1000
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
        asking.owners, asking.answered = policy.owners, self._go_on
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
            # the inbox has drained and closed its end: what was to be said was for a client that has left
        finally:
            for opening in (*self._later, *self._opened):
                opening.steps.close()
        room = select.poll()
        room.register(self._keeper.fileno(), select.POLLOUT)
        end_s = time.monotonic() + limits.DRAIN_SECONDS
        while self._keeper.waiting and (left_s := end_s - time.monotonic()) > 0:  # the last refusals: it ends after us
            room.poll(left_s * 1000)
            self._keeper.flush()

    def _serve(self) -> None:
        poll = self._epoll
        poll.register(self._woken, select.EPOLLIN)
        self._launcher.send(link.READY)
        inbox, keeper_, launcher = self._inbox.fileno(), self._keeper.fileno(), self._launcher.fileno()
        timeout_s, calm = -1.0, False
        while True:
            was_calm, calm = calm, self._calm
            if not (was_calm and calm):
                timeout_s = self._timers()
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
                    if events & ~select.EPOLLOUT:
                        self._read_keeper()
                elif descriptor == launcher:
                    if events & select.EPOLLOUT:
                        self._launcher.flush()
                    if events & ~select.EPOLLOUT and not self._read_launcher():
                        return
                elif descriptor == self._asking.fileno():
                    self._asking.read()
                elif descriptor == self._woken:
                    os.eventfd_read(self._woken)
                    while self._opened:
                        self._go_on(self._opened.popleft())
                else:
                    self._door.accept()

    @property
    def _calm(self) -> bool:
        """Whether messages alone set something off: nothing is due later, and nothing waits for room in a link."""
        busy = self._later or self._door.busy or self._audit.owes or self._asking.timeout_s >= 0
        return not (busy or self._inbox.waiting or self._keeper.waiting or self._launcher.waiting)

    def _arm(self) -> None:
        """Poll for what can be used: room in a link if messages wait for it, and else questions and new connections."""
        wants_room = bool(self._inbox.waiting or self._door.holds)
        # while inbox or keeper does not take what we tell it, no more is asked: what waits for them stays bounded
        full = wants_room or self._keeper.waiting > limits.KEEPER_WAITING
        self._inbox.poll(self._epoll, read=not full, write=wants_room)
        self._keeper.poll(self._epoll, read=not (wants_room or self._door.paused))
        self._asking.poll(self._epoll)
        self._launcher.poll(self._epoll)
        if self._door.closed:
            return
        wanted = not (full or self._keeper.waiting or self._door.paused or self._door.knocks)
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
        now_s = time.monotonic()
        self._door.sweep(now_s)
        self._audit.flush()
        if self._asking.timeout_s == 0 and self._asking.expire():
            self._launcher.send(link.WORKER_STUCK)
        ends_s = [self._asking.timeout_s, self._door.timeout_s, 0.0 if self._later else -1]
        if self._audit.owes:
            ends_s.append(_OWED_S)
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
                opening = Opening(self._turn(number, "Open"), resources, self._closing)
                opening.steps = answer(opening, self._nodes, self._audit)
                self._go_on(opening)
            case link.Shutdown(number):
                self._administer(self._turn(number, "Shutdown"))
            case admin.Reload(number):
                self._administer(self._turn(number, "Reload"))
            case link.Closed(number, reason):
                self._close(self._turn(number, "Closed"), reason)
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
        self._door.note_work(connection.subject.owner)
        return connection

    def _go_on(self, opening: Opening, refusal: Refused | None = None) -> None:
        """Until it waits, or has its outcome; `refusal` is the worker's."""
        connection, steps = opening.connection, opening.steps
        if connection.number not in self._connections:  # it has ended meanwhile
            steps.close()
            opening.close()
            return
        try:
            waits_for = next(steps) if refusal is None else steps.throw(refusal)
        except StopIteration as end:
            try:
                self._end_turn(connection, end.value, opening.sent_s)
            finally:
                opening.close()  # the inbox was told first: its client can ask again meanwhile
            return
        opening.wait(waits_for)
        if waits_for == WORKER:
            self._asking.ask(opening)
        elif waits_for == THREAD:
            self._slow.put(connection.subject.owner, partial(self._open_slowly, opening))
        else:
            self._later.append(opening)

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
        self._audit.refuse(Record("refused", "authorize", number, subject, why, refusal.cause))
        self._end_turn(connection, refusal)

    def _close(self, connection: Connection, reason: int) -> None:
        if reason:
            why = link.CLOSED_REASONS[reason]
            self._audit.refuse(Record("disconnected", "decode", connection.number, connection.subject, why))
            if reason != link.NOT_TAKEN:
                self._keeper.send(_to_keeper(keeper.Broke(connection.number)))
        self._door.end(connection, never_taken=reason == link.NOT_TAKEN)
        del self._connections[connection.number]

    # ---- administrators

    def _administer(self, connection: Connection) -> None:
        """Have it judged whether an administrator asks from our own user namespace; `_judged` goes on."""
        try:
            authorize_request(connection, time.monotonic())
            authorize_administrator(connection)
            pidfd, sent = None, False
            with contextlib.suppress(OSError):  # no descriptor is left for it, or too many are on their way
                pidfd = self._door.identifier.process(connection.sock, connection.subject, connection.let_in_s)
                if pidfd is None:
                    raise Denied("the kernel does not say which process it is")
                sent = self._launcher.send_with_descriptors(_to_launcher(admin.Judge(connection.number)), [pidfd])
            if pidfd is not None:
                os.close(pidfd)
            if not sent:
                raise RateLimited(_RETRY_MS, "busy")
        except Refused as refusal:
            self._refuse(connection, refusal)

    def _judged(self, connection: Connection, *, home: bool) -> None:
        """Have the launcher do what an administrator asks for."""
        stop = connection.state == "stopping"
        try:
            if not home:
                raise Denied("it is not shown to be in the user namespace of the service")
            kind = "stopping" if stop else "reloading"
            record = Record(kind, "authorize", connection.number, connection.subject, "it was asked to")
            self._audit.write(record)
        except NotRecorded:
            self._end_turn(connection, RateLimited(_RETRY_MS, "journal"))
        except Refused as refusal:
            self._refuse(connection, refusal)
        else:
            self._launcher.send(_to_launcher(link.StopAsked() if stop else admin.ReloadAsked(connection.number)))

    # ---- the keeper's link

    def _read_keeper(self) -> None:
        """Let in, or turn away, whom the keeper says."""
        data = self._keeper.receive()
        if data is not None:
            if not data:
                raise LinkViolation("the keeper is gone")
            self._door.answered(keeper.KEEPER_TO_OPENER.decode(data))

    # ---- the launcher's link

    def _read_launcher(self) -> bool:
        """Do what the launcher says; false when it is gone, which ends the service."""
        if self._spare >= 0:
            os.close(self._spare)  # so that a policy's memfd can be received at RLIMIT_NOFILE
        self._spare = -1
        try:
            received = self._launcher.receive_with_descriptors(1)
            return received is None or self._obey(*received)
        finally:
            with contextlib.suppress(OSError):  # a thread was quicker: without it until the next message
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
            connection.view = self._views.of(connection.subject)
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
            self._audit.flush()  # now, for there may be no later
            self._inbox.send(link.DRAIN)

    def report_violation(self, violation: LinkViolation) -> None:
        """Record why the service ends."""
        with contextlib.suppress(NotRecorded):
            self._audit.write(Record("violation", "decode", 0, None, f"between our processes: {violation}"))
