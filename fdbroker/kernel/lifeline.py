"""Have the kernel kill a child when this process ends, however it ends; and say how a child ended.

Runs in: launcher, before it gives up its capabilities; the namespaces worker, for how its children end.
A parent's death signal (PR_SET_PDEATHSIG) is sent with the rights of the parent that dies: the launcher then has no
capability and another uid than its children, so they would not get it. The signal for a pipe is sent with the rights
of who asked for it. Source: fcntl(2), F_SETOWN, F_SETSIG.
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


def how_ended(process: int, code: int) -> str:
    """How a child with the number `process` ended, for the admin; `code` as of os.waitstatus_to_exitcode.

    The parent is not told which system call a filter killed for (a handler that the child could change might tell), but
    the kernel's log is. Source: seccomp(2), SECCOMP_RET_KILL_PROCESS; audit_seccomp() of Linux.
    """
    if code == -signal.SIGSYS:
        return (
            "was killed by its seccomp filter (SIGSYS), for a system call that no healthy process of ours makes; its "
            f"number is in the kernel's log: journalctl --grep 'pid={process} .*syscall='"
        )
    if code >= 0:
        return f"ended with exit code {code}"
    names = {number.value: f" ({number.name})" for number in signal.Signals}  # a real-time signal has no name
    return f"ended with signal {-code}{names.get(-code, '')}"
