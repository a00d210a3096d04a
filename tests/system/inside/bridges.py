"""Inside the machine: two users with login sessions, each with its own bus, and the bridges' shipped units."""

from __future__ import annotations

import grp
import json
import os
import pwd
import shutil
import subprocess
from pathlib import Path
from typing import Any

from steps import MEMBER, OTHER, as_user, exposure, make_node, outcome, records, report, run, show, wait_for

DESKTOP = Path("/run/desktop.py")  # a copy: the checkout may be root's alone
PYTHON = "/opt/fdbroker/bin/python3"
SOCKET = "/run/fdbroker/socket"
BRIDGES = Path("/etc/fdbroker/bridges")
NOTES = Path("/run/notes")  # what the desktop of the other user showed
SESSION = Path("/run/session")  # in which session it runs
UNITS = ("fdbroker-dbus@lab.service", "fdbroker-evdev@lab.service")
POLICY = f"""\
version: 1
topics: {{notifications: {{}}, sessions: {{}}, keys: {{}}, places: {{deliver: [journal, subscribers]}}}}
users:
  {MEMBER}: {{send: [notifications, places]}}
  {OTHER}: {{subscribe: [notifications]}}
  fdbroker-dbus: {{send: [sessions]}}
  fdbroker-evdev: {{send: [keys], devices: [{{path: /dev/lab/zero, class: mem, device: "1:5"}}]}}
  0: {{send: ["*"], subscribe: ["*"]}}
"""
listening: list[subprocess.Popen[str]] = []


def in_session(uid: int, unit: str, *words: str) -> tuple[str, ...]:
    """The words that run a command in a login session of its own."""
    return ("systemd-run", f"--unit={unit}", f"--uid={uid}", "--property=PAMName=lab", "--collect", *words)


