"""The way of a request: the stages of one Open, straight down, in `answer`. All else in this package serves it.

Runs in: opener. Identity was taken when the connection came (identify); the inbox has decoded the bytes (decode).
"""

from __future__ import annotations

import errno
import os
import time
from collections import Counter
from collections.abc import Generator, Sequence
from types import TracebackType

from fdbroker import limits
from fdbroker.kernel.processes import is_alive
from fdbroker.kernel.records import NotRecorded
from fdbroker.nodes.find import Found
from fdbroker.opener.audit import Audit, Record
from fdbroker.opener.authorize import (
    Connection,
    authorize_grants,
    authorize_presence,
    authorize_records,
    authorize_request,
    authorize_resources,
)
from fdbroker.opener.close import Closing
from fdbroker.opener.open import Nodes, sleeps
from fdbroker.opener.send import compose, send_grants
from fdbroker.refusals import Denied, OpenFailed, RateLimited, Refused
from fdbroker.terms import Device, Grant, Resource, Rule

_JOURNAL_RETRY_MS = limits.JOURNAL_RETRY_MS
# What a request waits for, while others are served: the namespaces worker, its next turn, a thread of its owner's.
WORKER, TURN, THREAD = range(3)


class Opening:
    """One Open on its way: what is asked for, what allows it, what is open already. Owns those descriptors.

    While `open_nodes` runs in a thread, nobody else touches `found` and `descriptors`.
    """

    __slots__ = (
        *("allowed", "closing", "connection", "counted", "descriptors", "failure", "found", "grants", "owners"),
        *("recorded", "resources", "sent_s", "steps", "view"),
    )

    steps: Generator[int, None, Refused | None]  # of `answer`

    def __init__(self, connection: Connection, resources: Sequence[Resource], closing: Closing) -> None:
        self.connection = connection
        self.resources = resources
        self.closing = closing
        self.view = connection.view
        self.allowed: Sequence[tuple[Rule, ...]] = ()
        self.found: dict[int, Found] = {}  # by the resource's position, and so are grants and descriptors
        self.grants: dict[int, Grant] = {}
        self.descriptors: dict[int, int] = {}
        self.owners: dict[int, int] = {}  # pidfds of the processes that must still live when all is sent
        self.failure: Refused | OSError | None = None
        self.recorded: dict[Grant, int] = {}  # how many of each
        self.counted = 0  # descriptors that count for the owner while this waits
        self.sent_s = 0.0  # of this thread's time, for sending

    def missing(self) -> int | None:
        """The position of the next resource that the worker has to open."""
        for index, resource in enumerate(self.resources):
            if index not in self.grants and not isinstance(resource, Device):
                return index
        return None

    @property
    def sleeps(self) -> bool:
        """Whether opening what was found may take its time."""
        return any(sleeps(one.node.status) for one in self.found.values())

    def open_nodes(self, nodes: Nodes) -> None:
        """Open the nodes that were found. Runs in a thread: an error becomes `failure`."""
        try:
            nodes.open_all(self.resources, self.found, self.descriptors)
        except (Refused, OSError) as error:
            self.failure = error

    def wait(self) -> None:
        """Others are served until this goes on: for so long, all of it counts for the owner."""
        if not self.counted:
            self.counted = len(self.resources)
            self.connection.account.opening += self.counted

    def resume(self) -> None:
        """The wait is over."""
        self.connection.account.opening -= self.counted
        self.counted = 0

    def close(self) -> None:
        """Close every descriptor that was opened for it; the client has its own by then."""
        self.resume()
        while self.found:
            os.close(self.found.popitem()[1].node.descriptor)  # O_PATH: nothing sleeps
        while self.owners:
            os.close(self.owners.popitem()[1])
        self.closing.close(self.connection, self.descriptors)


class _Ended(Exception):
    """A request ended with `refusal`, in the stage that a record calls `stage`."""

    def __init__(self, stage: str, refusal: Refused) -> None:
        super().__init__(stage, refusal)
        self.stage = stage
        self.refusal = refusal


