"""Whether a process stays what others may not look into when it gets another identity.

Runs in: namespaces worker, at its start. No attacker controls anything here.
"""

from __future__ import annotations

import os

import prctl


def new_identity_exposes(uid: int) -> bool:
    """Whether a process that gets another identity becomes dumpable, as fs.suid_dumpable=1 has it.

    Tried by a child that becomes `uid`, for a unit may hide /proc/sys; needs root. Source: proc_sys_fs(5), and
    commit_creds() of Linux, which setns(2) into a user namespace calls as well.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setresuid(uid, uid, uid)
            code = prctl.get_dumpable()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) not in (0, 2)
