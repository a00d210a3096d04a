"""The way of a request: the stages of one Open, straight down, in `answer`. All else in this package serves it.

Runs in: opener. Identity was taken when the connection came (identify); the inbox has decoded the bytes (decode).
"""

from __future__ import annotations

import errno
import os
import time
from collections import Counter
from collections.abc import Generator, Sequence

from fdbroker.kernel.processes import is_alive
from fdbroker.kernel.records import NotRecorded
from fdbroker.limits import opener as limits
from fdbroker.nodes.find import Node
from fdbroker.opener.audit import Audit
from fdbroker.opener.authorize import (
    Connection,
    authorize_grants,
    authorize_presence,
    authorize_records,
    authorize_request,
    authorize_resources,
)
from fdbroker.opener.close import Closing
from fdbroker.opener.open import TURN, WORKER, Nodes
from fdbroker.opener.send import compose, send_grants
from fdbroker.opener.views import Permit
from fdbroker.refusals import Denied, OpenFailed, RateLimited, Refused
from fdbroker.terms import Device, Grant, Namespace, Resource, Rule, Socket
from fdbroker.wire.audit import Record


class _Withdrawn(Exception):
    """While a request waited, a policy came that denies it."""

    def __init__(self, denied: Denied) -> None:
        super().__init__(denied)
        self.denied = denied


_ERRORS = (_Withdrawn, Refused, NotRecorded, OSError)


class Opening:
    """One Open on its way: what is asked for, what allows it, what is open already. Owns those descriptors.

    While `open_nodes` runs in a thread, nobody else touches `found`, `grants` and `descriptors`.
    """

    __slots__ = (
        *("closing", "connection", "counted", "descriptors", "failure", "found", "grants", "owners", "permits"),
        *("recorded", "resources", "sent_s", "slow", "steps", "view"),
    )

    steps: Generator[int, None, Refused | None]  # of `answer`

    def __init__(self, connection: Connection, resources: Sequence[Resource], closing: Closing) -> None:
        self.connection = connection
        self.resources = resources
        self.closing = closing
        self.view = connection.view
        self.permits: Sequence[Permit] = ()
        self.found: dict[int, Node] = {}  # by the resource's position, and so are grants and descriptors
        self.grants: dict[int, Grant] = {}
        self.descriptors: dict[int, int] = {}
        self.owners: dict[int, int] = {}  # pidfds of the processes that must still live when all is sent
        self.failure: Refused | OSError | None = None
        self.recorded = Counter[Grant]()  # how many of each
        self.counted = 0  # descriptors that count for the owner while this waits
        self.slow = False  # whether closing these may take its time
        self.sent_s = 0.0  # of this thread's time, for sending

    def missing(self) -> dict[int, Namespace | Socket]:
        """What the worker has to open, and has not: by position."""
        asked = enumerate(self.resources)
        return {index: one for index, one in asked if index not in self.grants and not isinstance(one, Device)}

    def open_nodes(self, nodes: Nodes) -> None:
        """Open the nodes that were found. Runs in a thread: an error becomes `failure`."""
        try:
            nodes.open_some(self.permits, self.view, self.found, self.grants, self.descriptors, sleep=True)
        except (Refused, OSError) as error:
            self.failure = error

    def wait(self, waits_for: int) -> None:
        """Others are served until this goes on: for so long, all of it counts for the owner."""
        self.slow |= waits_for != TURN
        if not self.counted:
            self.counted = len(self.resources)
            self.connection.account.opening += self.counted
            self.connection.flight.held += 2 * self.counted

    def resume(self) -> None:
        """The wait is over."""
        self.connection.account.opening -= self.counted
        self.connection.flight.held -= 2 * self.counted
        self.counted = 0

    def close(self) -> None:
        """Close every descriptor that was opened for it; the client has its own by then."""
        self.resume()
        while self.found:
            os.close(self.found.popitem()[1].descriptor)  # O_PATH: nothing sleeps
        while self.owners:
            os.close(self.owners.popitem()[1])
        if self.slow:
            self.closing.close(self.connection, self.descriptors)
        while self.descriptors:  # of drivers that have nothing to report
            os.close(self.descriptors.popitem()[1])