class _Stage:
    """Whatever goes wrong in the block ends the request in this stage."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        match error:
            case Refused():
                raise _Ended(self._name, error) from None
            case NotRecorded():
                raise _Ended(self._name, RateLimited(_JOURNAL_RETRY_MS, "journal")) from None
            case OSError():  # the client is gone, or a fault of ours: it gets nothing either way
                raise _Ended(self._name, OpenFailed(error.errno or errno.EIO)) from None


_AUTHORIZE, _OPEN, _AUDIT, _SEND = (_Stage(name) for name in ("authorize", "open", "audit", "send"))


def answer(opening: Opening, nodes: Nodes, audit: Audit) -> Generator[int, None, Refused | None]:
    """Grant everything that is asked for, or nothing. Returns None when the reply has left, else how to refuse.

    Gives WORKER, TURN or THREAD, and goes on when that is done: what is `missing` is there, others have had their turn,
    `open_nodes` has run in a thread. A refusal of the worker's is thrown in.
    """
    connection, resources, count = opening.connection, opening.resources, len(opening.resources)
    try:
        with _AUTHORIZE:
            now_s = time.monotonic()
            authorize_request(connection, now_s, count)
            authorize_presence(connection, count)
            opening.allowed = authorize_resources(connection, resources)
            authorize_grants(connection, count, now_s)
            authorize_records(connection, len(set(resources)), now_s)
        with _OPEN:
            if opening.missing() is not None:
                yield WORKER
                _authorize_again(opening)
            while not nodes.judge_some(resources, opening.allowed, opening.view, opening.found):
                yield TURN
                _authorize_again(opening)
            if opening.sleeps:
                yield THREAD
                if opening.failure is not None:
                    raise opening.failure
                _authorize_again(opening)
            else:
                nodes.open_all(resources, opening.found, opening.descriptors)
            opening.resume()
            for index, one in opening.found.items():
                opening.grants[index] = Grant(resources[index], one.rule, one.node.facts.number)
            grants = [opening.grants[index] for index in range(count)]
            reply = compose(grants)
        with _AUDIT:
            _record_grants(opening, grants, audit)
        with _SEND:
            _owners_live(opening)
            began_s = time.thread_time()
            send_grants(connection.sock, reply, [opening.descriptors[index] for index in range(count)])
            opening.sent_s = time.thread_time() - began_s
            connection.note_sent(len(reply), count)
    except _Ended as end:
        _refuse(opening, end, audit)
        return end.refusal
    opening.close()
    return None


def _authorize_again(opening: Opening) -> None:
    """Another policy may have come while this waited. Raises Denied.

    What was found and made so far was by rules that must still be there, and by ways that nobody is denied now.
    """
    if opening.connection.view is opening.view:
        return
    opening.view = opening.connection.view
    with _AUTHORIZE:
        opening.allowed = authorize_resources(opening.connection, opening.resources)
        used: list[tuple[int, Rule]] = [(index, one.rule) for index, one in opening.found.items()]
        used += [(index, grant.rule) for index, grant in opening.grants.items()]
        for index, rule in used:
            if rule not in opening.allowed[index]:
                raise Denied("the rule that allowed it is gone", index=index)
        for index, one in opening.found.items():
            one.node.judge_way(opening.view, index)


def _record_grants(opening: Opening, grants: Sequence[Grant], audit: Audit) -> None:
    number, subject = opening.connection.number, opening.connection.subject
    for grant, count in Counter(grants).items():
        audit.grant(number, subject, grant, count)
        opening.recorded[grant] = count


def _owners_live(opening: Opening) -> None:
    for index, pidfd in opening.owners.items():
        if not is_alive(pidfd):
            raise Denied("the process has ended", index=index)


def _refuse(opening: Opening, end: _Ended, audit: Audit) -> None:
    """Record the refusal and close every descriptor that was opened for the request."""
    opening.close()
    connection, subject, refusal = opening.connection, opening.connection.subject, end.refusal
    for grant, count in opening.recorded.items():  # the outcome differs from the record, and that is said for each
        why = str(refusal)
        record = Record("undone", end.stage, connection.number, subject, grant.resource, why, cause=refusal.cause)
        audit.undo(record._replace(times=count))
    if opening.recorded:
        connection.account.note_records(time.monotonic(), len(opening.recorded))
    else:
        resource = opening.resources[refusal.index or 0]
        rule = refusal.rule if isinstance(refusal, Denied) else ""
        record = Record("refused", end.stage, connection.number, subject, resource, str(refusal), rule)
        audit.refuse(record._replace(cause=refusal.cause), time.monotonic())
