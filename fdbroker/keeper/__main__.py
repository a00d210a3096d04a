"""Where the launcher starts the keeper: fdbroker/launcher/start.py calls `main`, with its orders as the one argument.

Runs in: keeper, as root until `obey` returns. Everything is imported before that: nothing can be afterwards.
"""

from __future__ import annotations

import os
import socket
import sys
from typing import NoReturn

from fdbroker import refusals
from fdbroker.keeper.refusals import Refusals
from fdbroker.keeper.service import Keeper
from fdbroker.kernel import memfd, orders
from fdbroker.kernel.link import Link
from fdbroker.limits import opener as limits
from fdbroker.nodes.find import Finder
from fdbroker.policy.compiled import from_bytes


def main() -> NoReturn:
    """Confine, then serve; the exit code tells the launcher how it ended."""
    order, descriptors = orders.read(sys.argv[1])
    orders.obey(order, descriptors["filter"])
    policy = from_bytes(memfd.read(descriptors["policy"], limits.POLICY_LINK_BYTES))
    os.close(descriptors["policy"])
    launcher, opener, inbox = (
        Link(socket.socket(fileno=descriptors[name])) for name in ("launcher", "opener", "inbox")
    )
    journal = socket.socket(fileno=descriptors["journal"]) if "journal" in descriptors else None
    Keeper(launcher, opener, inbox, policy, Finder(), Refusals(journal)).serve()
    orders.end(refusals.EX_OK)
