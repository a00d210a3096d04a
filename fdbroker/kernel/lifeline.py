"""Have the kernel kill a child when this process ends, however it ends, and whatever the child does about it.

Runs in: launcher, before it gives up its capabilities. A parent's death signal (PR_SET_PDEATHSIG) is sent with the
rights of the parent that dies: the launcher then has no capability and another uid than its children, so they would
not get it. The signal for a pipe is sent with the rights of who asked for it. Source: fcntl(2), F_SETOWN, F_SETSIG.
"""

from __future__ import annotations

import fcntl
import os
import signal

_F_SETSIG = 10  # asm-generic/fcntl.h


def bind(process: int) -> tuple[int, ...]:
    """Bind the life of `process`, a child not yet waited for, to that of this process. Raises OSError.

    The caller owns what is returned, and closes none of it: closing kills. Nobody else may hold these descriptors.
    """
    held = []
    for swapped in (False, True):
        reading, writing = os.pipe2(os.O_CLOEXEC)
        if swapped:
            # Who reads must be there still when the last who writes goes. A process that ends closes in the order of
            # the numbers, or against it: one pipe for either.
            higher = fcntl.fcntl(reading, fcntl.F_DUPFD_CLOEXEC, writing)
            os.close(reading)
            reading = higher
        fcntl.fcntl(reading, fcntl.F_SETOWN, process)
        fcntl.fcntl(reading, _F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(reading, fcntl.F_SETFL, os.O_ASYNC)
        held += [reading, writing]
    return tuple(held)
