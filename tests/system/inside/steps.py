"""What the scripts in the machines share: steps that report facts, users without rights, waiting."""

from __future__ import annotations

import json
import os
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

OUT = Path("/lab/out/facts")
POLICY = Path("/etc/fdbroker/policy.yaml")
MEMBER, OTHER = 4001, 4002  # users; who may is said by a group of the policy
GROUP = 4000

Step = Callable[[], dict[str, Any]]


def report(steps: Iterable[Step]) -> None:
    """Run each step; its facts are one line of JSON. A step that fails is one too, and the next one runs."""
    for step in steps:
        began_s = time.monotonic()
        try:
            facts = step()
        except BaseException:
            facts = {"error": traceback.format_exc()}
        facts = {"step": step.__name__, "seconds": round(time.monotonic() - began_s, 3), **facts}
        with OUT.open("a") as file:
            file.write(json.dumps(facts) + "\n")


def run(*command: str | Path, check: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, whatever that is unless `check`."""
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=check)


def outcome(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """How a command ended, as facts."""
    return {"code": done.returncode, "stdout": done.stdout, "stderr": done.stderr}


def as_user(uid: int, groups: Iterable[int]) -> tuple[str, ...]:
    """The words before a command that make it run as `uid`, in exactly these groups, with no capability."""
    words = f"--reuid={uid} --regid={uid} --groups={','.join(map(str, groups))} --inh-caps=-all --bounding-set=-all"
    return ("setpriv", *words.split(), "--no-new-privs", "--")


def wait_for(what: str, ready: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Wait until `ready` returns something true, and return that."""
    end_s = time.monotonic() + seconds
    while not (value := ready()):
        if time.monotonic() > end_s:
            raise TimeoutError(f"{what}: not within {seconds} s")
        time.sleep(0.02)
    return value


def status_of(pid: int) -> dict[str, str]:
    """The lines of /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def make_node(path: str, major: int, minor: int, mode: int = 0o600) -> None:
    """A character device node of root's."""
    Path(path).parent.mkdir(exist_ok=True)
    os.mknod(path, 0o020000 | mode, os.makedev(major, minor))
    os.chmod(path, mode)


# ---- of the service


def show(*names: str, unit: str = "fdbroker.service") -> dict[str, str]:
    """These properties of a unit."""
    done = run("systemctl", "show", unit, "--property", ",".join(names))
    return dict(line.split("=", 1) for line in done.stdout.splitlines())


def records(*matches: str, unit: str = "fdbroker.service") -> list[dict[str, Any]]:
    """What the journal has of a unit."""
    run("journalctl", "--sync")
    done = run("journalctl", "--output=json", f"--unit={unit}", *matches)
    return [json.loads(line) for line in done.stdout.splitlines()]


def said() -> list[str]:
    """The texts of these."""
    return [str(record.get("MESSAGE")) for record in records()]


def write_policy(text: str) -> None:
    """Another policy in the place of the one that is there, at once."""
    new = POLICY.with_suffix(".new")
    new.write_text(text)
    new.rename(POLICY)


def start_with(text: str) -> int:
    """Start the service anew with another policy; returns the exit code of systemctl."""
    write_policy(text)
    run("systemctl", "stop", "fdbroker.service")
    return run("systemctl", "start", "fdbroker.service").returncode


def exposure(unit: str = "fdbroker.service") -> float:
    """What systemd-analyze makes of a unit: from 0, nothing is left, to 10."""
    done = run("systemd-analyze", "security", "--no-pager", unit)
    last = next(line for line in done.stdout.splitlines() if "Overall exposure level" in line)
    return float(last.split(": ")[1].split()[0])
