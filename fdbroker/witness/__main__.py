"""Where the launcher starts the witness: fdbroker/launcher/start.py calls `main`, with its orders as the one argument.

It tells whether a process lives in our own user namespace, also when that process is root and has an identity map.

Runs in: a process of its own, of root's uid with CAP_SYS_PTRACE alone, outside Landlock: inside it a process may look
at no other process's namespaces. It reads pidfds from the launcher alone, and no client.

Both namespaces are compared by their numbers, for which the kernel wants CAP_SYS_PTRACE. Whatever cannot be looked at
is not at home. That the kernel refuses to show a namespace shows nothing: it does so as well for a process of root in a
namespace of its own that is not dumpable, or that runs a program which nobody there may read. Source: ptrace(2),
"Ptrace access mode checking"; would_dump() of Linux.
"""

from __future__ import annotations

import os
import select
import socket
import sys

from fdbroker import errors
from fdbroker.kernel import namespaces, orders
from fdbroker.kernel.capabilities import Bracket
from fdbroker.kernel.link import Link
from fdbroker.kernel.pinned import Process
from fdbroker.kernel.processes import is_alive
from fdbroker.wire import admin, link
from fdbroker.wire.launcher import LAUNCHER_TO_WITNESS, WITNESS_TO_LAUNCHER


def is_home(pidfd: int, looking: Bracket) -> bool:
    """Whether the living process of `pidfd`, which is taken, is in the user namespace of this process.

    `looking` raises CAP_SYS_PTRACE. Without it the kernel shows hardly any process's namespace, and the answer is no.
    """
    try:
        process = Process.of(pidfd)
    except (ProcessLookupError, OSError):
        return False
    with process:
        try:
            with looking:
                theirs = process.namespace("user")
        except OSError:
            return False
        try:
            ours = os.stat("/proc/self/ns/user")
            return namespaces.identity(theirs) == (ours.st_dev, ours.st_ino) and is_alive(process.pidfd)
        finally:
            os.close(theirs)


def _next(launcher: Link) -> tuple[bytes, list[int]]:
    """Wait for the next message; its pidfd, if one came, is owned by the caller. Raises LinkViolation for more."""
    while (received := launcher.receive_with_descriptors(1)) is None:
        select.select([launcher.fileno()], [], [])
    return received


def main() -> int:
    """Confine, then answer the launcher until it says stop or goes."""
    order, descriptors = orders.read(sys.argv[1])
    orders.obey(order, descriptors["filter"])
    launcher = Link(socket.socket(fileno=descriptors["launcher"]))
    looking = Bracket(frozenset(order.capabilities))
    launcher.send(link.READY)
    while True:
        data, pidfds = _next(launcher)
        message = LAUNCHER_TO_WITNESS.decode(data) if data else link.Stop()
        if not isinstance(message, admin.Judge):
            return errors.EX_OK
        home = bool(pidfds) and is_home(pidfds[0], looking)
        launcher.send(WITNESS_TO_LAUNCHER.encode(admin.Judged(message.connection, home)))
