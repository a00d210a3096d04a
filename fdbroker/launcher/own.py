"""What the launcher has at its start, and keeps once all serve: it reads the policy and NSS again, and no more.

Runs in: launcher, as root.
"""

from __future__ import annotations

import os
import sys

from fdbroker.kernel import capabilities, landlock
from fdbroker.kernel.confine import Order, confine
from fdbroker.launcher import filters
from fdbroker.policy.files import policy_files


def effective() -> frozenset[str]:
    """The capabilities of a process of ours that are effective in this thread. Source: proc_pid_status(5)."""
    with open("/proc/thread-self/status", "rb") as status:
        bits = next(int(line[7:], 16) for line in status if line.startswith(b"CapEff:"))
    return frozenset(name for name, number in capabilities.NUMBERS.items() if bits >> number & 1)


def confine_launcher(policy: str, bound_path: str) -> bool:
    """Give up what starting needed; returns whether Landlock is in force. `bound_path` is the socket that it bound."""
    read = landlock.READ_FILE | landlock.READ_DIR
    places = ["/etc", "/usr", "/lib", "/lib64", "/run", "/var/lib", "/proc", sys.prefix, sys.base_prefix]
    files = [(place, read) for place in (*places, os.path.dirname(os.path.abspath(policy)))]
    files += [(place, read) for place in sys.path if place]
    # where the symlinks among the policy's files lead now
    for file in policy_files(policy, []):
        files.append((os.path.dirname(os.path.realpath(file)), read))
    if bound_path:
        files.append((os.path.dirname(bound_path), landlock.REMOVE_FILE))
    # needs() lists the folders of /dev and reads no node
    files.append(("/dev", landlock.READ_DIR))
    order = Order("launcher", os.getuid(), os.getgid(), os.getgroups(), [], files, {}, 0, 0)
    return confine(order, filters.compile_launchers())
