"""The keeper's loop: who is there and what is refused, by the opener's word; what is to be listed, by the inbox's.

Runs in: keeper. A taken-over inbox controls every message of its link: whatever is unknown, mis-sized or out of turn
raises LinkViolation, which ends the service. It gets names of nodes, and nothing that it could open.
"""

from __future__ import annotations

import contextlib
import select
import time
from typing import assert_never

from fdbroker.keeper.changes import Changes
from fdbroker.keeper.connections import Connection
from fdbroker.keeper.entry import Entry
from fdbroker.keeper.listing import Lister
from fdbroker.keeper.refusals import Refusals
from fdbroker.kernel.link import Link
from fdbroker.nodes.find import Finder
from fdbroker.policy.compiled import Policy
from fdbroker.policy.decide import View, view
from fdbroker.policy.views import Views
from fdbroker.refusals import Denied, LinkViolation, RateLimited, Refused
from fdbroker.renewal import Renewal
from fdbroker.terms import Subject
from fdbroker.topics import TopicUse
from fdbroker.wire import connections, keeper, link, lists
from fdbroker.wire.audit import Record
from fdbroker.wire.launcher import KEEPER_TO_LAUNCHER, LAUNCHER_TO_KEEPER, Given

_MESSAGES_PER_TURN = 64
# What the inbox has said for the record may be read after the opener's word that the connection has ended. So as many
# of the last ones are remembered; a link holds some hundred messages.
_ENDED_KEPT = 1024
_SLOWED = "it is read more slowly than it sends"
_TOO_OFTEN = "it connects, or breaks its connections, too often: the next ones wait"
_to_launcher, _to_opener = KEEPER_TO_LAUNCHER.encode, keeper.KEEPER_TO_OPENER.encode


