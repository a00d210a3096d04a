"""Where the launcher starts the worker: fdbroker/launcher/start.py calls `main`, with its orders as the one argument.

Runs in: namespaces worker, as root until `obey` returns. Everything is imported before that.

The process that the launcher started only holds what a worker needs, and starts it: by fork, for it has read nothing
that could have changed it. So a worker that ends is there again in a moment, and the launcher needs no right for that.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import time

from fdbroker import errors
from fdbroker.kernel import confine, lifeline, orders
from fdbroker.kernel.dumpable import new_identity_exposes
from fdbroker.kernel.link import Link
from fdbroker.namespaces.service import Worker
from fdbroker.wire import link, worker
from fdbroker.wire.launcher import LAUNCHER_TO_WORKER, Restart

# A child that enters a client's user namespace would be dumpable there, so its memory the client's to read and write.
_EXPOSED = (
    b"fdbroker: the namespaces worker does not start: fs.suid_dumpable is 1, so clients could trace its children: "
    b"sysctl fs.suid_dumpable=0, or 2\n"
)
_PAUSE_S = 0.1  # between an end and the next start: a worker that cannot live must not keep the machine busy


def main() -> int:
    """Confine, then keep a worker running; the exit code tells the launcher how it ended."""
    order, descriptors = orders.read(sys.argv[1])
    if new_identity_exposes(order.uid):
        os.write(2, _EXPOSED)
        return errors.EX_CONFIG
    orders.obey(order, descriptors["filter"])
    launcher = Link(socket.socket(fileno=descriptors["launcher"]))
    opener = Link(socket.socket(fileno=descriptors["opener"]))
    launcher.send(link.READY)
    return _keep_running(Worker(opener, frozenset(order.capabilities)), opener, launcher)


def _keep_running(service: Worker, opener: Link, launcher: Link) -> int:
    holder = os.getpid()
    while True:
        process = os.fork()
        if process == 0:
            code = errors.EX_SOFTWARE
            try:
                confine.die_with(holder)
                launcher.close()
                service.serve()
                code = errors.EX_OK
            except Exception as error:  # noqa: BLE001 -- said here, for nothing above us does
                sys.excepthook(type(error), error, error.__traceback__)
            finally:
                os._exit(code)
        code = _wait(process, launcher)
        if code == errors.EX_OK:
            return code  # the opener has closed its end
        how = lifeline.how_ended(process, code)
        os.write(2, f"fdbroker: the namespaces worker {how}; it is started again\n".encode())
        opener.send(worker.LOST)
        time.sleep(_PAUSE_S)


def _wait(process: int, launcher: Link) -> int:
    """Until the worker ends, killed if the launcher says that it is stuck; how it ended."""
    pidfd = os.pidfd_open(process)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.register(launcher.fileno(), select.POLLIN)
    try:
        while not any(descriptor == pidfd for descriptor, _ in poll.poll()):
            match _said(launcher):
                case Restart():
                    os.kill(process, signal.SIGKILL)
                case link.Stop():  # a worker that still runs does not answer, and dies with us
                    return errors.EX_OK
    finally:
        os.close(pidfd)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _said(launcher: Link) -> link.Stop | Restart | None:
    """What the launcher says; its end is the service's."""
    data = launcher.receive()
    if data is None:
        return None
    return LAUNCHER_TO_WORKER.decode(data) if data else link.Stop()
