"""The way of a request: the stages in order, one call a line. All else in this package serves these lines.

Runs in: opener. Identity was taken when the connection came (identify); the inbox has decoded the bytes (decode).
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence

from fdbroker.errors import Denied, OpenFailed, RateLimited, Refused
from fdbroker.opener.audit import Audit, NotRecorded, Record
from fdbroker.opener.authorize import Connection, authorize_request, authorize_resources
from fdbroker.opener.open import Nodes
from fdbroker.opener.send import compose, send_grants
from fdbroker.terms import Grant, Resource

# How soon a client may try again when the journal takes no record now.
_JOURNAL_BUSY_MS = 100


def answer_open(connection: Connection, resources: Sequence[Resource], nodes: Nodes, audit: Audit) -> Refused | None:
    """Serve one Open: all resources or none. Returns None when the reply has left, else how to refuse.

    Every descriptor that is opened here is closed here; the client has its own by then.
    """
    now_s = time.monotonic()
    descriptors: list[int] = []
    recorded: list[Grant] = []
    stage = "authorize"
    try:
        authorize_request(connection, now_s)
        allowed = authorize_resources(connection, resources)
        stage = "open"
        grants = nodes.open_all(resources, allowed, connection.view, descriptors)
        reply = compose(grants)
        stage = "audit"
        _record_grants(audit, connection, grants, recorded)
        stage = "send"
        send_grants(connection.sock, reply, descriptors)
        connection.note_sent(len(reply), len(descriptors))
    except Refused as refusal:
        return _refuse(audit, connection, resources, stage, refusal, recorded, now_s)
    except NotRecorded:
        return _refuse(audit, connection, resources, stage, RateLimited(_JOURNAL_BUSY_MS), recorded, now_s)
    except OSError as error:
        # the client is gone, or a fault of ours: it gets nothing either way
        return _refuse(audit, connection, resources, stage, OpenFailed(error.errno or errno.EIO), recorded, now_s)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    return None


def _record_grants(audit: Audit, connection: Connection, grants: Sequence[Grant], recorded: list[Grant]) -> None:
    for grant in grants:
        number, subject = connection.number, connection.subject
        audit.grant(Record("granted", "send", number, subject, grant.resource, "", grant.rule.where, grant.rdev))
        recorded.append(grant)


def _refuse(
    audit: Audit,
    connection: Connection,
    resources: Sequence[Resource],
    stage: str,
    refusal: Refused,
    recorded: Sequence[Grant],
    now_s: float,
) -> Refused:
    number, subject, sort = connection.number, connection.subject, refusal.wire_name
    for grant in recorded:  # the outcome differs from the record, and that is said for each
        audit.undo(Record("undone", stage, number, subject, grant.resource, str(refusal), sort=sort))
    if not recorded:
        resource = resources[refusal.index or 0]
        rule = refusal.rule if isinstance(refusal, Denied) else ""
        audit.refuse(Record("refused", stage, number, subject, resource, str(refusal), rule, sort=sort), now_s)
    return refusal