class Keeper:
    """All that the keeper holds. `serve` returns when launcher or opener is gone, and then all counts are written."""

    def __init__(
        self, launcher: Link, opener: Link, inbox: Link, policy: Policy, finder: Finder, refusals: Refusals
    ) -> None:
        self._launcher = launcher
        self._opener = opener
        self._inbox = inbox
        self._views = Views(policy, view, _just_the_view)
        self._renewal = Renewal(launcher)
        self._connections: dict[int, Connection] = {}
        self._ended: dict[int, Connection] = {}  # the last of them
        self._refusals = refusals
        self._stops = False  # told so, and the counts are not written yet
        self._last = 0  # the highest number of a connection so far
        self._entry = Entry(policy.limits, self._answer)
        self._changes = Changes()
        self._lister = Lister(finder, self._changes.descriptor)
        self._epoll = select.epoll()

    def serve(self) -> None:
        """Serve. Raises LinkViolation and OSError: then the process must end."""
        try:
            self._serve()
            self._hear_all()
        finally:
            self._refusals.flush(time.monotonic(), everything=True)

    def _serve(self) -> None:
        poll, launcher, opener, inbox = self._epoll, self._launcher, self._opener, self._inbox
        poll.register(self._changes.descriptor, select.EPOLLIN)
        launcher.send(_to_launcher(link.Ready()))
        timeout_s = -1.0
        while True:
            launcher.poll(poll)
            opener.poll(poll)
            if inbox.fileno() >= 0:  # while it does not take our answers, or some are to come, its next questions wait
                inbox.poll(poll, read=not (inbox.waiting or self._renewal.to_come))
            ready = dict(poll.poll(timeout_s))
            for one in (launcher, opener, inbox):
                if ready.get(one.fileno(), 0) & select.EPOLLOUT:
                    with contextlib.suppress(OSError):  # it has ended, as is read next, or as the launcher knows
                        one.flush()
            if launcher.fileno() in ready and not self._read_launcher():
                return
            if opener.fileno() in ready and not self._read_opener():
                return
            if self._stops:  # the end is that of the opener; but when that is late, all are killed
                self._stops = False
                self._hear_all()
                self._refusals.flush(time.monotonic(), everything=True)
            if self._changes.descriptor in ready:
                self._changes.note(time.monotonic())
                poll.modify(self._changes.descriptor, 0)
            if ready.get(inbox.fileno(), 0) & ~select.EPOLLOUT:
                self._read_inbox()
            timeout_s = self._timers()

    def _timers(self) -> float:
        """Do what is due now, and return in how many seconds there is more to do; -1: with a message."""
        now_s = time.monotonic()
        self._refusals.flush(now_s)
        ends_s = [self._entry.step(now_s), self._refusals.timeout_s(now_s)]
        if not (self._inbox.waiting or self._renewal.to_come):
            ends_s.append(self._look())
        return min((end_s for end_s in ends_s if end_s >= 0), default=-1)

    def _look(self) -> float:
        """Look at what is to be listed, and return in how many seconds there is more to look at; -1: with a message."""
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
        """Do what the launcher says; false when it is gone."""
        while (received := self._launcher.receive_with_descriptors(1)) is not None:
            data, descriptors = received
            if not data:
                return False
            match LAUNCHER_TO_KEEPER.decode(data):
                case link.Policy(number):
                    self._renewal.put(number, descriptors)
                case Given() as given:
                    self._lister.given = given
                case link.Ping():
                    self._launcher.send(_to_launcher(link.Pong()))
                case link.Stop():
                    self._stops = True
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
                case keeper.Knock(number, uid, gid, pid, owner):
                    if self._entry.knock(number, owner, time.monotonic()):
                        self._note_too_often(Subject(uid, (), gid, pid, "", "", foreign=True, owner=owner))
                case keeper.Lingers(number):
                    self._end(number)
                case keeper.Ended(number):
                    self._end(number)
                    self._entry.ended(number)
                case keeper.Weighs(number, count):
                    self._entry.weighs(number, count, time.monotonic())
                case keeper.Stalled(owner, took_us):
                    self._entry.stalled(owner, took_us, time.monotonic())
                case keeper.Broke(number):
                    if self._entry.broke(number, time.monotonic()) and number in self._connections:
                        self._note_too_often(self._connections[number].subject)
                case keeper.HungUp(number):
                    self._entry.hung_up(number)
                case keeper.Contested():
                    self._entry.contested(time.monotonic())
                case Record() as record:
                    self._refusals.add(record, time.monotonic())
                case other:
                    assert_never(other)
        return True

    def _answer(self, said: keeper.LetIn | keeper.Waits | keeper.TurnAway) -> None:
        with contextlib.suppress(OSError):  # it has ended, as we read next
            self._opener.send(_to_opener(said))

    def _note_too_often(self, subject: Subject) -> None:
        self._refusals.add(Record("slowed", "accept", 0, subject, _TOO_OFTEN), time.monotonic())

    def _came(self, came: connections.Came) -> None:
        subject, number = came.subject, came.connection
        seen = self._views.of(subject)
        owner = self._entry.owner(subject.owner, time.monotonic())
        owner.maxima = seen.limits
        known = self._connections.get(number)
        if known is not None:
            known.subject, known.view, known.work = subject, seen, owner.work
        else:
            self._connections[number] = Connection(number, subject, seen, owner.work)
            self._last = max(self._last, number)
        self._renewal.came()

    def _end(self, number: int) -> None:
        ended = self._connections.pop(number, None)
        if ended is not None:
            self._lister.drop(ended)
            if len(self._ended) >= _ENDED_KEPT:
                del self._ended[next(iter(self._ended))]
            self._ended[number] = ended

    def _use(self, number: int, count: int) -> None:
        """The opener judges by that policy now; whoever is there comes again, and nobody is answered before."""
        if not self._renewal.knows(number):
            self._read_launcher()  # which has sent it to us before
        policy = self._renewal.use(number, count)
        self._views, self._entry.maxima = Views(policy, view, _just_the_view), policy.limits
        self._lister.list_again()

    def _hear_all(self) -> None:
        """What opener and inbox have said up to now."""
        self._read_opener()
        while self._inbox.fileno() >= 0 and self._read_inbox():
            pass

    def _read_inbox(self) -> bool:
        """Do what the inbox says; false when there is no more now."""
        for _ in range(_MESSAGES_PER_TURN):
            data = self._inbox.receive()
            if data is None:
                return False
            if not data:
                self._epoll.unregister(self._inbox.fileno())
                self._inbox.close()
                return False
            self._read_opener()  # a connection that the inbox knows, the opener has told of before
            match lists.INBOX_TO_KEEPER.decode(data):
                case lists.List(number, watch):
                    self._list(number, "Watch" if watch else "List")
                case lists.DeniedUse(number, use):
                    self._note(self._turned(number, "DeniedUse"), "refused", "authorize", Denied(), use)
                case lists.Slowed(number):
                    self._note(self._turned(number, "Slowed"), "slowed", "decode", _SLOWED)
                case other:
                    assert_never(other)
        return True

    def _list(self, number: int, event: str) -> None:
        connection = self._connections.get(number)
        if connection is None:
            self._must_have_been(number, event)
            return  # it has ended meanwhile
        connection.turn(event)
        wait_ms = connection.take(time.monotonic())
        if wait_ms:
            connection.turn("Outcome")
            self._tell_inbox(lists.KEEPER_TO_INBOX.encode(lists.ListRefused(number, wait_ms)))
            self._note(connection, "refused", "authorize", RateLimited(wait_ms, "rate"))
        else:
            self._lister.add(connection)

    def _turned(self, number: int, event: str) -> Connection | None:
        """The connection, after `event`, that the inbox has something to record of; None when it ended long ago."""
        connection = self._connections.get(number) or self._ended.get(number)
        if connection is None:
            self._must_have_been(number, event)
        else:
            connection.turn(event)
        return connection

    def _must_have_been(self, number: int, event: str) -> None:
        if not 0 < number <= self._last:
            raise LinkViolation(f"{event} in the name of connection {number}, which does not exist")

    def _note(
        self, of: Connection | None, kind: str, stage: str, why: Refused | str, use: TopicUse | None = None
    ) -> None:
        """Record what was refused to a connection, or count it."""
        if of is not None:
            cause = why.cause if isinstance(why, Refused) else ""
            what = ("", use.text, use.access) if use is not None else ()
            self._refusals.add(Record(kind, stage, of.number, of.subject, str(why), cause, *what), time.monotonic())


def _just_the_view(seen: View) -> View:
    return seen
