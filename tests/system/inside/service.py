"""Inside the machine: the installed service under the shipped units, from before its first client to its end."""

from __future__ import annotations

import contextlib
import grp
import json
import os
import pwd
import signal
import socket
import stat
import subprocess
import time
from pathlib import Path
from typing import Any

from steps import (
    GROUP,
    MEMBER,
    OTHER,
    as_user,
    exposure,
    make_node,
    outcome,
    records,
    report,
    role,
    run,
    said,
    show,
    start_with,
    status_of,
    wait_for,
    write_policy,
)

PYTHON = "/opt/fdbroker/bin/python3"
SOCKET = "/run/fdbroker/socket"
CLIENT = (Path(__file__).parent / "client.py").read_text()
MAY_CONNECT = grp.getgrnam("fdbroker").gr_gid
NODE_GROUP = 4100  # owns a node, in one step

PLANTED = "import sys; sys.stderr.write('planted: ' + sys.executable + chr(10))\n"  # what `site` would run
RULES = f"""\
version: 1
groups:
  {GROUP}:
    devices:
      - {{path: "/dev/lab/zero*", access: rw, class: mem, device: "1:5"}}
      - {{path: /dev/lab/read-only, class: mem, device: "1:5"}}
      - {{path: /dev/net/tun, access: rw, class: misc, device: "10:200"}}
"""


def member(*command: str) -> tuple[str, ...]:
    return (*as_user(MEMBER, [GROUP, MAY_CONNECT]), *command)


def ask(uid: int, groups: list[int], path: str, access: str) -> dict[str, Any]:
    """What client.py says, run as this user."""
    done = run(*as_user(uid, groups), PYTHON, "-I", "-c", CLIENT, path, access)
    return json.loads(done.stdout) if done.returncode == 0 else outcome(done)


def member_asks(path: str, access: str = "rw") -> dict[str, Any]:
    return ask(MEMBER, [GROUP, MAY_CONNECT], path, access)


def main_pid() -> int:
    return int(show("MainPID")["MainPID"])


def processes() -> dict[str, int]:
    """The pids of the processes by name."""
    launcher = main_pid()
    found = {"launcher": launcher}
    for word in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        found[role(int(word))] = int(word)
    return found


def reload_until(text: str) -> dict[str, Any]:
    """Reload, and wait until the journal's new messages have `text`; each of their lines is one record there."""
    before = len(said())
    done = outcome(run("systemctl", "reload", "fdbroker.service"))
    wait_for(text, lambda: any(text in one for one in said()[before:]))
    return {**done, "said": "\n".join(said()[before:]), "state": show("ActiveState", "StatusText")}


# ---- the steps, in their order


def installed() -> dict[str, Any]:
    again = run(Path(__file__).parents[3] / "scripts/install")
    (packages,) = Path("/opt/fdbroker/lib").glob("python3*/site-packages")
    for place in (packages, Path(f"/usr/local/lib/{packages.parent.name}/dist-packages")):
        place.mkdir(parents=True, exist_ok=True)
        (place / "planted.pth").write_text(PLANTED)
    folders = {name: os.stat(name) for name in ("/run/fdbroker", "/etc/fdbroker", "/etc/fdbroker/policy.d")}
    return {
        "again": again.returncode,
        "users": {
            f"fdbroker-{name}": pwd.getpwnam(f"fdbroker-{name}").pw_shell
            for name in ("opener", "keeper", "inbox", "namespaces")
        },
        "folders": {name: [found.st_uid, oct(stat.S_IMODE(found.st_mode))] for name, found in folders.items()},
        "policy": outcome(run("fdbroker", "policy", "check")),
    }


def activation() -> dict[str, Any]:
    make_node("/dev/lab/zero", 1, 5)
    make_node("/dev/lab/read-only", 1, 5)
    make_node("/dev/lab/zero-other", 1, 8)  # its name fits, and it is another device
    make_node("/dev/lab/secret", 1, 5)  # no rule names it
    if os.path.exists("/dev/net/tun"):
        os.unlink("/dev/net/tun")
    make_node("/dev/net/tun", 10, 200)
    write_policy(RULES)
    enabled = outcome(run("systemctl", "enable", "--now", "fdbroker.socket"))
    made = os.stat(SOCKET)
    before = show("ActiveState", "MainPID")
    began_s = time.monotonic()
    ping = outcome(run(*member("fdbroker", "ping", "--json")))
    return {
        "enabled": enabled,
        "socket": [made.st_uid, grp.getgrgid(made.st_gid).gr_name, oct(made.st_mode)],
        "before": before,
        "ping": ping,
        "first_answer_s": time.monotonic() - began_s,
        "after": show("ActiveState", "MainPID", "StatusText", "Type"),
    }