def answer(opening: Opening, nodes: Nodes, audit: Audit) -> Generator[int, None, Refused | None]:
    """Grant everything that is asked for, or nothing. Returns None when the reply has left, else how to refuse.

    Gives WORKER, TURN or THREAD, and goes on when that is done: what is `missing` is there, others have had their turn,
    `open_nodes` has run in a thread. The caller throws a worker's refusal into this generator, and closes it if the
    client has left. In every case the caller closes `opening` afterwards.
    """
    connection, resources, count = opening.connection, opening.resources, len(opening.resources)
    found, grants, descriptors = opening.found, opening.grants, opening.descriptors
    try:
        now_s = time.monotonic()
        authorize_request(connection, now_s, count)
        authorize_presence(connection, count)
        opening.permits = authorize_resources(connection, resources)
        authorize_grants(connection, count, now_s)
        # each new namespace has a record of its own, though it is asked for in the same words
        made = any(isinstance(one, Namespace) for one in resources)
        authorize_records(connection, count if made else len(set(resources)), now_s)
    except _ERRORS as error:
        return _refused(opening, "authorize", error, audit)
    try:
        if opening.missing():
            yield WORKER
            _authorize_again(opening)
        while (wait := nodes.open_some(opening.permits, opening.view, found, grants, descriptors)) is not None:
            yield wait
            _authorize_again(opening)
            if opening.failure is not None:
                raise opening.failure
        listed = [grants[index] for index in range(count)]
        reply = compose(listed)
    except _ERRORS as error:
        return _refused(opening, "open", error, audit)
    try:
        times, seen = Counter(listed), opening.view
        for grant, index in {grant: index for index, grant in enumerate(listed)}.items():
            if opening.recorded and not len(opening.recorded) % limits.RESOURCES_AT_ONCE:
                yield TURN
                _authorize_again(opening)
            audit.grant(connection.number, connection.subject, grants[index], times[grant])
            opening.recorded[grants[index]] += times[grant]
        if opening.view is not seen:  # where the rules stand now
            reply = compose([grants[index] for index in range(count)])
        opening.resume()
    except GeneratorExit:  # the client is gone; what is recorded does not happen
        _refused(opening, "audit", OpenFailed(errno.EPIPE), audit)
        raise
    except _ERRORS as error:
        return _refused(opening, "audit", error, audit)
    try:
        _owners_live(opening)
        began_s = time.thread_time()
        send_grants(connection.sock, reply, [descriptors[index] for index in range(count)])
        opening.sent_s = time.thread_time() - began_s
        connection.note_sent(len(reply), count)
    except _ERRORS as error:
        return _refused(opening, "send", error, audit)
    return None


def _authorize_again(opening: Opening) -> None:
    """Another policy may have come while this waited. Raises _Withdrawn.

    What was found and made so far must still be allowed by an equal rule, and no name on its way may be denied now.
    """
    if opening.connection.view is opening.view:
        return
    opening.view = opening.connection.view
    try:
        opening.permits = authorize_resources(opening.connection, opening.resources)
        for index, grant in opening.grants.items():
            same = [rule for rule in opening.permits[index].rules if _allows(rule) == _allows(grant.rule)]
            if not same:
                raise Denied("the rule that allowed it is gone", index=index)
            opening.grants[index] = grant._replace(rule=same[0])
        for index, node in opening.found.items():
            node.judge_way(opening.view, index)
    except Denied as denied:
        raise _Withdrawn(denied) from None


def _allows(rule: Rule) -> Rule:
    """The rule without its place in the file and without its subject, to compare two."""
    return rule._replace(source="", where="")


def _owners_live(opening: Opening) -> None:
    for index, pidfd in opening.owners.items():
        if not is_alive(pidfd):
            raise Denied("the process has ended", index=index)


def _refused(
    opening: Opening, stage: str, error: _Withdrawn | Refused | NotRecorded | OSError, audit: Audit
) -> Refused:
    """The refusal that an error in that stage is; it is recorded."""
    match error:
        case Refused():
            refusal = error
        case _Withdrawn():
            stage, refusal = "authorize", error.denied
        case NotRecorded():
            refusal = RateLimited(limits.JOURNAL_RETRY_MS, "journal")
        case _:  # the client is gone, or a fault of ours: it gets nothing either way
            refusal = OpenFailed(error.errno or errno.EIO)
    connection = opening.connection
    who, why = (connection.number, connection.subject), (str(refusal), refusal.cause)
    for grant, count in opening.recorded.items():  # the outcome differs from the record, and that is said for each
        audit.undo(Record("undone", stage, *who, *why, "", grant.resource.text, grant.resource.access), count)
    if opening.recorded:
        maxima = connection.view.limits
        rate, burst = maxima["records_per_second"], maxima["record_burst"]
        connection.account.records.charge(rate, burst, time.monotonic(), len(opening.recorded))
    else:
        resource = opening.resources[refusal.index or 0]
        rule = refusal.rule if isinstance(refusal, Denied) else ""
        audit.refuse(Record("refused", stage, *who, *why, rule, resource.text, resource.access))
    return refusal
