"""What the scripts in the machines share: steps that report facts, users without rights, waiting."""

from __future__ import annotations

import json
import os
import re
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

IN_VAIN = 20
Step = Callable[[], dict[str, Any]]


def open_in(pid: int) -> int:
    """How many descriptors a process has, without the folders of devices that it keeps (DEVICES_KEPT)."""
    found = [os.readlink(one.path) for one in os.scandir(f"/proc/{pid}/fd") if os.path.lexists(one.path)]
    return sum(not what.startswith("/sys/devices/") for what in found)


def report(steps: Iterable[Step]) -> None:
    """Run each step; its facts are one line of JSON. A step that fails is one too, and the next one runs.

    Where the service has failed, systemd has given it up, and no step could go well any more: the rest is left out.
    """
    for step in steps:
        last_words = ""
        began_s = time.monotonic()
        try:
            facts = step()
        except BaseException:
            last_words = of_failed_service(30.0)
            facts = {"error": traceback.format_exc() + last_words}
        facts = {"step": step.__name__, "seconds": round(time.monotonic() - began_s, 3), **facts}
        with OUT.open("a") as file:
            file.write(json.dumps(facts) + "\n")
        if last_words:
            break


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
    """Wait until `ready` returns something true, and return that; not any longer once the service has failed."""
    now_s = time.monotonic()
    end_s, look_s = now_s + seconds, now_s + 0.5
    while not (value := ready()):
        now_s = time.monotonic()
        if now_s > end_s:
            raise TimeoutError(f"{what}: not within {seconds} s")
        if now_s > look_s:
            if of_failed_service():
                raise RuntimeError(f"{what}: not any more")
            look_s = time.monotonic() + 0.5
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


def of_failed_service(seconds: float = 0.0) -> str:
    """What the journal's end has of the service if it has failed, else ""; for so long it may be on its way.

    systemd never gives the unit up: a service that it has started so often in vain has failed.
    """
    end_s = time.monotonic() + seconds
    while Path("/run/systemd/system").exists():  # else a machine without systemd
        found = show("ActiveState", "NRestarts")
        starting = found.get("ActiveState") == "activating"
        if found.get("ActiveState") == "failed" or (starting and int(found.get("NRestarts") or 0) >= IN_VAIN):
            break
        if not starting or time.monotonic() > end_s:
            return ""
        time.sleep(0.2)
    else:
        return ""
    return "\n".join(["fdbroker.service has failed; its journal ends with:", *said()[-30:]])


def role(pid: int) -> str:
    """What a child of the service is, as its command line says: "opener", "inbox" …; "" for another program."""
    found = re.search(rb"from fdbroker\.(\w+)\.__main__ import", Path(f"/proc/{pid}/cmdline").read_bytes())
    return found[1].decode() if found else ""


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


def watched(command: Iterable[str], change: Callable[[], Any]) -> list[list[str]]:
    """The names in the first list of `fdbroker list --more`, behind these words, and in the next one after `change`."""
    words = (*command, "timeout", "60", "fdbroker", "list", "--more", "--json")
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as watcher:
        try:
            before = watcher.stdout.readline()
            change()
            after = watcher.stdout.readline()
        finally:
            watcher.kill()
    return [sorted(offer["resource"] for offer in json.loads(line)) for line in (before, after)]


def exposure(unit: str = "fdbroker.service") -> float:
    """What systemd-analyze makes of a unit: from 0, nothing is left, to 10."""
    done = run("systemd-analyze", "security", "--no-pager", unit)
    last = next(line for line in done.stdout.splitlines() if "Overall exposure level" in line)
    return float(last.split(": ")[1].split()[0])
