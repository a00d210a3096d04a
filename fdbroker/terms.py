"""The nouns of the design, as plain values that every layer shares.

Runs in: every process. Imports nothing of ours and nothing heavy: the opener loads it.
An attacker controls: what a Resource holds, and the `comm` of a Subject; nothing else here comes from a client.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

# A uid or gid that the kernel could not map into our user namespace shows as this number
# (/proc/sys/kernel/overflowuid, its default). Anybody may stand behind it, so it matches no rule.
UNMAPPED_ID = 65534
# (uid_t)-1: the kernel's "no such id"; never a user.
INVALID_ID = 0xFFFF_FFFF
# Ids that stand for "not known who": no rule is for them.
NOBODY = frozenset({UNMAPPED_ID, INVALID_ID})
# The one owner of all uids for which no owner is known: policy/owners.py.
OTHERS = INVALID_ID

ACCESS_NAMES = ("ro", "wo", "rw")
# The accesses that may be asked for where a rule gives one.
ACCESS_COVERS: dict[str, frozenset[str]] = {
    "ro": frozenset({"ro"}),
    "wo": frozenset({"wo"}),
    "rw": frozenset({"ro", "wo", "rw"}),
}
# The number of /dev/tty, whose open gives the controlling terminal of the opening process. Source: tty(4).
OWN_TERMINAL = "5:0"
# As in /proc/PID/ns. Source: namespaces(7).
NAMESPACE_TYPES = ("net", "mnt", "pid", "user", "uts", "ipc", "cgroup", "time")
# Those that a process can make and hand to another: a pid namespace wants a first process, a user namespace is the
# caller's own business.
NEW_NAMESPACE_TYPES = ("net", "mnt", "uts", "ipc", "cgroup", "time")
FAMILIES = ("inet", "inet6")
SOCKET_TYPES = ("stream", "dgram")
PID_MAX = 4_194_304  # PID_MAX_LIMIT: linux/threads.h
PORT_MAX = 65_535


class Device(NamedTuple):
    """The device node at `path`, exactly as the client wrote it, with `access` (ro, wo or rw)."""

    path: str
    access: str

    @property
    def text(self) -> str:
        """As on the command line."""
        return self.path


class Namespace(NamedTuple):
    """A namespace of `type`, one of NAMESPACE_TYPES: the one called `name`, or that of process `pid`, or a new one.

    One of `name` and `pid` is set; for a new namespace neither. `pid` is a number as the client's own pid namespace
    counts; whose process it is, the kernel says.
    """

    type: str
    name: str = ""
    pid: int = 0

    @property
    def access(self) -> str:
        """A namespace's descriptor is for setns(2), which asks for no access."""
        return "ro"

    @property
    def text(self) -> str:
        """As on the command line."""
        return f"{self.type}:{self.name or (f'pid:{self.pid}' if self.pid else 'new')}"


class Socket(NamedTuple):
    """A new socket in the network namespace called `namespace`; bound to `port` of all addresses, 0 for not bound."""

    namespace: str
    family: str
    type: str
    port: int = 0

    @property
    def access(self) -> str:
        """A socket is for both."""
        return "rw"

    @property
    def text(self) -> str:
        """As on the command line; what is not said there is inet, stream, and not bound."""
        parts = [word for word in (self.family, self.type) if word not in (FAMILIES[0], SOCKET_TYPES[0])]
        parts += [f"bind={self.port}"] if self.port else []
        return ",".join([f"socket:net:{self.namespace}", *parts])


Resource = Device | Namespace | Socket


class Groups(Collection[int]):
    """The groups that a process is in, each once, up to 65,536 of them in 4 bytes each."""

    __slots__ = ("_sorted",)

    def __init__(self, gids: Iterable[int]) -> None:
        self._sorted = array("I", sorted(set(gids)))

    def __contains__(self, gid: object) -> bool:
        at = bisect_left(self._sorted, gid) if isinstance(gid, int) else len(self._sorted)
        return at < len(self._sorted) and self._sorted[at] == gid

    def __iter__(self) -> Iterator[int]:
        return iter(self._sorted)

    def __len__(self) -> int:
        return len(self._sorted)


