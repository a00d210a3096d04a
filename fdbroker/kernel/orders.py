"""What the launcher tells a child at its start: how to confine itself, and which descriptor is what.

Runs in: launcher (writes), the other processes (read, first thing). No attacker controls anything here: it is the
command line that root's launcher gave, so `ps` shows the admin how each process is confined.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from functools import partial
from types import TracebackType
from typing import NoReturn

from fdbroker.kernel.confine import Order, confine

_FILTER_BYTES = 8 * 4096  # BPF_MAXINSNS


def write(order: Order) -> str:
    """The command line argument."""
    return json.dumps(order._asdict(), separators=(",", ":"))


def read(argument: str) -> tuple[Order, dict[str, int]]:
    """The order, and its inherited descriptors by name, now close-on-exec and owned by the caller.

    From then on an exception that nobody handles says which process it ended.
    """
    order = Order(**json.loads(argument))
    sys.excepthook = partial(_say_failure, order.process)
    for descriptor in order.descriptors.values():
        os.set_inheritable(descriptor, False)
    return order, order.descriptors


def _say_failure(process: str, kind: type[BaseException], error: BaseException, tb: TracebackType | None) -> None:
    refused = isinstance(error, PermissionError)
    hint = "; a system call that its seccomp filter does not allow is refused with EPERM" if refused else ""
    os.write(2, f"fdbroker: the {process} failed with {kind.__name__}{hint}:\n".encode())
    sys.__excepthook__(kind, error, tb)
    end(1)


def end(code: int) -> NoReturn:
    """End this process at once, whatever its threads do.

    At the interpreter's own end glibc loads a library for each thread that still works, and aborts where Landlock and
    seccomp refuse that. Source: pthread_exit() of glibc, libgcc_s.so.1.
    """
    sys.stderr.flush()
    os._exit(code)


def obey(order: Order, filter_fd: int) -> bool:
    """Confine this process; closes `filter_fd`, which holds the seccomp filter. Returns whether Landlock is in force.

    Signals that a terminal sends to all of us are the launcher's to answer. Raises OSError: then the process must end.
    """
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    os.chdir("/")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    wanted = order.descriptors_max if hard == resource.RLIM_INFINITY else min(order.descriptors_max, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, wanted))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    program = os.read(filter_fd, _FILTER_BYTES)
    os.close(filter_fd)
    return confine(order, program)
