"""How a child ended, in words.

Runs in: launcher.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Sequence

from fdbroker import errors
from fdbroker.errors import FdbrokerError
from fdbroker.kernel import lifeline, pinned
from fdbroker.launcher.start import Child

_ENDS_TOO_S = 0.1  # how long a process needs from closing its links to its end, which another one has noticed first


class ServiceFailed(FdbrokerError):
    """A child died, or did not come up; the service ends, and its manager starts it again."""


class ChildRefused(ServiceFailed):
    """A child does not run on a machine that is set up like this one, and has said why."""

    exit_code = errors.EX_CONFIG


def end_of(child: Child, children: Sequence[Child]) -> str:
    """How a child ended, whose link is at its end; and others that have, for one may be the other's reason."""
    try:
        child.process.wait(1)
    except subprocess.TimeoutExpired:
        return f"the {child.name} closed its link and still runs"
    ends = []
    for one in children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = one.process.wait(_ENDS_TOO_S)
            name = "namespaces worker's holder" if one.name == "namespaces" else one.name
            ends.append(f"the {name} {lifeline.how_ended(one.process.pid, code)}")
    return ", ".join(ends)


def late(children: Sequence[Child]) -> str:
    """Who of them still runs, although the time for stopping is over; "" when none does."""
    names = sorted(child.name for child in children if child.process.poll() is None)
    return f"the {' and the '.join(names)} did not end in time: killed" if names else ""


def main_thread_ended(pid: int) -> bool:
    """Whether that process has ended but for threads that cannot: it is no zombie to wait for, and serves nobody.

    False when there is no such process.
    """
    return pinned.state(pid) == b"Z"
