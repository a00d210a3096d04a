"""Inside the machine: a taken-over launcher under the shipped unit; what it tries stands in tests/attempts.py."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from steps import make_node, report, run, show, start_with, status_of, wait_for

RANGE = Path("/lab/out/range")
TESTS = Path(__file__).parents[2]
DROP_IN = Path("/etc/systemd/system/fdbroker.service.d/range.conf")
START = f"import sys; sys.path.insert(0, '{RANGE}'); import takeover; takeover.launcher('{RANGE}', False)"
POLICY = "version: 1\neveryone: {devices: [{path: /dev/lab/allowed, access: rw}]}\n"


def tried() -> dict[str, Any]:
    RANGE.mkdir()
    for name in ("takeover.py", "attempts.py"):
        shutil.copy(TESTS / name, RANGE)
    sys.path.insert(0, str(RANGE))
    import takeover

    make_node("/dev/lab/allowed", 1, 5)
    make_node("/dev/other", 1, 5, 0o666)
    DROP_IN.parent.mkdir(exist_ok=True)
    # the unit as it is, but for the program behind the launcher's own confinement
    DROP_IN.write_text(
        f'[Service]\nExecStart=\nExecStart=/opt/fdbroker/bin/python3 -I -B -c "{START}" serve\nReadWritePaths={RANGE}\n'
    )
    run("systemctl", "daemon-reload", check=True)
    run("systemctl", "start", "fdbroker.socket", check=True)
    code = start_with(POLICY)
    launcher = int(show("MainPID")["MainPID"])
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    victim = subprocess.Popen(["setpriv", "--reuid=4002", "--regid=4002", "--clear-groups", "sleep", "600"])
    with contextlib.ExitStack() as owned:
        abstract = owned.enter_context(socket.socket(socket.AF_UNIX))
        abstract.bind("\0fdbroker-tried")
        abstract.listen(4096)
        takeover.furnish(RANGE / "of", 0, owned)
        (RANGE / "state").mkdir()
        plan = {
            "pids": {"launcher": launcher, "victim": victim.pid, **{f"child {pid}": int(pid) for pid in children}},
            "same": {"launcher": launcher},
            "uids": {"launcher": 0},
            "capabilities": {"launcher": []},
            "modes": {"launcher": ["whole"], "opener": [], "keeper": [], "inbox": [], "witness": []},
            "folders": {"launcher": str(RANGE / "of")},
            "state": str(RANGE / "state"),
        }
        (RANGE / "plan.new").write_text(json.dumps(plan))
        (RANGE / "plan.new").rename(RANGE / "plan")
        done, failed = RANGE / "launcher.json", RANGE / "failed"
        wait_for("the attempts", lambda: done.exists() or failed.exists(), 90)
        if failed.exists():
            raise AssertionError(failed.read_text())
    victim.kill()
    victim.wait()
    return {
        "code": code,
        "status": status_of(launcher),
        "outcomes": {name: one["whole"] for name, one in json.loads(done.read_text()).items()},
    }


if __name__ == "__main__":
    assert os.geteuid() == 0
    report([tried])
