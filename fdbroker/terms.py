"""The nouns of the design, as plain values that every layer shares.

Runs in: every process. Imports nothing of ours and nothing heavy: the opener loads it.
An attacker controls: the `path` of a Resource and the `comm` of a Subject; nothing else here comes from a client.
"""

from __future__ import annotations

from typing import NamedTuple

# A uid or gid that the kernel could not map into our user namespace shows as this number
# (/proc/sys/kernel/overflowuid, its default). Anybody may stand behind it, so it matches no rule.
UNMAPPED_ID = 65534
# (uid_t)-1: the kernel's "no such id"; never a user.
INVALID_ID = 0xFFFF_FFFF

ACCESS_NAMES = ("ro", "wo", "rw")
# The accesses that may be asked for where a rule gives one.
ACCESS_COVERS: dict[str, frozenset[str]] = {
    "ro": frozenset({"ro"}),
    "wo": frozenset({"wo"}),
    "rw": frozenset({"ro", "wo", "rw"}),
}


class Resource(NamedTuple):
    """What is asked for: the device node at `path`, exactly as the client wrote it, with `access` (ro, wo or rw)."""

    path: str
    access: str


class Subject(NamedTuple):
    """Who asks. Every field comes from the kernel; identity is frozen when the client called connect(2).

    `gids` holds the primary and all supplementary groups. `pid` is for the audit record only: nothing is decided
    by it. `comm` is the program's own name for itself, hence for the record only as well. `label` is the MAC label
    or "". `foreign` is true unless the process is shown to live in the broker's own user namespace.
    """

    uid: int
    gids: frozenset[int]
    gid: int
    pid: int
    comm: str
    label: str
    foreign: bool


class Rule(NamedTuple):
    """One allow rule, compiled: numbers for names, still with the place it came from.

    `pattern` is an absolute glob whose wildcards never match a slash. `kernel_class` is the kernel subsystem that
    the opened node must belong to, `device` a glob over "MAJOR:MINOR" that it must have; "" asks for nothing.
    `dangerous` allows block devices and the nodes on the list of dangerous names. `source` says whom the rule is
    for ("group audio"), `where` the place ("/etc/fdbroker/policy.yaml:7").
    """

    pattern: str
    access: str
    kernel_class: str
    device: str
    dangerous: bool
    source: str
    where: str


class DenyRule(NamedTuple):
    """One entry of `deny`: `patterns` are denied to every subject of `uids` or `gids`, or to all when `everyone`."""

    patterns: tuple[str, ...]
    uids: frozenset[int]
    gids: frozenset[int]
    everyone: bool
    source: str
    where: str


class Grant(NamedTuple):
    """One descriptor as it is about to leave: what it is and the rule that allowed it. Owns nothing."""

    resource: Resource
    rule: Rule
    rdev: str


class Offer(NamedTuple):
    """One resource that a subject may open now, with the most access it may ask for and the rule that says so."""

    path: str
    access: str
    where: str
