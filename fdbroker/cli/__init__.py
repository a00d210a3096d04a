"""The command line: `fdbroker serve | open | list | ping | policy …`.

Runs in: the launcher (`serve`), the programs of users and admins (all else).
"""

from __future__ import annotations

import os
import sys

__all__ = ["main"]


def main() -> int:
    """The entry point; returns the exit code."""
    if sys.argv[1:2] == ["serve"] and not sys.flags.isolated and sys.executable:
        # What runs as root takes nothing from the environment's PYTHON variables or the current folder. The pid
        # stays, so that LISTEN_PID and the service manager still mean us. The installed program is isolated from its
        # first line on (scripts/install), and without `site`, which has run here already.
        os.execv(sys.executable, [sys.executable, "-I", "-m", "fdbroker", *sys.argv[1:]])  # noqa: S606
    from fdbroker.cli.commands import run  # noqa: PLC0415 -- not before the line above has decided

    return run()