def other(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command that talks to the other user's service manager."""
    groups = [grp.getgrnam("fdbroker").gr_gid]
    return run(*as_user(OTHER, groups), "env", "HOME=/nonexistent", f"XDG_RUNTIME_DIR=/run/user/{OTHER}", *command)


def received() -> list[dict[str, Any]]:
    """All messages so far that are no question of ours."""
    lines = Path("/run/received").read_text().splitlines()
    return [one for one in map(json.loads, lines) if one["payload"] != "are you there"]


# ---- the steps, in their order


def started() -> dict[str, Any]:
    Path("/etc/pam.d/lab").write_text("account required pam_permit.so\nsession required pam_systemd.so\n")
    for uid in (MEMBER, OTHER):
        run("useradd", "--uid", str(uid), "--no-create-home", "--groups", "fdbroker", f"lab-{uid}", check=True)
    run("systemd-tmpfiles", "--create", "fdbroker.conf", check=True)
    Path("/etc/fdbroker/policy.yaml").write_text(POLICY)
    make_node("/dev/lab/zero", 1, 5)
    run("systemctl", "start", "fdbroker.socket", "systemd-logind.service", check=True)
    with open("/run/received", "w") as out:
        words = ("fdbroker", "subscribe", "--json", "notifications", "sessions", "keys", "places")
        listening.append(subprocess.Popen(words, stdout=out, text=True))

    def heard() -> bool:
        run("fdbroker", "send", "sessions", "are you there", check=True)
        return bool(Path("/run/received").read_text())

    wait_for("the subscriber", heard)
    names = ("fdbroker-dbus", "fdbroker-evdev")
    return {
        "shells": {name: pwd.getpwnam(name).pw_shell for name in names},
        "folder": [os.stat(BRIDGES).st_uid, oct(os.stat(BRIDGES).st_mode)],
    }


def verified() -> dict[str, Any]:
    return {unit: outcome(run("systemd-analyze", "verify", "--man=no", unit)) for unit in UNITS}


def signals() -> dict[str, Any]:
    """A signal of logind's comes as a message of the bridge's user; the same one by somebody else does not."""
    rule = "type='signal',sender='org.freedesktop.login1',member='SessionNew'"
    (BRIDGES / "lab.conf").write_text(f"MATCH={rule}\nTOPIC=sessions\n")
    begun = outcome(run("systemctl", "start", "fdbroker-dbus@lab"))
    wait_for("the bridge", lambda: "go to the topic" in run("journalctl", "--unit=fdbroker-dbus@lab").stdout)
    forged = ("emit", "/org/freedesktop/login1", "org.freedesktop.login1.Manager", "SessionNew", "so", "forged", "/")
    emitted = outcome(run(*as_user(MEMBER, [MEMBER]), "busctl", *forged))
    session = outcome(run(*in_session(MEMBER, "lab-first", "--wait", "true")))
    wait_for("the message", received)
    return {
        "begun": begun,
        "emitted": emitted,
        "session": session,
        "received": received(),
        "uid": pwd.getpwnam("fdbroker-dbus").pw_uid,
        "state": show("ActiveState", "NRestarts", unit="fdbroker-dbus@lab"),
    }


def notified() -> dict[str, Any]:
    """A message sent in one user's session appears on the desktop in the other's."""
    groups = f"--property=SupplementaryGroups={OTHER}"
    desktop = in_session(OTHER, "lab-desktop", groups, PYTHON, "-I", str(DESKTOP), str(NOTES), str(SESSION))
    shutil.copy(Path(__file__).parent / "desktop.py", DESKTOP)
    NOTES.touch()
    SESSION.touch()
    for path in (NOTES, SESSION):
        os.chown(path, OTHER, OTHER)
    begun = outcome(run(*desktop))
    wait_for("the desktop", SESSION.read_text)
    user_unit = "/usr/lib/systemd/user/fdbroker-notify.service"
    verified = outcome(other("systemd-analyze", "verify", "--man=no", "--user", user_unit))
    bridge = outcome(other("systemctl", "--user", "start", "fdbroker-notify"))
    send = ("fdbroker", "send", "notifications", "the build is done\n<b>all</b> of it")

    def shown() -> bool:  # what is sent before the bridge has subscribed is for nobody
        sent.append(outcome(run(*in_session(MEMBER, f"lab-send-{len(sent)}", "--wait", "--pipe", *send))))
        return bool(NOTES.read_text())

    sent: list[dict[str, Any]] = []
    wait_for("the notification", shown)
    messages = [one for one in received() if one["topic"] == "notifications"]
    return {
        "begun": begun,
        "verified": verified,
        "bridge": bridge,
        "sent": sent[-1],
        "note": json.loads(NOTES.read_text().splitlines()[0]),
        "sessions": [messages[-1].get("session"), SESSION.read_text()],
        "uid": messages[-1]["uid"],
        "buses": [os.stat(f"/run/user/{OTHER}/bus").st_uid, os.path.exists(f"/run/user/{MEMBER}/bus")],
        "confined": other(
            "systemctl", "--user", "show", "fdbroker-notify", "--property=NoNewPrivileges"
        ).stdout.strip(),
    }


# In a control group of its own making, which has the name of a session, in what is delegated to its user.
FORGED = """
group=/sys/fs/cgroup$(sed -n s/^0:://p /proc/self/cgroup)/session-9.scope
mkdir "$group"
echo 0 >"$group/cgroup.procs"
fdbroker send places "forged $(sed -n s/^0:://p /proc/self/cgroup)"
"""
OWN = """
fdbroker send places "own $XDG_SESSION_ID"
exec systemd-run --user --wait --pipe --collect --quiet --property=Delegate=yes sh -ec "$0"
"""
AWAY = """
fdbroker send places "root $XDG_SESSION_ID"
exec "$@" fdbroker send places "another $XDG_SESSION_ID"
"""


def placed() -> dict[str, Any]:
    """Messages out of a session: its user's, one of what that user forges there, and of who is another one there."""
    own = ("--wait", "--pipe", "sh", "-ec", OWN, FORGED)
    another = as_user(MEMBER, [grp.getgrnam("fdbroker").gr_gid])
    away = ("sh", "-ec", AWAY, "sh", *another)
    done = [outcome(run(*in_session(MEMBER, "lab-own", *own))), outcome(run(*in_session(0, "lab-away", *away)))]
    if any(one["code"] for one in done):
        return {"done": done}
    wait_for("the messages", lambda: len([one for one in received() if one["topic"] == "places"]) == 4)
    return {
        "done": done,
        "messages": {
            one["payload"]: (one["uid"], one.get("session", "")) for one in received() if one["topic"] == "places"
        },
        "records": {
            one["FDBROKER_PAYLOAD"]: (int(one["FDBROKER_UID"]), one.get("FDBROKER_SESSION", ""))
            for one in records("FDBROKER_TOPIC=places")
        },
    }


def bus_ends() -> dict[str, Any]:
    """The bridge ends with its bus, and its service manager starts it again."""
    before = other("systemctl", "--user", "show", "fdbroker-notify", "--property=MainPID").stdout
    other("systemctl", "--user", "restart", "dbus.service")
    show_it = ("systemctl", "--user", "show", "fdbroker-notify", "--property=NRestarts")
    wait_for("its restart", lambda: other(*show_it).stdout.strip() not in ("NRestarts=0", ""))
    return {"before": before, "restarts": other(*show_it).stdout.strip()}


def no_input_device() -> dict[str, Any]:
    """The unit's words reach the bridge, which gets the device from the broker; it is none, and that is final."""
    (BRIDGES / "lab.conf").write_text("DEVICE=/dev/lab/zero\nTOPIC=keys\nEVENTS=--event KEY_F13 --event SW_LID\n")
    run("systemctl", "start", "fdbroker-evdev@lab")
    wait_for("its end", lambda: show("ActiveState", unit="fdbroker-evdev@lab")["ActiveState"] == "failed")
    said = run("journalctl", "--unit=fdbroker-evdev@lab", "--output=cat").stdout
    return {**show("ExecMainStatus", "NRestarts", unit="fdbroker-evdev@lab"), "said": said}


def security() -> dict[str, Any]:
    return {unit: exposure(unit) for unit in UNITS}


def stopped() -> dict[str, Any]:
    run("systemctl", "stop", "fdbroker-dbus@lab", "lab-desktop")
    for one in listening:
        one.kill()
        one.wait()
    return show("Result", "ActiveState", unit="fdbroker-dbus@lab")


report([started, verified, signals, notified, placed, bus_ends, no_input_device, security, stopped])
