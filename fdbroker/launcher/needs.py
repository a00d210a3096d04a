"""What the opener, and the namespaces worker, must be able to do for a policy, and no more.

Runs in: launcher, command line. Root alone makes the nodes that are looked at here; none is opened.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from fdbroker import errors
from fdbroker.errors import FdbrokerError, Finding, PolicyError, RestartNeeded
from fdbroker.kernel.devices import nodes_matching
from fdbroker.kernel.landlock import READ_DIR, READ_FILE, WRITE_FILE
from fdbroker.limits import opener as limits
from fdbroker.policy.compile import Loaded, load_policy
from fdbroker.policy.compiled import Policy, to_bytes
from fdbroker.policy.fit import number_fits
from fdbroker.policy.literals import is_literal
from fdbroker.policy.messages import messages
from fdbroker.policy.rules import resource_rules
from fdbroker.policy.spelling import literal_folder
from fdbroker.policy.tried import failed_tests
from fdbroker.terms import DeviceRule, NamespaceRule, Rule, SocketRule
from fdbroker.wire.launcher import Given

_MODE_BITS = {"ro": 4, "wo": 2, "rw": 6}
_RIGHTS = {"ro": READ_FILE, "wo": WRITE_FILE, "rw": READ_FILE | WRITE_FILE}
_MEMORY = 1  # the major number of /dev/null and the like, which are in every kernel: mem.c of Linux
_CAPABILITY = {"ro": "CAP_DAC_READ_SEARCH", "wo": "CAP_DAC_OVERRIDE", "rw": "CAP_DAC_OVERRIDE"}


class CapabilitiesMissing(FdbrokerError):
    """The policy needs what the service was not given when it was started: by its unit, or in a container."""

    exit_code = errors.EX_CONFIG


class Needs(NamedTuple):
    """`reasons` says of each capability and group which rule needs it; `files` are Landlock rights by path.

    `inodes` says what stood at each of these paths, for Landlock holds on to that and not to the path. `worker` are
    the capabilities of the namespaces worker, None when the policy needs no worker. `store`: messages are stored.
    `warnings` are for the admin.
    """

    capabilities: frozenset[str]
    groups: frozenset[int]
    files: dict[str, int]
    reasons: tuple[str, ...]
    inodes: dict[str, tuple[int, int]]
    worker: frozenset[str] | None
    store: bool = False
    warnings: tuple[str, ...] = ()

    @property
    def listed(self) -> dict[str, int]:
        """The Landlock rights of the keeper, which lists folders and reads nothing."""
        return {path: READ_DIR for path in self.files if os.path.isdir(path) and path != "/proc"}

    @property
    def given(self) -> Given:
        """What the opener can open, of the nodes that the policy names."""
        reads = bool(self.capabilities & {_CAPABILITY["ro"], _CAPABILITY["rw"]})
        return Given(reads, _CAPABILITY["rw"] in self.capabilities, tuple(sorted(self.groups)))


def needs(policy: Policy, idle: Iterable[Rule] = ()) -> Needs:
    """Look at the nodes that the rules name as they are now, those that nobody has yet (`idle`) too.

    A node that its group or everybody may open needs no capability. A rule that matches nothing yet does: nobody
    knows the mode of a node that comes later.
    """
    rules = dict.fromkeys((*resource_rules(policy), *idle))
    capabilities: set[str] = set()
    groups: set[int] = set()
    files: dict[str, int] = {}
    reasons = []
    worker: set[str] | None = None
    removing = _devtmpfs()
    for rule in rules:
        if not isinstance(rule, DeviceRule):
            wanted = _of_worker(rule)
            worker = wanted if worker is None else worker | wanted
            reasons += [f"{name} in the namespaces worker: {rule.where}" for name in wanted]
            files["/run"] = READ_DIR  # to list the names in /run/netns
            continue
        found = [path for path in nodes_matching(rule.pattern, set()) if _may_be_given(path, rule)]
        for need in {_need(path, rule) for path in found} or {_CAPABILITY[rule.access]}:
            if isinstance(need, int):
                groups.add(need)
                reasons.append(f"group {need}: {rule.where} {rule.pattern}")
            elif need:
                capabilities.add(need)
                reasons.append(f"{need}: {rule.where} {rule.pattern}")
        for path in _places(rule.pattern, found, removing):
            files[path] = files.get(path, 0) | _RIGHTS[rule.access] | READ_DIR
    stored = [topic.name for topic in messages(policy).topics if "queue" in topic.deliver]
    reasons += [f"a folder for stored messages: topic {name}" for name in stored]
    files["/proc"] = READ_FILE  # identify: a client's comm and user namespace
    if "CAP_DAC_OVERRIDE" in capabilities:
        capabilities.discard("CAP_DAC_READ_SEARCH")  # it does all that this one does
    inodes = {path: (status.st_dev, status.st_ino) for path in files if (status := os.stat(path))}
    return Needs(
        frozenset(capabilities),
        frozenset(groups),
        files,
        tuple(sorted(set(reasons))),
        inodes,
        None if worker is None else frozenset(worker),
        bool(stored),
        (*_believing_bridges(rules), *_hidden_processes()),
    )


def _hidden_processes() -> Iterator[str]:
    """Whether /proc shows the opener, which is another user than its clients, their processes. Source: proc(5)."""
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", errors="replace", newline="\n") as mounts:
        options = [line.rpartition(" ")[2].strip().split(",") for line in mounts if line.split(" ")[4] == "/proc"]
        hides = [one for one in (options[-1] if options else []) if re.fullmatch("hidepid=(?!0|off).*", one)]
        if hides:
            yield (
                f"/proc is mounted with {hides[0]}: nobody is an administrator, records have no name of a program, and "
                "uids of no database are turned away; give the service a /proc without it"
            )


def _believing_bridges(rules: Iterable[Rule]) -> Iterator[str]:
    """Bridges on which a client could tell the machine a way: by router advertisements, as ip-sysctl.rst has it."""
    uplinks = [rule.uplink for rule in rules if isinstance(rule, NamespaceRule) and rule.uplink]
    for bridge in sorted({uplink.bridge for uplink in uplinks}):
        try:
            values = [_sysctl(f"/proc/sys/net/ipv6/conf/{bridge}/{name}") for name in ("accept_ra", "forwarding")]
        except (OSError, ValueError):  # no such bridge yet, no IPv6, or a unit that hides /proc/sys
            continue
        if values[0] > (1 if values[1] else 0):
            yield f"{bridge} takes IPv6 routes from whoever is on it: sysctl net.ipv6.conf.{bridge}.accept_ra=0"


def _sysctl(path: str) -> int:
    with open(path, "rb") as file:
        return int(file.read())


def _of_worker(rule: NamespaceRule | SocketRule) -> set[str]:
    """What the namespaces worker must be able to raise for a rule. Source: setns(2), proc_pid_ns(5), ip(7)."""
    if isinstance(rule, SocketRule):
        return {"CAP_SYS_ADMIN", *(["CAP_NET_BIND_SERVICE"] if rule.ports else [])}
    if not rule.create:
        return {"CAP_SYS_PTRACE"}  # by name as well: only so can it tell whether the caller could enter
    wanted = {"CAP_SYS_PTRACE", "CAP_SYS_ADMIN", "CAP_DAC_READ_SEARCH"}  # the last one: what has the user open?
    if "net" in rule.types:
        wanted.add("CAP_NET_ADMIN")  # lo up, and the end on the bridge
    if "mnt" in rule.types:
        wanted.add("CAP_SYS_CHROOT")  # into the caller's, to copy it
    return wanted


def _may_be_given(path: str, rule: DeviceRule) -> bool:
    """Whether there is a node at `path` with a number that the rule is for: another one needs nothing."""
    try:
        status = os.stat(path)
    except OSError:
        return False
    number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    return bool(status.st_rdev) and (not rule.device or number_fits(rule.device, number))


def _need(path: str, rule: DeviceRule) -> str | int:
    """A capability, a gid, or "" for the opener to open `path` as `rule` says."""
    folder = os.path.dirname(path)
    while len(folder) >= len("/dev"):
        if not os.stat(folder).st_mode & stat.S_IXOTH:
            return _CAPABILITY[rule.access]
        folder = os.path.dirname(folder)
    status = os.stat(path)
    bits = _MODE_BITS[rule.access]
    if status.st_mode & bits == bits:
        return ""
    # not root's own group: it owns half the machine, and a group is always in force, a capability only for a moment
    if status.st_gid != 0 and status.st_mode >> 3 & bits == bits:
        return status.st_gid
    return _CAPABILITY[rule.access]


def _places(pattern: str, found: list[str], removing: int | None) -> set[str]:
    """Where Landlock must let the opener open: the narrowest places that nodes can come and go in, and that stay."""
    folder = literal_folder(pattern)
    places = {pattern if folder == "/dev" and is_literal(pattern) and found else folder}
    # links lead elsewhere
    for path in found:
        real = os.path.realpath(path)
        if real != path and real.startswith("/dev/"):
            places.add(os.path.dirname(real))
    return {_staying(place, removing) for place in places}


def _staying(path: str, removing: int | None) -> str:
    """The deepest place at or above `path` that will be the same as long as the service runs.

    Landlock holds on to what stands there, not to its name. `removing` is where the kernel removes nodes.
    """
    while path != "/dev":
        try:
            status = os.lstat(path)
        except OSError:  # it comes later
            status = None
        if status is not None and (status.st_dev != removing or os.major(status.st_rdev) == _MEMORY):
            break
        path = os.path.dirname(path)
    return path


def _devtmpfs() -> int | None:
    """The device number of the file system in which the kernel makes and removes nodes, None where it is not mounted.

    With its device or driver a node goes, and a folder with its last node. Source: devtmpfs.c of Linux.
    """
    with open("/proc/self/mountinfo", "rb") as file:
        for line in file:
            mount, _, kind = line.partition(b" - ")
            if kind.startswith(b"devtmpfs "):
                major, minor = mount.split()[2].split(b":")
                return os.makedev(int(major), int(minor))
    return None


def _still(place: str, given: Needs) -> bool:
    """Whether `place` is what it was: a folder that was removed and made again is another one to Landlock."""
    try:
        status = os.stat(place)
    except OSError:
        return False
    return given.inodes.get(place) == (status.st_dev, status.st_ino)


def check_reload(given: Needs, wanted: Needs) -> None:
    """Whether an opener that was started with `given` can serve a policy with `wanted`. Raises RestartNeeded."""
    missing = sorted(wanted.capabilities - given.capabilities)
    if "CAP_DAC_OVERRIDE" in given.capabilities:
        missing = []
    missing += [f"group {gid}" for gid in sorted(wanted.groups - given.groups)]
    if wanted.worker is not None and given.worker is None:
        missing.append("the namespaces worker")
    elif wanted.worker is not None and given.worker is not None:
        missing += [f"{name} in the namespaces worker" for name in sorted(wanted.worker - given.worker)]
    if wanted.store and not given.store:
        missing.append("the folder of the stored messages")
    for path, rights in wanted.files.items():
        if not any(
            (path == place or path.startswith(place + "/")) and rights & ~allowed == 0 and _still(place, given)
            for place, allowed in given.files.items()
        ):
            missing.append(f"access to {path}")
    if missing:
        raise RestartNeeded(
            f"the new policy needs {', '.join(missing)}, which was given up when the service started: restart fdbroker"
        )


def checked_policy(path: str) -> tuple[Loaded, Needs]:
    """Load, test, and see what it needs. Raises PolicyError when anything is wrong or a test of the policy fails."""
    loaded = load_policy(path, trusted=True)
    failed = failed_tests(loaded)
    if failed:
        raise PolicyError(failed)
    check_size(path, loaded.policy)
    return loaded, needs(loaded.policy, loaded.idle)


def check_size(path: str, policy: Policy) -> None:
    """Raises PolicyError for a policy that the children would not take."""
    for what, unit, count, most in (
        ("is too large once it is compiled", "bytes", len(to_bytes(policy)), limits.POLICY_LINK_BYTES),
        ("names too many groups", "groups", len(policy.gids), limits.POLICY_GROUPS),
    ):
        if count > most:
            raise PolicyError([Finding(path, 0, 0, what, f"at most {most} {unit}", f"{count} {unit}")])
