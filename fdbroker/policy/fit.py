"""Judges whether a node fits a rule, and which nodes a rule gives only with `dangerous: true`.

Runs in: opener, keeper, launcher, command line. An attacker controls which allowed path is asked for. Nothing is opened
or looked up here.

The reader or writer of a dangerous node has power over the machine, or over other people's sessions. A name proves
nothing, for root can make a node of any name; so a node is judged by its number, its class and its name in the kernel
as well. Source: Documentation/admin-guide/devices.txt, linux/miscdevice.h.
"""

from __future__ import annotations

import re
import stat
from functools import lru_cache
from typing import NamedTuple

from fdbroker.policy.paths import component_regex
from fdbroker.terms import OWN_TERMINAL, DeviceRule

# Names at any depth below /dev, and in the kernel.
DANGEROUS_NAMES = (
    *("mem", "kmem", "port", "kmsg", "watchdog*", "snapshot", "msr*", "nvram"),
    # terminals
    *("tty*", "pty*", "ptmx", "pts", "vcs*", "console", "hvc*", "rfcomm*"),
    # disks, and other stores of the machine's software
    *("sd*", "vd*", "nvme*", "ng*", "mmcblk*", "loop*", "dm-*", "mapper", "btrfs-control", "sg*", "bsg", "st*", "nst*"),
    *("mtd*", "ipmi*"),
    # devices that a program plays, such as a keyboard that types for others, and a tap on all USB devices
    *("uinput", "userio", "uhid", "vhci", "cuse", "uio*", "usbmon*"),
)
DANGEROUS_CLASSES = (
    *("tty", "vc", "block", "nvme", "nvme-generic", "nvme-subsystem", "scsi_generic", "scsi_tape", "scsi_changer"),
    *("bsg", "mtd", "mmc_rpmb", "watchdog", "msr", "ipmi", "uio", "usbmon"),
)
_TERMINAL = "a terminal"
_MAJORS_OF_TERMINALS = (2, 3, 4, 5, *range(136, 144), 166, 188, 204, 229)
# Fixed numbers: for these no driver need be there, for the kernel loads some of them when a node is opened.
DANGEROUS_NUMBERS = (
    {"1:1": "mem", "1:2": "kmem", "1:4": "port", "1:11": "kmsg"}
    | {f"{major}:*": _TERMINAL for major in _MAJORS_OF_TERMINALS}
    | {"7:*": "the memory of a console", "9:*": "a tape", "10:130": "watchdog", "10:137": "vhci", "10:144": "nvram"}
    | {
        "10:203": "cuse",
        "10:223": "uinput",
        "10:231": "snapshot",
        "10:234": "btrfs-control",
        "10:236": "mapper/control",
    }
    | {"10:237": "loop-control", "10:239": "uhid", "10:240": "userio", "21:*": "a disk (sg)", "90:*": "mtd"}
    | {"202:*": "msr"}
)
# Terminals of windows and of ssh: the kernel has no entry in /sys/dev for these. Source: drivers/tty/pty.c.
PTS_MAJORS = range(136, 144)

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFREG: "a regular file",
    stat.S_IFDIR: "a folder",
    stat.S_IFSOCK: "a socket",
    stat.S_IFLNK: "a link",
}
_NAME = "|".join(map(component_regex, DANGEROUS_NAMES))
_IN_PATH = re.compile(f"/(?:{_NAME})(?:/|\\Z)")
_ALONE = re.compile(_NAME)


class Facts(NamedTuple):
    """The facts about a node: its own path, all links followed; its type (S_IFCHR …); its number "MAJOR:MINOR".

    `kernel_class` is the subsystem of the device with that number, `kernel_name` the last part of its name there;
    both are "" where the kernel has no such device.
    """

    path: str
    kind: int
    number: str
    kernel_class: str
    kernel_name: str


def is_device(facts: Facts) -> bool:
    """Whether it is a device node at all."""
    return facts.kind in (stat.S_IFCHR, stat.S_IFBLK)


def misfit(rule: DeviceRule, facts: Facts, *, opened: bool = False) -> str:
    """The reason for which a node does not fit `rule`, or "".

    A number that no driver has, and that the rule names exactly, has no class before the node is `opened`.
    """
    if not is_device(facts):
        return f"it is {_KINDS.get(facts.kind, 'no device')}, not a device node"
    if facts.kind == stat.S_IFCHR and facts.number == OWN_TERMINAL:
        return f"it is {OWN_TERMINAL}, the terminal of the process that opens it: a program opens its own by itself"
    if rule.device and not number_fits(rule.device, facts.number):
        return f"its device number is {facts.number}, not {rule.device}"
    unknown_yet = not (facts.kernel_class or opened) and rule.device == facts.number
    if rule.kernel_class and facts.kernel_class != rule.kernel_class and not unknown_yet:
        why = f"its class is {facts.kernel_class or 'unknown'}, not {rule.kernel_class}"
        if not facts.kernel_class and int(facts.number.partition(":")[0]) in PTS_MAJORS:
            why += ': the kernel names none for /dev/pts; write `device: "136:*"` in its place'
        return why
    power = "" if rule.dangerous else dangerous_node(facts)
    return f"{power}, and the rule is not marked dangerous" if power else ""


def number_fits(pattern: str, number: str) -> bool:
    """Whether a device number is what a rule's `device` says."""
    return pattern == number or all(
        want in ("*", have) for want, have in zip(pattern.split(":"), number.split(":"), strict=True)
    )


@lru_cache(maxsize=1024)
def dangerous_node(facts: Facts) -> str:
    """The reason for which a node is a dangerous one, or ""."""
    if facts.kind == stat.S_IFBLK:
        return "it is a block device"
    if is_dangerous(facts.path):
        return f"its name is {facts.path}"
    what = dangerous_number(facts.number)
    if what:
        return f"its number {facts.number} is that of {what}"
    if facts.kernel_class in DANGEROUS_CLASSES:
        return f"its class is {facts.kernel_class}"
    if is_dangerous_name(facts.kernel_name):
        return f"the kernel calls it {facts.kernel_name}"
    return ""


def is_dangerous(path: str) -> bool:
    """Whether a path below /dev, without wildcards, is one of the dangerous names, or below one."""
    return _IN_PATH.search(path, len("/dev")) is not None


def is_dangerous_name(name: str) -> bool:
    """Whether one name, without a slash, is one of the dangerous ones."""
    return _ALONE.fullmatch(name) is not None


def dangerous_number(number: str) -> str:
    """The name of the dangerous device that a device number, or a rule's `device`, stands for, or ""."""
    return DANGEROUS_NUMBERS.get(number) or DANGEROUS_NUMBERS.get(number.partition(":")[0] + ":*", "")
