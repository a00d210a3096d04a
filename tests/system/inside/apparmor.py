"""Inside the virtual machine, whose kernel has AppArmor: the installed service under its profile.

The unit starts it; the profile is loaded as docs/operating.md says. `apparmor.py labels`: on a kernel that says labels.
"""

from __future__ import annotations

import grp
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from steps import (
    GROUP,
    MEMBER,
    as_user,
    make_node,
    outcome,
    records,
    report,
    role,
    run,
    said,
    show,
    start_with,
    watched,
    write_policy,
)

OLD_KERNEL = (Path(__file__).parent / "oldkernel.py").read_text()
PYTHON = "/opt/fdbroker/bin/python3"
DOCUMENTS = "/usr/share/doc/fdbroker"
PROFILE = "/etc/apparmor.d/fdbroker"
LOADED = Path("/sys/kernel/security/apparmor/profiles")
DROP_IN = f"{DOCUMENTS}/namespaces.conf"
IN_FORCE = Path("/etc/systemd/system/fdbroker.service.d/namespaces.conf")
MAY_CONNECT = grp.getgrnam("fdbroker").gr_gid
RULES = f"""\
version: 1
groups:
  {GROUP}:
    devices:
      - {{path: "/dev/lab/zero*", access: rw, class: mem, device: "1:5"}}
    send: [mail]
    subscribe: [mail]
topics: {{mail: {{deliver: [queue]}}}}
"""
CLIENTS = """\
abi <abi/3.0>,
profile lab-player flags=(attach_disconnected) { file, network, unix, signal, ptrace, capability, }
profile lab-trial flags=(attach_disconnected, complain) { file, network, unix, signal, ptrace, capability, }
profile lab-browser flags=(attach_disconnected) { file, network, unix, signal, ptrace, capability, }
"""
FOR_LABELS = f"""\
version: 1
groups:
  {GROUP}:
    devices:
      - {{path: /dev/lab/zero, access: rw, class: mem, device: "1:5", label: [lab-player, lab-trial]}}
      - {{path: /dev/lab/secret, access: rw, class: mem, device: "1:5"}}
deny:
  - {{everyone: true, label: "lab-b*", devices: [/dev/lab/secret]}}
"""
OPENS = (Path(__file__).parent / "opens.py").read_text()
TRIES = (Path(__file__).parent / "tries.py").read_text()


def member(*command: str | Path) -> tuple[str, ...]:
    return (*as_user(MEMBER, [GROUP, MAY_CONNECT]), *map(str, command))


def main_pid() -> int:
    return int(show("MainPID")["MainPID"])


def labels() -> dict[str, str]:
    """The profile of each process of the service, by its name."""
    launcher = main_pid()
    found = {"launcher": Path(f"/proc/{launcher}/attr/current").read_text().strip()}
    for word in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        found[role(int(word))] = Path(f"/proc/{word}/attr/current").read_text().strip()
    return found


def denials() -> list[str]:
    """What the kernel says that AppArmor refused."""
    return [line for line in run("dmesg").stdout.splitlines() if 'apparmor="DENIED"' in line]


def ask(path: str) -> dict[str, Any]:
    return outcome(
        run(*member("fdbroker", "open", path, "--access", "rw", "--", "sh", "-c", "head -c 4 <&3 | od -An -tx1"))
    )


def under(profile: str) -> tuple[str, ...]:
    return ("aa-exec", "--profile", profile, "--")


# ---- the steps, in their order


def loaded() -> dict[str, Any]:
    Path("/proc/sys/kernel/printk_ratelimit").write_text("0")  # every refusal counts
    before = LOADED.read_text()
    there = os.path.exists(PROFILE)
    run("cp", f"{DOCUMENTS}/apparmor/fdbroker", "/etc/apparmor.d/", check=True)
    done = outcome(run("apparmor_parser", "--replace", PROFILE))
    return {
        "modules": Path("/sys/kernel/security/lsm").read_text().split(","),
        "before": before,
        "there": there,
        "parser": done,
        "after": LOADED.read_text(),
    }


def served() -> dict[str, Any]:
    make_node("/dev/lab/zero", 1, 5)
    make_node("/dev/lab/secret", 1, 5)
    run("systemctl", "start", "fdbroker.socket", check=True)
    started = start_with(RULES)
    return {
        "started": started,
        "said": said()[-10:],
        "labels": labels(),
        "granted": ask("/dev/lab/zero"),
        "denied": ask("/dev/lab/secret"),
        "client": outcome(run(*member("cat", "/proc/self/attr/current"))),
    }


