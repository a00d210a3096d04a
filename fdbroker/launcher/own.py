"""What the launcher keeps for itself, once all serve: it reads the policy and NSS again, and no more.

Runs in: launcher, as root.
"""

from __future__ import annotations

import os
import sys

from fdbroker.kernel import confine, landlock
from fdbroker.launcher import filters
from fdbroker.policy.files import policy_files


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
    ids = os.getuid(), os.getgid(), tuple(os.getgroups())
    return confine.confine(confine.Confinement(*ids, frozenset(), tuple(files), filters.compile_launchers(), 0))
