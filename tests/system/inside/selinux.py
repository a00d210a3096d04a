"""Inside the virtual machine, whose kernel has SELinux: the service in its domain, enforced, started without systemd.

selinux.py POLICY, which is the distribution's base policy with ours
"""

from __future__ import annotations

import grp
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from steps import GROUP, MEMBER, as_user, make_node, outcome, report, run, wait_for, watched, write_policy

HERE = Path(__file__).parent
PYTHON = "/opt/fdbroker/bin/python3"
SELINUX = Path("/sys/fs/selinux")
LOG = Path("/run/said")
MAY_CONNECT = grp.getgrnam("fdbroker").gr_gid
RULES = f"""\
version: 1
groups:
  {GROUP}:
    devices:
      - {{path: "/dev/lab/*", access: rw, class: mem, device: "1:*", dangerous: true}}
    namespaces:
      - {{type: net, name: "vpn-*"}}
      - {{type: [net, uts], of: caller}}
    sockets:
      - {{namespace: "vpn-*", bind: [80]}}
    send: [mail]
    subscribe: [mail]
topics: {{mail: {{deliver: [queue]}}}}
"""
FOR_LABELS = f"""\
version: 1
groups:
  {GROUP}:
    devices:
      - {{path: /dev/lab/zero, access: rw, class: mem, device: "1:5", label: "*:lab_player_t:*"}}
      - {{path: /dev/lab/secret, access: rw, class: mem, device: "1:5"}}
deny:
  - {{everyone: true, label: "*:lab_player_t:*", devices: [/dev/lab/secret]}}
"""
# the labels that restorecon would give
LABELS = {
    "fdbroker_exec_t": ["/usr/bin/fdbroker"],
    "fdbroker_etc_t": ["/etc/fdbroker", "/etc/fdbroker/policy.yaml", "/etc/fdbroker/policy.d"],
    "fdbroker_var_lib_t": ["/var/lib/fdbroker"],
    "fdbroker_var_run_t": ["/run/fdbroker"],
    "usr_t": ["/usr", "/opt"],
    "bin_t": ["/usr/bin", os.path.realpath(PYTHON), "/usr/bin/setpriv"],
    "etc_t": ["/etc", "/etc/passwd", "/etc/group", "/etc/nsswitch.conf"],
    "shadow_t": ["/etc/shadow"],
    "var_run_t": ["/run"],
    "device_t": ["/dev", "/dev/lab"],
    "zero_device_t": ["/dev/lab/zero"],
    "memory_device_t": ["/dev/lab/memory"],
}
TREES = {"/opt/fdbroker": "usr_t", "/opt/fdbroker/lib": "lib_t", "/opt/fdbroker/bin": "bin_t"}
broker: list[subprocess.Popen[str]] = []


def within(domain: str, *command: str | Path) -> tuple[str, ...]:
    return ("runcon", f"system_u:system_r:{domain}:s0", *map(str, command))


def member(*command: str | Path) -> tuple[str, ...]:
    return within("unconfined_t", *as_user(MEMBER, [GROUP, MAY_CONNECT]), *command)


def denials() -> list[str]:
    """What the kernel says that was refused to the service's domain."""
    return [line for line in run("dmesg").stdout.splitlines() if "avc:  denied" in line and ":fdbroker_t:" in line]


def ask(path: str) -> dict[str, Any]:
    read = "import os; print(os.read(3, 4).hex())"
    return outcome(run(*member("fdbroker", "open", path, "--access", "rw", "--", PYTHON, "-I", "-c", read)))


# ---- the steps, in their order


def loaded() -> dict[str, Any]:
    Path("/proc/sys/kernel/printk_ratelimit").write_text("0")  # every refusal counts
    run("mount", "-t", "selinuxfs", "selinuxfs", SELINUX, check=True)
    policy = Path(sys.argv[1]).read_bytes()
    file = os.open(SELINUX / "load", os.O_RDWR)
    os.write(file, policy)
    os.close(file)
    return {"label": Path("/proc/self/attr/current").read_text().rstrip("\0")}


