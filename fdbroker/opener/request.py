"""The way of a request: the stages in order, one call a line. All else in this package serves these lines.

Runs in: opener. Identity was taken when the connection came (identify); the inbox has decoded the bytes (decode).
What the namespaces worker opens is asked for between `start_open` and `finish_open`; nobody waits for that.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence

from fdbroker import limits
from fdbroker.errors import Denied, OpenFailed, RateLimited, Refused
from fdbroker.kernel.processes import is_alive
from fdbroker.kernel.records import NotRecorded
from fdbroker.opener.audit import Audit, Record
from fdbroker.opener.authorize import Connection, authorize_grants, authorize_request, authorize_resources
from fdbroker.opener.open import Nodes
from fdbroker.opener.send import compose, send_grants
from fdbroker.terms import Device, Grant, Resource, Rule

_JOURNAL_RETRY_MS = limits.JOURNAL_RETRY_MS


class Opening:
    """One Open on its way: what is asked for, what allows it, what is open already. Owns those descriptors."""

    __slots__ = ("allowed", "connection", "descriptors", "grants", "owners", "recorded", "resources", "stage", "view")

    def __init__(self, connection: Connection, resources: Sequence[Resource]) -> None:
        self.connection = connection
        self.resources = resources
        self.view = connection.view
        self.stage = "authorize"
        self.allowed: Sequence[tuple[Rule, ...]] = ()
        self.grants: dict[int, Grant] = {}  # by the resource's position, and so are the descriptors
        self.descriptors: dict[int, int] = {}
        self.owners: dict[int, int] = {}  # pidfds of the processes that must still live when all is sent
        self.recorded: list[Grant] = []

    def missing(self) -> int | None:
        """The position of the next resource that the worker has to open."""
        for index, resource in enumerate(self.resources):
            if index not in self.grants and not isinstance(resource, Device):
                return index
        return None

    def close(self) -> None:
        """Close every descriptor that was opened for it; the client has its own by then."""
        for descriptors in (self.descriptors, self.owners):
            while descriptors:
                os.close(descriptors.popitem()[1])


def start_open(opening: Opening, audit: Audit) -> Refused | None:
    """The stages up to authorize. Returns how to refuse, or None: then what is `missing` is to be opened."""
    try:
        authorize_request(opening.connection, time.monotonic())
        opening.allowed = authorize_resources(opening.connection, opening.resources)
        opening.stage = "open"
    except Refused as refusal:
        return refuse_open(opening, refusal, audit)
    except OSError as error:  # the client is gone
        return refuse_open(opening, OpenFailed(error.errno or errno.EIO), audit)
    return None


def finish_open(opening: Opening, nodes: Nodes, audit: Audit) -> Refused | None:
    """The stages from open on; all resources or none. Returns None when the reply has left, else how to refuse."""
    connection = opening.connection
    try:
        if connection.view is not opening.view:  # another policy came while the worker was asked
            opening.stage = "authorize"
            opening.allowed = authorize_resources(connection, opening.resources)
        if opening.grants:  # much may have been sent to this user while the worker was asked
            authorize_grants(connection)
        opening.stage = "open"
        nodes.open_all(opening.resources, opening.allowed, connection.view, opening.grants, opening.descriptors)
        grants = [opening.grants[index] for index in range(len(opening.resources))]
        reply = compose(grants)
        opening.stage = "audit"
        _record_grants(opening, grants, audit)
        opening.stage = "send"
        _owners_live(opening)
        send_grants(connection.sock, reply, [opening.descriptors[index] for index in range(len(grants))])
        connection.note_sent(len(reply), len(grants))
    except Refused as refusal:
        return refuse_open(opening, refusal, audit)
    except NotRecorded:
        return refuse_open(opening, RateLimited(_JOURNAL_RETRY_MS), audit)
    except OSError as error:
        # the client is gone, or a fault of ours: it gets nothing either way
        return refuse_open(opening, OpenFailed(error.errno or errno.EIO), audit)
    opening.close()
    return None


def _record_grants(opening: Opening, grants: Sequence[Grant], audit: Audit) -> None:
    number, subject = opening.connection.number, opening.connection.subject
    for grant in grants:
        rule = grant.rule.where
        audit.grant(Record("granted", "send", number, subject, grant.resource, "", rule, grant.rdev, grant.inode))
        opening.recorded.append(grant)


def _owners_live(opening: Opening) -> None:
    for index, pidfd in opening.owners.items():
        if not is_alive(pidfd):
            raise Denied("the process has ended", index=index)


def refuse_open(opening: Opening, refusal: Refused, audit: Audit) -> Refused:
    """Record a refusal, and close what was opened. Returns the refusal."""
    opening.close()
    number, subject, sort = opening.connection.number, opening.connection.subject, refusal.wire_name
    for grant in opening.recorded:  # the outcome differs from the record, and that is said for each
        audit.undo(Record("undone", opening.stage, number, subject, grant.resource, str(refusal), sort=sort))
    if not opening.recorded:
        resource = opening.resources[refusal.index or 0]
        rule = refusal.rule if isinstance(refusal, Denied) else ""
        record = Record("refused", opening.stage, number, subject, resource, str(refusal), rule, sort=sort)
        audit.refuse(record, time.monotonic())
    return refusal