def granted() -> dict[str, Any]:
    return {
        "zero": member_asks("/dev/lab/zero"),
        "read_only": member_asks("/dev/lab/read-only", "ro"),
        "tun": member_asks("/dev/net/tun"),
        "command": outcome(
            run(*member("fdbroker", "open", "/dev/lab/zero", "--", "sh", "-c", "head -c 4 <&3 | od -An -tx1"))
        ),
    }


def denied() -> dict[str, Any]:
    return {
        "other_user": ask(OTHER, [MAY_CONNECT], "/dev/lab/zero", "ro"),
        "root": ask(0, [MAY_CONNECT], "/dev/lab/zero", "ro"),
        "no_rule": member_asks("/dev/lab/secret"),
        "no_rule_and_absent": member_asks("/dev/lab/absent"),
        "more_access": member_asks("/dev/lab/read-only", "rw"),
        "other_device": member_asks("/dev/lab/zero-other"),
        "no_member": ask(OTHER, [GROUP], "/dev/lab/zero", "ro"),
        "command": outcome(run(*member("fdbroker", "open", "/dev/lab/secret"))),
    }


def journal() -> dict[str, Any]:
    wanted = "FDBROKER_RESOURCE=/dev/lab/"
    return {
        "allow": records("FDBROKER_DECISION=allow", wanted + "zero"),
        "deny": records("FDBROKER_DECISION=deny", wanted + "secret"),
        "opener": processes()["opener"],
    }


def confinement() -> dict[str, Any]:
    words = {name: Path(f"/proc/{pid}/cmdline").read_text().split("\0") for name, pid in processes().items()}
    return {
        "started": {name: found[:6] for name, found in words.items()},
        "site": run(PYTHON, "-I", "-c", "").stderr,
        "processes": {name: status_of(pid) for name, pid in processes().items()},
        "said": "\n".join(said()),
        "uids": {name: pwd.getpwnam(f"fdbroker-{name}").pw_uid for name in ("opener", "keeper", "inbox")},
    }


def listing() -> dict[str, Any]:
    command = member("timeout", "20", "fdbroker", "list", "--more", "--json")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watcher:
        try:
            first = json.loads(watcher.stdout.readline())
            make_node("/dev/lab/zero-new", 1, 5)
            made = json.loads(watcher.stdout.readline())
            os.unlink("/dev/lab/zero-new")
            removed = json.loads(watcher.stdout.readline())
        finally:
            watcher.kill()
    names = [[offer["resource"] for offer in offers] for offers in (first, made, removed)]
    return {"first": names[0], "made": names[1], "removed": names[2]}


def reload() -> dict[str, Any]:
    before = member_asks("/dev/lab/secret")
    pid = main_pid()
    write_policy(RULES + '      - {path: "/dev/lab/secret", access: rw, class: mem}\n')
    done = reload_until("reloaded")
    return {"before": before, **done, "after": member_asks("/dev/lab/secret"), "same": main_pid() == pid}


def reload_broken() -> dict[str, Any]:
    write_policy(RULES.replace("access", "acess"))
    done = reload_until("acess")
    after = member_asks("/dev/lab/secret")
    write_policy(RULES)
    return {**done, "after": after, "back": reload_until("is reloaded"), "old": member_asks("/dev/lab/secret")}


def killed() -> dict[str, Any]:
    found = {}
    for name in ("launcher", "opener", "keeper", "inbox", "witness"):
        before = processes()
        began_s = time.monotonic()
        os.kill(before[name], signal.SIGKILL)
        # nobody connects meanwhile: systemd alone brings it back
        wait_for("the next one", lambda old=before["launcher"]: main_pid() not in (0, old))
        wait_for("its start", lambda: show("ActiveState")["ActiveState"] == "active")
        found[name] = {
            "after_s": time.monotonic() - began_s,
            "left": [other for other, pid in before.items() if os.path.exists(f"/proc/{pid}")],
            "asked": member_asks("/dev/lab/zero"),
        }
    return found


