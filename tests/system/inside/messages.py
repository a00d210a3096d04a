"""Inside the machine: stored messages under the shipped units, for a user who is not logged in."""

from __future__ import annotations

import grp
import json
import os
import pwd
import signal
import subprocess
from pathlib import Path
from typing import Any

from steps import MEMBER, OTHER, POLICY, as_user, outcome, records, report, run, wait_for

STATE = Path("/var/lib/fdbroker")
TEXT = f"""\
version: 1
topics:
  inbox: {{deliver: [journal, subscribers, queue]}}
users:
  lab-{MEMBER}: {{send: [inbox]}}
  lab-{OTHER}: {{subscribe: [inbox]}}
"""


def groups() -> list[int]:
    return [grp.getgrnam("fdbroker").gr_gid]


def member(*words: str) -> subprocess.CompletedProcess[str]:
    return run(*as_user(MEMBER, groups()), "fdbroker", *words)


def other(*words: str) -> subprocess.CompletedProcess[str]:
    return run(*as_user(OTHER, groups()), "fdbroker", *words)


def messages(*words: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in other("receive", "--json", *words).stdout.splitlines()]


def inbox() -> int:
    """Its pid, 0 while there is none."""
    found = run("pgrep", "--full", "--", "from fdbroker[.]inbox[.]__main__").stdout.split()
    return int(found[0]) if len(found) == 1 else 0


# ---- the steps, in their order


def started() -> dict[str, Any]:
    for uid in (MEMBER, OTHER):
        run("useradd", "--uid", str(uid), "--no-create-home", "--groups", "fdbroker", f"lab-{uid}", check=True)
    run("systemd-tmpfiles", "--create", "fdbroker.conf", check=True)
    POLICY.write_text(TEXT)
    run("systemctl", "start", "fdbroker.socket", check=True)
    sent = outcome(member("send", "inbox", "to all"))
    to = outcome(member("send", "inbox", "--to", f"lab-{OTHER}", "to one"))
    status = os.stat(STATE)
    return {
        "sent": sent,
        "to": to,
        "folder": [pwd.getpwuid(status.st_uid).pw_name, oct(status.st_mode)],
        "files": sorted(os.listdir(STATE)),
    }


def recorded() -> dict[str, Any]:
    """The journal has the first one, with trusted fields."""
    found = wait_for("the record", lambda: records("FDBROKER_PAYLOAD=to all"))[0]
    names = ("FDBROKER_UID", "FDBROKER_TOPIC", "SYSLOG_IDENTIFIER", "_UID")
    return {**{name: found[name] for name in names}, "inbox": pwd.getpwnam("fdbroker-inbox").pw_uid}


def killed() -> dict[str, Any]:
    """The inbox is killed; the service comes back by itself, and the messages with it."""
    before = wait_for("the inbox", inbox)
    os.kill(before, signal.SIGKILL)
    wait_for("another inbox", lambda: inbox() not in (0, before))
    return {"received": [one["payload"] for one in messages("--keep")]}


def restarted() -> dict[str, Any]:
    run("systemctl", "restart", "fdbroker.service", check=True)
    received = messages()
    return {
        "received": [(one["payload"], one["uid"]) for one in received],
        "again": messages(),
    }


def damaged() -> dict[str, Any]:
    """Set aside, and said in the journal."""
    member("send", "inbox", "lost with the file")
    run("systemctl", "stop", "fdbroker.service", "fdbroker.socket", check=True)
    with (STATE / "messages.sqlite").open("r+b") as file:
        file.write(b"\xaa" * 100)
    run("systemctl", "start", "fdbroker.socket", check=True)
    sent = outcome(member("send", "inbox", "after it"))
    found = wait_for("the record", lambda: records("MESSAGE_ID=6c0b6a1d5fd94b6c8f0d2b5b1f1f7a09"))
    return {
        "sent": sent,
        "said": [(one["MESSAGE"], one["PRIORITY"]) for one in found],
        "received": [one["payload"] for one in messages()],
        "files": sorted(os.listdir(STATE)),
    }


def without_folder() -> dict[str, Any]:
    """The service says what is missing, and does not run without it."""
    run("systemctl", "stop", "fdbroker.service", "fdbroker.socket", check=True)
    STATE.rename("/var/lib/fdbroker.away")
    run("systemctl", "start", "fdbroker.service")
    done = run("systemctl", "show", "fdbroker.service", "--property=ExecMainStatus,ActiveState").stdout
    said = run("journalctl", "--unit=fdbroker", "--output=cat", "--lines=20").stdout
    Path("/var/lib/fdbroker.away").rename(STATE)
    return {"state": done.split(), "said": said}


def confined() -> dict[str, Any]:
    """Of all places, the inbox can write to that one."""
    run("systemctl", "reset-failed", "fdbroker.service", "fdbroker.socket")
    run("systemctl", "start", "fdbroker.socket", check=True)
    member("send", "inbox", "x")
    command = Path(f"/proc/{wait_for('the inbox', inbox)}/cmdline").read_bytes().split(b"\0")
    order = json.loads(command[-2])
    return {"files": [path for path, _ in order["files"]], "capabilities": order["capabilities"]}


def stopped() -> dict[str, Any]:
    run("systemctl", "stop", "fdbroker.service", "fdbroker.socket", check=True)
    show = run("systemctl", "show", "fdbroker.service", "--property=Result,ExecMainStatus").stdout
    return {"state": show.split()}


report([started, recorded, killed, restarted, damaged, without_folder, confined, stopped])
