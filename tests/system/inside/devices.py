"""Inside the virtual machine: a broker started by hand, real sound and input devices, users without rights."""

from __future__ import annotations

import array
import ctypes
import fcntl
import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

from clock import clock
from steps import GROUP, MEMBER, OTHER, as_user, outcome, report, run, status_of, wait_for

HERE = Path(__file__).parent
PYTHON = sys.executable
FDBROKER = (PYTHON, "-m", "fdbroker")
SOCKET = "/run/fdbroker/socket"
POLICY = f"""\
version: 1
groups:
  {GROUP}:
    devices:
      - {{path: "/dev/snd/pcmC*D*[pc]", access: rw, class: sound, device: "116:*"}}
      - {{path: "/dev/input/event*", access: ro, class: input, device: "13:*"}}
      - {{path: /dev/uinput, access: rw, class: misc, device: "10:223", dangerous: true}}
    namespaces:
      - {{type: net, name: "vpn-*"}}
      - {{type: [net, uts], of: caller}}
      - {{type: net, create: true}}
    sockets:
      - {{namespace: "vpn-*", bind: [80]}}
    send: [hotkeys]
    subscribe: [hotkeys]
topics: {{hotkeys: {{}}}}
"""
EVIOCGMASK = 0x80104592  # _IOR('E', 0x92, struct input_mask)
MAY_CONNECT = 4100  # the group of the socket
children: list[subprocess.Popen[str]] = []


def member(*command: str) -> tuple[str, ...]:
    return (*as_user(MEMBER, [GROUP, MAY_CONNECT]), *command)


def said(command: tuple[str, ...]) -> dict[str, Any]:
    done = run(*command)
    return {**outcome(done), **(json.loads(done.stdout) if done.returncode == 0 else {})}


def started() -> dict[str, Any]:
    os.mkdir("/run/fdbroker", 0o755)
    policy = Path("/run/fdbroker/policy.yaml")
    policy.write_text(POLICY)
    words = ("serve", "--policy", str(policy), "--socket", SOCKET, "--group", str(MAY_CONNECT))
    # its records, which go to standard error where there is no journal
    with Path("/lab/out/broker").open("w") as records:
        children.append(subprocess.Popen((*FDBROKER, *words), stderr=records, text=True))
    wait_for("its socket", lambda: "serving with" in Path("/lab/out/broker").read_text(), 240)
    return {
        "kernel": os.uname().release,
        "devices": {path: oct(os.stat(path).st_mode) for path in ("/dev/snd/pcmC0D0p", "/dev/snd/pcmC0D1c")},
    }


def sound() -> dict[str, Any]:
    """What goes into the loopback's one end is heard at its other."""
    resources = ("/dev/snd/pcmC0D0p", "/dev/snd/pcmC0D1c")
    return said(member(*FDBROKER, "open", *resources, "--access", "rw", "--", PYTHON, "-I", str(HERE / "tone.py")))


def sound_refused() -> dict[str, Any]:
    return {
        "itself": said(member("dd", "if=/dev/snd/pcmC0D1c", "count=0")),
        "control": said(member(*FDBROKER, "open", "/dev/snd/controlC0")),
    }


def static_node() -> dict[str, Any]:
    """A node that is there before its driver: without one to be had, and then with one that the kernel loads."""
    run("busybox", "rmmod", "uinput", check=True)
    os.mknod("/dev/uinput", 0o20600, os.makedev(10, 223))
    program = Path("/run/modprobe")
    program.write_text('#!/bin/sh\ncase "$*" in *char-major-10-223) exec busybox insmod /lab/uinput.ko ;; esac\n')
    program.chmod(0o755)
    asked = member(*FDBROKER, "open", "/dev/uinput", "--access", "rw")
    found = {}
    for name, loader in (("without", "/bin/false"), ("with", str(program))):
        Path("/proc/sys/kernel/modprobe").write_text(loader)
        found[name] = outcome(run(*asked))
    return {**found, "class": os.path.basename(os.readlink("/sys/dev/char/10:223/subsystem"))}