def watchdog() -> dict[str, Any]:
    drop_in = Path("/run/systemd/system/fdbroker.service.d/watchdog.conf")
    drop_in.parent.mkdir(parents=True)
    drop_in.write_text("[Service]\nWatchdogSec=2s\n")
    run("systemctl", "daemon-reload")
    run("systemctl", "restart", "fdbroker.service")
    before = processes()
    time.sleep(3)  # healthy for longer than the watchdog waits
    healthy = main_pid() == before["launcher"]
    os.kill(before["inbox"], signal.SIGSTOP)
    began_s = time.monotonic()
    wait_for("the next one", lambda: main_pid() not in (0, before["launcher"]))
    after_s = time.monotonic() - began_s
    wait_for("its start", lambda: show("ActiveState")["ActiveState"] == "active")
    asked = member_asks("/dev/lab/zero")
    drop_in.unlink()
    run("systemctl", "daemon-reload")
    return {"healthy": healthy, "after_s": after_s, "left": os.path.exists(f"/proc/{before['inbox']}"), "asked": asked}


def group_policy() -> dict[str, Any]:
    make_node("/dev/lab/group", 1, 5, 0o660)
    os.chown("/dev/lab/group", 0, NODE_GROUP)
    rule = f"version: 1\ngroups: {{{GROUP}: {{devices: [{{path: /dev/lab/group, access: rw, class: mem}}]}}}}\n"
    started = start_with(rule)
    opener = status_of(processes()["opener"])
    return {"started": started, "opener": opener, "asked": member_asks("/dev/lab/group")}


def reload_beyond() -> dict[str, Any]:
    write_policy(RULES)
    return {**reload_until("restart"), "asked": member_asks("/dev/lab/group")}


def stop() -> dict[str, Any]:
    start_with(RULES)
    pids = processes()
    idle = socket.socket(socket.AF_UNIX)
    idle.connect(SOCKET)
    idle.sendall(b"\0\0\0\4PING")
    idle.recv(8)
    command = member("timeout", "20", "fdbroker", "list", "--more", "--json")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watcher:
        watcher.stdout.readline()
        began_s = time.monotonic()
        run("systemctl", "stop", "fdbroker.service")
        took_s = time.monotonic() - began_s
        watched = watcher.wait(5)
    end = idle.recv(1)
    idle.close()
    return {
        "took_s": took_s,
        "idle": end.hex(),
        "watcher": watched,
        "left": [name for name, pid in pids.items() if os.path.exists(f"/proc/{pid}")],
        **show("ActiveState", "Result", "ExecMainStatus"),
        "socket": os.path.exists(SOCKET),
    }


def invalid_policy() -> dict[str, Any]:
    code = start_with("version: 1\nevrybody: {}\n")
    shown = show("ActiveState", "Result", "ExecMainStatus", "NRestarts")
    lines = [text for text in said() if "evrybody" in text]
    # clients start it as well, one of them or many: each is told why it is not served
    clients = [outcome(run(*member("fdbroker", "ping"))) for _ in range(30)]
    refusing = main_pid()
    running = sorted(role(int(pid)) for pid in Path(f"/proc/{refusing}/task/{refusing}/children").read_text().split())
    # once the policy is right, the next client is served, and no admin need do anything
    write_policy(RULES)
    time.sleep(1.1)
    after = member_asks("/dev/lab/zero")
    return {
        "code": code,
        **shown,
        "said": lines,
        "clients": clients,
        "running": running,
        "after": after,
        "same": main_pid() == refusing,
        "socket": show("ActiveState", unit="fdbroker.socket")["ActiveState"],
    }


def security() -> dict[str, Any]:
    return {"exposure": exposure()}


def gone() -> dict[str, Any]:
    with contextlib.suppress(OSError):
        os.unlink("/dev/lab/zero")
    absent = member_asks("/dev/lab/zero")
    run("systemctl", "stop", "fdbroker.socket", "fdbroker.service")
    return {"absent": absent, "socket": os.path.exists(SOCKET), "ping": run(*member("fdbroker", "ping")).returncode}


report(
    [
        installed,
        activation,
        granted,
        denied,
        journal,
        confinement,
        listing,
        reload,
        reload_broken,
        killed,
        watchdog,
        group_policy,
        reload_beyond,
        stop,
        invalid_policy,
        security,
        gone,
    ]
)
