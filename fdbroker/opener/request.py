"""The way of a request: the stages in order, one call a line. All else in this package serves these lines.

Runs in: opener. Identity was taken when the connection came (identify); the inbox has decoded the bytes (decode).
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence

from fdbroker.errors import OpenFailed, RateLimited, Refused
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
    stage = "authorize"
    try:
        authorize_request(connection, now_s)
        allowed = authorize_resources(connection, resources)
        stage = "open"
        grants = nodes.open_all(resources, allowed, connection.view, descriptors)
        reply = compose(grants)
        stage = "audit"
        _record_grants(audit, connection, grants)
        stage = "send"
        send_grants(connection.sock, reply, descriptors)
        connection.note_sent(len(reply), len(descriptors))
    except Refused as refusal:
        _record_refusal(audit, connection, resources, stage, refusal, now_s)
        return refusal
    except NotRecorded:
        return RateLimited(_JOURNAL_BUSY_MS)
    except OSError as error:
        # the client is gone, or a fault of ours: it gets nothing either way
        failure = OpenFailed(error.errno or errno.EIO)
        _record_refusal(audit, connection, resources, stage, failure, now_s)
        return failure
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    return None


def _record_grants(audit: Audit, connection: Connection, grants: Sequence[Grant]) -> None:
    for grant in grants:
        audit.write(
            Record(
                "granted",
                "send",
                connection.number,
                connection.subject,
                grant.resource,
                "",
                grant.rule.where,
                grant.rdev,
            )
        )


def _record_refusal(
    audit: Audit, connection: Connection, resources: Sequence[Resource], stage: str, refusal: Refused, now_s: float
) -> None:
    # After the grants were recorded the outcome differs from the record, and that is said for each of them.
    kind = "undone" if stage == "send" else "refused"
    concerned = resources if stage == "send" else [resources[refusal.index or 0]]
    for resource in concerned:
        record = Record(kind, stage, connection.number, connection.subject, resource, str(refusal))
        audit.refuse(record, now_s)
