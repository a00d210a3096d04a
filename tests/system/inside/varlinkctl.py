"""Inside the machine: systemd's own Varlink client, from a newer tree, against the running service."""

from __future__ import annotations

import grp
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from steps import GROUP, MEMBER, make_node, outcome, report, run, wait_for, write_policy

TREE = sys.argv[1]
INTERFACES = ("io.fdbroker.Admin", "io.fdbroker.Broker", "io.fdbroker.Inbox", "org.varlink.service")
SOCKET = "/run/fdbroker/socket"
POLICY = f"""\
version: 1
groups:
  {GROUP}:
    devices: [{{path: "/dev/lab/zero*", access: rw, class: mem, device: "1:5"}}]
"""
BROKEN = "version: 1\nevrybody: {}\n"
MAY_CONNECT = grp.getgrnam("fdbroker").gr_gid
USER = ("chroot", f"--userspec={MEMBER}:{MEMBER}", f"--groups={GROUP},{MAY_CONNECT}", TREE, "varlinkctl")


def varlinkctl(*words: str) -> dict[str, Any]:
    return outcome(run(*USER, *words))


def asked_for(path: str, access: str) -> str:
    return f'{{"resources": [{{"device": "{path}", "access": "{access}"}}]}}'


def started() -> dict[str, Any]:
    make_node("/dev/lab/zero", 1, 5)
    Path("/etc/fdbroker/policy.yaml").write_text(POLICY)
    for place in ("/run", "/proc"):
        run("mount", "--rbind", place, f"{TREE}{place}", check=True)
    run("systemctl", "start", "fdbroker.socket", check=True)
    return varlinkctl("--version")


def info() -> dict[str, Any]:
    return varlinkctl("info", "--json=short", SOCKET)


def list_interfaces() -> dict[str, Any]:
    return varlinkctl("list-interfaces", SOCKET)


def list_methods() -> dict[str, Any]:
    return varlinkctl("list-methods", SOCKET)


def introspect() -> dict[str, Any]:
    return {name: varlinkctl("introspect", SOCKET, name) for name in INTERFACES}


def validated() -> dict[str, Any]:
    """Its own parser on what it was given."""
    with open("/run/interface", "w") as file:
        file.write(introspect()["io.fdbroker.Broker"]["stdout"])
    return varlinkctl("validate-idl", "/run/interface")


def call_open() -> dict[str, Any]:
    method = "io.fdbroker.Broker.Open"
    return {
        "granted": varlinkctl("call", "--json=short", SOCKET, method, asked_for("/dev/lab/zero", "rw")),
        "denied": varlinkctl("call", "--json=short", SOCKET, method, asked_for("/dev/lab/other", "ro")),
        "wrong": varlinkctl("call", "--json=short", SOCKET, method, '{"resources": 1}'),
        "method": varlinkctl("call", "--json=short", SOCKET, "io.fdbroker.Broker.Nothing", "{}"),
    }


def call_list() -> dict[str, Any]:
    return varlinkctl("call", "--json=short", SOCKET, "io.fdbroker.Broker.List", "{}")


def call_list_more() -> dict[str, Any]:
    words = ("timeout", "20", *USER, "call", "--more", "--json=short", SOCKET, "io.fdbroker.Broker.List", "{}")
    replies = Path("/run/replies")
    with replies.open("w") as out, subprocess.Popen(words, stdout=out) as watcher:
        try:
            wait_for("the first reply", lambda: replies.read_text().count("\n") == 1)
            make_node("/dev/lab/zero-new", 1, 5)
            wait_for("the second reply", lambda: replies.read_text().count("\n") == 2)
            os.unlink("/dev/lab/zero-new")
            wait_for("the third reply", lambda: replies.read_text().count("\n") == 3)
        finally:
            watcher.send_signal(signal.SIGTERM)
    return {"stdout": replies.read_text()}


def call_about() -> dict[str, Any]:
    return {**varlinkctl("call", "--json=short", SOCKET, "io.fdbroker.Broker.About", "{}"), "policy": POLICY}


def call_reload() -> dict[str, Any]:
    call = ("call", "--json=short", SOCKET, "io.fdbroker.Admin.Reload", "{}")
    found = {"user": varlinkctl(*call), "root": outcome(run("chroot", TREE, "varlinkctl", *call))}
    write_policy(BROKEN)
    return {**found, "broken": outcome(run("chroot", TREE, "varlinkctl", *call))}


def call_refused() -> dict[str, Any]:
    """The policy is still broken, and this call starts the service."""
    run("systemctl", "stop", "fdbroker.service", check=True)
    return call_list()


CALLS = [call_open, call_list, call_list_more, call_about, call_reload, call_refused]
report([started, info, list_interfaces, list_methods, introspect, validated, *CALLS])
