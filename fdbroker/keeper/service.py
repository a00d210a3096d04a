"""The keeper's loop: who is there, by the opener's word; what they ask to have listed, by the inbox's.

Runs in: keeper. A taken-over inbox controls every message of its link: whatever is unknown, mis-sized or out of turn
raises LinkViolation, which ends the service. It gets names of nodes, and nothing that it could open.
"""

from __future__ import annotations

import contextlib
import select
import time
from typing import assert_never

from fdbroker.keeper.changes import Changes
from fdbroker.keeper.connections import Connection, Owners
from fdbroker.keeper.listing import Lister
from fdbroker.kernel.link import Link
from fdbroker.nodes.find import Finder
from fdbroker.policy.compiled import Policy
from fdbroker.policy.decide import View
from fdbroker.policy.views import Views
from fdbroker.refusals import LinkViolation
from fdbroker.renewal import Renewal
from fdbroker.wire import connections, keeper, link, lists

_MESSAGES_PER_TURN = 64
_to_launcher, _to_opener = keeper.KEEPER_TO_LAUNCHER.encode, keeper.KEEPER_TO_OPENER.encode


class Keeper:
    """All that the keeper holds. `serve` returns when it is told to stop, or launcher or opener is gone."""

    def __init__(self, launcher: Link, opener: Link, inbox: Link, policy: Policy, finder: Finder) -> None:
        self._launcher = launcher
        self._opener = opener
        self._inbox = inbox
        self._views = Views(policy, _just_the_view)
        self._renewal = Renewal(launcher)
        self._connections: dict[int, Connection] = {}
        self._last = 0  # the highest number of a connection so far
        self._owners = Owners()
        self._changes = Changes()
        self._lister = Lister(finder, self._changes.descriptor)
        self._epoll = select.epoll()

    def serve(self) -> None:
        """Serve. Raises LinkViolation and OSError: then the process must end."""
        poll, launcher, opener, inbox = self._epoll, self._launcher, self._opener, self._inbox
        poll.register(self._changes.descriptor, select.EPOLLIN)
        launcher.send(_to_launcher(link.Ready()))
        timeout_s = -1.0
        while True:
            launcher.poll(poll)
            opener.poll(poll)
            if inbox.fileno() >= 0:  # while it does not take our answers, or some are to come, its next questions wait
                inbox.poll(poll, read=not (inbox.waiting or opener.waiting or self._renewal.to_come))
            ready = dict(poll.poll(timeout_s))
            for one in (launcher, opener):
                if ready.get(one.fileno(), 0) & select.EPOLLOUT:
                    one.flush()
            if ready.get(inbox.fileno(), 0) & select.EPOLLOUT:
                with contextlib.suppress(OSError):  # it has ended, as the launcher knows
                    inbox.flush()
            if launcher.fileno() in ready and not self._read_launcher():
                return
            if opener.fileno() in ready and not self._read_opener():
                return
            if self._changes.descriptor in ready:
                self._changes.note(time.monotonic())
                poll.modify(self._changes.descriptor, 0)
            if ready.get(inbox.fileno(), 0) & ~select.EPOLLOUT:
                self._read_inbox()
            timeout_s = self._timers()

    def _timers(self) -> float:
        """Look at what is to be listed, and return in how many seconds there is more to do; -1: with a message."""
        if self._inbox.waiting or self._renewal.to_come:
            return -1
        if self._lister.busy:
            self._list_some()
        if self._changes.waiting and self._changes.take(time.monotonic(), news=self._lister.news):
            self._epoll.modify(self._changes.descriptor, select.EPOLLIN)
            self._lister.list_again()
        return 0.0 if self._lister.busy else self._changes.timeout_s(time.monotonic())

    def _list_some(self) -> None:
        """Look at the next few nodes that somebody wants listed, and hand on what is done."""
        for connection, parts in self._lister.step(time.monotonic()):
            connection.turn("Offered")
            for part in parts:
                self._tell_inbox(part)

    def _tell_inbox(self, message: bytes) -> None:
        with contextlib.suppress(OSError):  # it has ended, as the launcher knows
            self._inbox.send(message)

    # ---- the links

    def _read_launcher(self) -> bool:
        """Do what the launcher says; false when it says stop, or is gone."""
        while (received := self._launcher.receive_with_descriptors(1)) is not None:
            data, descriptors = received
            if not data:
                return False
            match keeper.LAUNCHER_TO_KEEPER.decode(data):
                case link.Policy(number):
                    self._renewal.put(number, descriptors)
                case keeper.Given() as given:
                    self._lister.given = given
                case link.Ping():
                    self._launcher.send(_to_launcher(link.Pong()))
                case link.Stop():
                    return False
                case other:
                    assert_never(other)
        return True

    def _read_opener(self) -> bool:
        """Do what the opener says; false when it is gone."""
        while (data := self._opener.receive()) is not None:
            if not data:
                return False
            match keeper.OPENER_TO_KEEPER.decode(data):
                case connections.Came() as came:
                    self._came(came)
                case connections.Use(number, count):
                    self._use(number, count)
                case keeper.Ended(number):
                    ended = self._connections.pop(number, None)
                    if ended is not None:
                        self._lister.drop(ended)
                case other:
                    assert_never(other)
        return True

    def _came(self, came: connections.Came) -> None:
        subject, number = came.subject, came.connection
        seen = self._views.of(subject)
        work = self._owners.of(subject.owner, seen.limits["burst"], time.monotonic())
        known = self._connections.get(number)
        if known is not None:  # or another one, which has the number of one that was turned away after all
            known.subject, known.view, known.work = subject, seen, work
        else:
            self._connections[number] = Connection(number, subject, seen, work)
            self._last = max(self._last, number)
        self._renewal.came()

    def _use(self, number: int, count: int) -> None:
        """The opener judges by that policy now; whoever is there comes again, and nobody is answered before."""
        if not self._renewal.knows(number):
            self._read_launcher()  # which has sent it to us before
        self._views = Views(self._renewal.use(number, count), _just_the_view)
        self._lister.list_again()

    def _read_inbox(self) -> None:
        for _ in range(_MESSAGES_PER_TURN):
            data = self._inbox.receive()
            if data is None:
                return
            if not data:
                self._epoll.unregister(self._inbox.fileno())
                self._inbox.close()
                return
            self._read_opener()  # a connection that the inbox knows, the opener has told of before
            self._list(lists.INBOX_TO_KEEPER.decode(data))

    def _list(self, asked: lists.List) -> None:
        number, watch = asked
        connection = self._connections.get(number)
        if connection is None:
            if number > self._last:
                raise LinkViolation(f"List in the name of connection {number}, which does not exist")
            return  # it has ended meanwhile
        connection.turn("Watch" if watch else "List")
        wait_ms = connection.take(time.monotonic())
        if wait_ms:
            connection.turn("Outcome")
            self._tell_inbox(lists.KEEPER_TO_INBOX.encode(keeper.ListRefused(number, wait_ms)))
            self._opener.send(_to_opener(keeper.ListRefused(number, wait_ms)))
        else:
            self._lister.add(connection)


def _just_the_view(seen: View) -> View:
    return seen