def keyboard() -> dict[str, Any]:
    """A keyboard types a, b, c, while a user reads it through a granted descriptor."""
    import evdev  # after the broker's start: here this takes seconds

    keys = (evdev.ecodes.KEY_A, evdev.ecodes.KEY_B, evdev.ecodes.KEY_C)
    with evdev.UInput({evdev.ecodes.EV_KEY: keys}, name="lab keyboard") as made:
        node = made.device.path
        command = member(*FDBROKER, "open", node, "--", PYTHON, "-I", str(HERE / "keys.py"), str(len(keys)))
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as reader:
            first = reader.stdout.readline()  # it has the descriptor
            for key in keys:
                for value in (1, 0):
                    made.write(evdev.ecodes.EV_KEY, key, value)
                    made.syn()
            out, error = reader.communicate(timeout=20)
        return {
            "node": oct(os.stat(node).st_mode),
            "typed": list(keys),
            "reader": json.loads(first) if first else error,
            "read": json.loads(out) if out else error,
            "itself": said(member("dd", f"if={node}", "count=0")),
            "other": said((*as_user(OTHER, [MAY_CONNECT]), *FDBROKER, "open", node)),
            "write": said(member(*FDBROKER, "open", node, "--access", "rw")),
        }


def copied(pid: int, path: str) -> int:
    """The very descriptor that a process has of `path`, owned by the caller."""
    number = next(int(one) for one in os.listdir(f"/proc/{pid}/fd") if os.readlink(f"/proc/{pid}/fd/{one}") == path)
    process = os.pidfd_open(pid)
    copy = ctypes.CDLL(None).syscall(438, process, number, 0)  # pidfd_getfd
    os.close(process)
    return copy


def reaching(device_fd: int, kind: int) -> list[int]:
    """The codes of that type that the kernel gives this descriptor; of type 0, the types. Source: linux/input.h."""
    bits = array.array("B", bytes(96))
    fcntl.ioctl(device_fd, EVIOCGMASK, struct.pack("IIQ", kind, len(bits), bits.buffer_info()[0]))
    return [at for at in range(len(bits) * 8) if bits[at // 8] >> at % 8 & 1]


def hotkeys() -> dict[str, Any]:
    """The input bridge of a user without the group `input`: a and F13 are typed, only F13 comes on the topic."""
    import evdev

    keys = (evdev.ecodes.KEY_A, evdev.ecodes.KEY_F13)
    heard, log = Path("/run/heard"), Path("/run/bridge")
    with evdev.UInput({evdev.ecodes.EV_KEY: keys}, name="lab hotkeys") as made, log.open("w") as said_there:
        node = made.device.path
        words = ("bridge", "evdev", node, "hotkeys", "--event", "KEY_F13")
        bridge = subprocess.Popen(member(*FDBROKER, *words), stderr=said_there, text=True)
        with heard.open("w") as out:
            subscriber = subprocess.Popen(member(*FDBROKER, "subscribe", "--json", "hotkeys"), stdout=out, text=True)
        wait_for("the bridge", lambda: "go to the topic" in log.read_text(), 240)
        device_fd = copied(bridge.pid, node)
        reaches = {name: reaching(device_fd, kind) for name, kind in (("types", 0), ("keys", evdev.ecodes.EV_KEY))}
        os.close(device_fd)

        def typed() -> bool:  # until both are there, in whichever order
            for key in (*keys, keys[0]):
                for value in (1, 0):
                    made.write(evdev.ecodes.EV_KEY, key, value)
                    made.syn()
            return heard.read_text().count("\n") >= 3

        wait_for("a message", typed, 240)
        groups = status_of(bridge.pid)["Groups"]
    code = bridge.wait(20)
    subscriber.kill()
    subscriber.wait()
    messages = [json.loads(line) for line in heard.read_text().splitlines()]
    return {
        "node": node,
        "code": code,
        "said": log.read_text(),
        "messages": [{**json.loads(one["payload"]), "uid": one["uid"]} for one in messages],
        "reaches": reaches,
        "groups": groups,
    }


def namespaces() -> dict[str, Any]:
    """What goes on a kernel that gives no pidfd of who connected, and what is refused."""
    run("ip", "netns", "add", "vpn-a", check=True)
    run("ip", "-n", "vpn-a", "link", "set", "lo", "up", check=True)
    found = said(member(PYTHON, str(HERE / "oldkernel.py"), str(os.getpid())))
    return {**found, "inode": os.stat("/run/netns/vpn-a").st_ino}


def stopped() -> dict[str, Any]:
    (broker,) = children
    broker.send_signal(signal.SIGTERM)
    code = broker.wait(60)
    return {"code": code, "socket": os.path.exists(SOCKET), "records": Path("/lab/out/broker").read_text()}


report([started, sound, sound_refused, static_node, keyboard, hotkeys, namespaces, stopped, clock])