def served() -> dict[str, Any]:
    make_node("/dev/lab/zero", 1, 5)
    make_node("/dev/lab/memory", 1, 5)  # what its label says counts
    run("install", "-d", "-m", "0755", "/run/fdbroker", "/etc/fdbroker/policy.d", check=True)
    run("install", "-d", "-m", "0700", "-o", "fdbroker-inbox", "-g", "fdbroker-inbox", "/var/lib/fdbroker", check=True)
    write_policy(RULES)
    for label, paths in LABELS.items():
        run("chcon", f"system_u:object_r:{label}:s0", *paths, check=True)
    for path, label in TREES.items():
        run("chcon", "--recursive", "--no-dereference", f"system_u:object_r:{label}:s0", path, check=True)
    (SELINUX / "enforce").write_text("1")
    command = ("fdbroker", "serve", "--group", "fdbroker")
    with LOG.open("w") as log:
        # by a program in the domain of systemd, for that one alone comes into the service's
        start = within("init_t", PYTHON, "-I", "-c", f"import os; os.execvp('fdbroker', {command!r})")
        broker.append(subprocess.Popen(start, stdin=subprocess.PIPE, stdout=log, stderr=log, text=True))
    wait_for("its socket", lambda: "serving with" in LOG.read_text(), 120)
    children = Path(f"/proc/{broker[0].pid}/task/{broker[0].pid}/children").read_text().split()
    pids = [str(broker[0].pid), *children]
    return {
        "enforced": (SELINUX / "enforce").read_text(),
        "labels": [Path(f"/proc/{pid}/attr/current").read_text().rstrip("\0") for pid in pids],
        "granted": ask("/dev/lab/zero"),
        "memory": ask("/dev/lab/memory"),
        "denials": denials(),
    }


def listed() -> dict[str, Any]:
    node = watched(member(), lambda: make_node("/dev/lab/new", 1, 5))
    folder = watched(member(), lambda: run("ip", "netns", "add", "vpn-a", check=True))
    run("ip", "-n", "vpn-a", "link", "set", "lo", "up", check=True)
    run("chcon", "system_u:object_r:ifconfig_runtime_t:s0", "/run/netns", check=True)
    namespace = watched(member(), lambda: run("ip", "netns", "add", "vpn-b", check=True))
    return {"node": node, "folder": folder, "namespace": namespace}


def more() -> dict[str, Any]:
    old = (HERE / "oldkernel.py").read_text()
    asked = outcome(run(*member(PYTHON, "-I", "-c", old, str(os.getpid()))))
    return {
        "asked": json.loads(asked["stdout"]) if asked["code"] == 0 else asked,
        "inode": os.stat("/run/netns/vpn-a").st_ino,
        "sent": outcome(run(*member("fdbroker", "send", "--to", str(MEMBER), "mail", "in a domain"))),
        "received": outcome(run(*member("timeout", "30", "fdbroker", "receive"))),
    }


def labelled() -> dict[str, Any]:
    """The same user in two domains: a device for one of them, and one that is denied to it."""
    make_node("/dev/lab/secret", 1, 5)
    run("chcon", "system_u:object_r:zero_device_t:s0", "/dev/lab/secret", check=True)
    write_policy(FOR_LABELS)
    broker[0].send_signal(signal.SIGHUP)
    wait_for("the new policy", lambda: "reloaded" in LOG.read_text())
    words = (*as_user(MEMBER, [GROUP, MAY_CONNECT]), PYTHON, "-I", "-B", "-c", (HERE / "opens.py").read_text())
    done = {domain: outcome(run(*within(domain, *words))) for domain in ("unconfined_t", "lab_player_t")}
    return {domain: json.loads(one["stdout"]) if one["code"] == 0 else one for domain, one in done.items()}


def stopped() -> dict[str, Any]:
    broker[0].send_signal(signal.SIGTERM)
    code = broker[0].wait(60)  # the machine is emulated: what is asked is the exit code
    return {"code": code, "denials": denials(), "socket": os.path.exists("/run/fdbroker/socket")}


def taken_over() -> dict[str, Any]:
    """Root itself, with every capability, in the domain and in the kernel's own."""
    found = {}
    tries = (HERE / "tries.py").read_text()
    for name, words in (("confined", within("fdbroker_t")), ("free", ())):
        with subprocess.Popen(["sleep", "1000"]) as other:
            done = outcome(run(*words, PYTHON, "-I", "-B", "-c", tries, str(other.pid)))
            other.kill()
        found[name] = json.loads(done["stdout"]) if done["code"] == 0 else done
        (SELINUX / "enforce").write_text("0")
    return found


report([loaded, served, listed, more, labelled, stopped, taken_over])
