"""Where the launcher starts the inbox: fdbroker/launcher/start.py calls `main`, with its orders as the one argument.

Runs in: inbox, as root until `obey` returns. Everything is imported before that: nothing can be afterwards.
"""

from __future__ import annotations

import os
import socket
import sqlite3
import sys
from typing import NoReturn

from fdbroker import errors
from fdbroker.inbox.service import Inbox
from fdbroker.inbox.store import opened
from fdbroker.inbox.topics import Topics
from fdbroker.inbox.turns import unit_of_this_machine_s
from fdbroker.kernel import memfd, orders
from fdbroker.kernel.link import Link
from fdbroker.kernel.records import Records
from fdbroker.limits import opener as limits
from fdbroker.policy.compiled import from_bytes


def main() -> NoReturn:
    """Confine, then serve; the exit code tells the launcher how it ended."""
    order, descriptors = orders.read(sys.argv[1])
    orders.obey(order, descriptors["filter"])
    records = Records(socket.socket(fileno=descriptors["journal"]) if "journal" in descriptors else None)
    store, damage = None, ""
    for folder, _ in order.files or ():  # the one where messages are stored, if they are
        try:
            store, damage = opened(folder)
        except sqlite3.Error as error:
            Topics(records).say(f"the stored messages in {folder} cannot be opened: {error}")
            orders.end(errors.EX_OSERR)
    topics, unit_s = Topics(records, store), unit_of_this_machine_s()
    policy = from_bytes(memfd.read(descriptors["policy"], limits.POLICY_LINK_BYTES))
    os.close(descriptors["policy"])
    if damage:
        topics.say(damage)
    inbox = Inbox(
        Link(socket.socket(fileno=descriptors["launcher"])),
        Link(socket.socket(fileno=descriptors["opener"])),
        Link(socket.socket(fileno=descriptors["keeper"])),
        policy,
        topics,
        unit_s,
    )
    try:
        inbox.serve()
    except ConnectionError:
        if not inbox.draining:
            raise
        # the time for stopping is over, and the opener was ended before us
    if store is not None:
        store.close()
    orders.end(errors.EX_OK)