def listed() -> dict[str, Any]:
    return {"watched": watched(member(), lambda: make_node("/dev/lab/zero-new", 1, 5))}


def messages() -> dict[str, Any]:
    send = outcome(run(*member("fdbroker", "send", "--to", str(MEMBER), "mail", "under a profile")))
    return {"sent": send, "received": outcome(run(*member("timeout", "30", "fdbroker", "receive")))}


def reloaded() -> dict[str, Any]:
    pid = main_pid()
    write_policy(RULES.replace("zero*", "*"))
    done = outcome(run("systemctl", "reload", "fdbroker.service"))
    if done["code"]:
        return {**done, "said": said()[-10:], "denials": denials()}
    return {**done, "after": ask("/dev/lab/secret"), "same": main_pid() == pid}


def labelled() -> dict[str, Any]:
    """The same user with a profile and without: a device for a label, and one that is denied to another label."""
    file = Path("/run/clients")
    file.write_text(CLIENTS)
    run("apparmor_parser", "--replace", file, check=True)
    started = start_with(FOR_LABELS)
    asked = (PYTHON, "-I", "-B", "-c", OPENS)
    words: dict[str, tuple[str, ...]] = {"": member(*asked), "lab-player": (*under("lab-player"), *member(*asked))}
    if sys.argv[1:]:
        words |= {name: (*under(name), *member(*asked)) for name in ("lab-trial", "lab-browser")}
        words["by itself"] = member(*under("lab-player"), *asked)
    done = {name: outcome(run(*command)) for name, command in words.items()}
    return {
        "started": started,
        "said": said()[-10:],
        "got": {name: json.loads(one["stdout"]) if one["code"] == 0 else one for name, one in done.items()},
        "records": sorted({record.get("FDBROKER_LABEL", "") for record in records("FDBROKER_DECISION=allow")}),
    }


def namespaces() -> dict[str, Any]:
    """With the drop-in; the kernel is too old for new ones."""
    IN_FORCE.parent.mkdir(parents=True)
    IN_FORCE.write_text(Path(DROP_IN).read_text())
    run("systemctl", "daemon-reload", check=True)
    run("ip", "netns", "add", "vpn-a", check=True)
    run("ip", "-n", "vpn-a", "link", "set", "lo", "up", check=True)
    started = start_with(
        RULES.replace(
            "    send:",
            "    namespaces:\n      - {type: net, name: 'vpn-*'}\n"
            "      - {type: [net, uts], of: caller}\n      - {type: net, create: true}\n"
            "    sockets:\n      - {namespace: 'vpn-*', bind: [80]}\n    send:",
        )
    )
    asked = outcome(run(*member(PYTHON, "-I", "-c", OLD_KERNEL, str(os.getpid()))))
    listed = watched(member(), lambda: run("ip", "netns", "add", "vpn-b", check=True))
    return {
        "started": started,
        "said": said()[-10:],
        "labels": labels(),
        "asked": json.loads(asked["stdout"]) if asked["code"] == 0 else asked,
        "listed": listed,
        "inode": os.stat("/run/netns/vpn-a").st_ino,
    }


def nothing_refused() -> dict[str, Any]:
    """Of all that the service did until here."""
    stopped = outcome(run("systemctl", "stop", "fdbroker.service"))
    return {"stopped": stopped, "result": show("Result", "ExecMainStatus"), "denials": denials()}


def taken_over() -> dict[str, Any]:
    """Root itself, with every capability, under the profile and without."""
    found = {}
    for name, words in (("confined", under("fdbroker")), ("free", ())):
        with subprocess.Popen(["sleep", "1000"]) as other:
            done = outcome(run(*words, PYTHON, "-I", "-B", "-c", TRIES, str(other.pid)))
            other.kill()
        found[name] = json.loads(done["stdout"]) if done["code"] == 0 else done
    return {**found, "denials": denials()}


report(
    [loaded, served, listed, labelled, namespaces, nothing_refused]
    if sys.argv[1:]
    else [loaded, served, listed, messages, reloaded, labelled, namespaces, nothing_refused, taken_over]
)
