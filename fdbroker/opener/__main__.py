"""Where the launcher starts the opener: fdbroker/launcher/start.py calls `main`, with its orders as the one argument.

Runs in: opener, as root until `obey` returns. Everything is imported before that: nothing can be afterwards.
"""

from __future__ import annotations

import os
import socket
import sys
from typing import NoReturn

from fdbroker import refusals
from fdbroker.kernel import memfd, orders
from fdbroker.kernel.capabilities import Bracket
from fdbroker.kernel.link import Link
from fdbroker.limits import opener as limits
from fdbroker.opener.ask import Asking
from fdbroker.opener.audit import Audit
from fdbroker.opener.open import Nodes
from fdbroker.opener.service import Opener
from fdbroker.policy.compiled import from_bytes
from fdbroker.refusals import LinkViolation


def main() -> NoReturn:
    """Confine, then serve; the exit code tells the launcher how it ended."""
    order, descriptors = orders.read(sys.argv[1])
    orders.obey(order, descriptors["filter"])
    journal = socket.socket(fileno=descriptors["journal"]) if "journal" in descriptors else None
    policy = from_bytes(memfd.read(descriptors["policy"], limits.POLICY_LINK_BYTES))
    os.close(descriptors["policy"])
    keeper = Link(socket.socket(fileno=descriptors["keeper"]))
    audit = Audit(journal, keeper)
    opener = Opener(
        socket.socket(fileno=descriptors["listener"]),
        Link(socket.socket(fileno=descriptors["launcher"])),
        Link(socket.socket(fileno=descriptors["inbox"])),
        keeper,
        Asking(Link(socket.socket(fileno=descriptors["worker"])) if "worker" in descriptors else None),
        policy,
        Nodes(Bracket(frozenset(order.capabilities))),
        audit,
    )
    code = refusals.EX_OK
    try:
        opener.serve()
    except LinkViolation as violation:
        opener.report_violation(violation)
        code = refusals.EX_SOFTWARE
    finally:
        audit.flush()
    orders.end(code)
