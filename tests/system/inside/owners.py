"""Inside the virtual machine, where root may have as many descriptors as the unit asks for: one user with many uids."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from steps import report

TOP = Path(__file__).parents[3]
UNIT = (TOP / "units/fdbroker.service").read_text()
TESTS = "tests/attacks/test_t51_many_uids.py"


def owners() -> dict[str, Any]:
    """The attacks of T51, in a mount namespace of their own."""
    most = int(re.search(r"^LimitNOFILE=(\d+)$", UNIT, re.MULTILINE)[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    command = (
        "unshare",
        "--mount",
        "--propagation",
        "private",
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
    )
    done = subprocess.run(
        [
            *command,
            "--no-header",
            "-q",
            "--show-capture=no",
            TESTS,
            "-k",
            "(unread or held) and not 8192",
            "--durations=0",
        ],
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
        cwd=TOP,
        env={**os.environ, "CI": "true", "EMULATED": "1"},
    )
    return {"descriptors": most, "code": done.returncode, "said": done.stdout[-4000:] + done.stderr[-1000:]}


report([owners])