class Subject(NamedTuple):
    """Who asks. Every field comes from the kernel; identity is frozen when the client called connect(2).

    `gids` holds the primary and all supplementary groups. `pid` is for the audit record only: nothing is decided
    by it. `comm` is the program's own name for itself, hence for the record only as well. `label` is the MAC label
    of who made the socket, "" when it is not known. `foreign` is true unless the process is shown to live in the
    broker's own user namespace. `session` is logind's name for the login session that the process is in, or "".
    `owner` is the user behind the uid, for whom everything is counted: policy/owners.py; rights are the uid's alone.
    """

    uid: int
    gids: Collection[int]
    gid: int
    pid: int
    comm: str
    label: str
    foreign: bool
    session: str = ""
    owner: int = OTHERS


def owner_text(owner: int) -> str:
    """An owner in a record: a uid, or `others` for the one of all uids whose user is not known."""
    return "others" if owner == OTHERS else str(owner)


class DeviceRule(NamedTuple):
    """An allow rule for devices, compiled: numbers for names, still with the place it came from.

    `pattern` is an absolute glob whose wildcards never match a slash. `kernel_class` is the kernel subsystem that
    the opened node must belong to, `device` a glob over "MAJOR:MINOR" that it must have; "" asks for nothing.
    `dangerous` allows block devices and the nodes on the list of dangerous names. `source` says whom the rule is
    for ("group audio"), `where` the place ("/etc/fdbroker/policy.yaml:7"). `labels`, here and in the other rules, are
    globs: without any it is for programs with whatever label, else policy/labels.py says for which.
    """

    pattern: str
    access: str
    kernel_class: str
    device: str
    dangerous: bool
    source: str
    where: str
    labels: tuple[str, ...] = ()


class Uplink(NamedTuple):
    """How a new net namespace is connected: to `bridge`, with an address of `address` ("10.88.0.0/24").

    A network gives each namespace an address of its own, an address with its prefix ("10.88.0.7/24") just that one.
    `isolated`: it reaches the host and what is not isolated, not the other namespaces on that bridge.
    """

    bridge: str
    address: str
    isolated: bool


class NamespaceRule(NamedTuple):
    """An allow rule for namespaces of `types`: by name, of the caller's processes, or new; one of the three.

    `name` is a glob of names, "" for none. `of_caller`: those of processes of the caller's own uid. `create`: new ones,
    connected as `uplink` says.
    """

    types: tuple[str, ...]
    name: str
    of_caller: bool
    create: bool
    uplink: Uplink | None
    source: str
    where: str
    labels: tuple[str, ...] = ()


class SocketRule(NamedTuple):
    """An allow rule for sockets in the net namespaces whose name the glob `namespace` matches.

    `ports` are those that may be asked to be bound.
    """

    namespace: str
    families: tuple[str, ...]
    types: tuple[str, ...]
    ports: tuple[int, ...]
    source: str
    where: str
    labels: tuple[str, ...] = ()


Rule = DeviceRule | NamespaceRule | SocketRule


class DenyRule(NamedTuple):
    """One entry of `deny`: denied to every subject of `uids` or `gids`, or to all when `everyone`.

    `patterns` are globs of device paths, `rules` say which namespaces and sockets; a socket rule without ports is
    for all sockets, bound or not. `uids` hold the members of the groups, too, as the group database listed them when
    the policy was loaded; `ranges` are the subordinate uids of all of them, as (first, last).
    """

    patterns: tuple[str, ...]
    rules: tuple[NamespaceRule | SocketRule, ...]
    uids: frozenset[int]
    gids: frozenset[int]
    everyone: bool
    source: str
    where: str
    labels: tuple[str, ...] = ()
    ranges: tuple[tuple[int, int], ...] = ()

    def names(self, subject: Subject) -> bool:
        """Whether the rule is for this subject, whatever its label: by its uid, its owner, or one of its groups."""
        return (
            self.everyone
            or subject.uid in self.uids
            or subject.owner in self.uids
            or any(gid in subject.gids for gid in self.gids - NOBODY)
            or in_ranges(subject.uid, self.ranges)
        )


def in_ranges(uid: int, ranges: tuple[tuple[int, int], ...]) -> bool:
    """Whether a uid is in one of these, each (first, last)."""
    return any(first <= uid <= last for first, last in ranges)


class Grant(NamedTuple):
    """One descriptor as it is about to leave: what it is and the rule that allowed it. Owns nothing.

    `rdev` is a device's "MAJOR:MINOR", `inode` a namespace's number as in "net:[4026531840]". `unusable` says why the
    client's setns(2) would fail with EPERM, "" when it would not or nobody knows, None where nobody would ask.
    """

    resource: Resource
    rule: Rule
    rdev: str = ""
    inode: str = ""
    unusable: str | None = None
