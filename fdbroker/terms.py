"""The nouns of the design, as plain values that every layer shares.

Runs in: every process. Imports nothing of ours and nothing heavy: the opener loads it.
An attacker controls: what a Resource holds, and the `comm` of a Subject; nothing else here comes from a client.
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
# As in /proc/PID/ns. Source: namespaces(7).
NAMESPACE_TYPES = ("net", "mnt", "pid", "user", "uts", "ipc", "cgroup", "time")
# Those that a process can make and hand to another: a pid namespace wants a first process, a user namespace is the
# caller's own business.
NEW_NAMESPACE_TYPES = ("net", "mnt", "uts", "ipc", "cgroup", "time")
FAMILIES = ("inet", "inet6")
SOCKET_TYPES = ("stream", "dgram")
PID_MAX = 4_194_304  # PID_MAX_LIMIT: linux/threads.h
PORT_MAX = 65_535
TOPIC_VERBS = ("send", "subscribe")
HANDLERS = ("journal", "subscribers", "queue")
# Where the messages of the inbox framing go, which name no topic.
FRAMED_TOPIC = "inbox"


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


def parse_asked(text: str, access: str) -> Resource | TopicUse:
    """As `parse`, and send:TOPIC and subscribe:TOPIC beside it: what a policy can be asked about."""
    verb, colon, topic = text.partition(":")
    if colon and topic and verb in TOPIC_VERBS:
        return TopicUse(verb, topic)
    return parse(text, access)


def parse(text: str, access: str) -> Resource:
    """What the command line calls a resource; `access` is for devices. Raises ValueError that says what is wrong."""
    if text.startswith("/"):
        return Device(text, access)
    kind, colon, rest = text.partition(":")
    if colon and rest and kind == "socket":
        return _parse_socket(rest)
    if not colon or not rest or kind not in NAMESPACE_TYPES:
        types = ", ".join(NAMESPACE_TYPES)
        raise ValueError(
            "a resource is a path below /dev, net:NAME, TYPE:pid:PID, TYPE:new or socket:net:NAME; "
            f"TYPE is one of {types}"
        )
    if rest.startswith("pid:"):
        number = _number(rest[4:], PID_MAX)
        if not number:
            raise ValueError(f"{rest[4:]!r} is no process id")
        return Namespace(kind, pid=number)
    if rest == "new":
        if kind not in NEW_NAMESPACE_TYPES:
            raise ValueError(f"a new {kind} namespace cannot be asked for: one of {', '.join(NEW_NAMESPACE_TYPES)} can")
        return Namespace(kind)
    if kind != "net":
        raise ValueError(f"only net namespaces have names: {kind}:pid:PID or {kind}:new")
    return Namespace(kind, name=rest)


def _parse_socket(rest: str) -> Socket:
    kind, _, rest = rest.partition(":")
    name, *options = rest.split(",")
    if kind != "net" or not name:
        raise ValueError("a socket is asked for as socket:net:NAME[,inet6][,dgram][,bind=PORT]")
    family, type_, port = FAMILIES[0], SOCKET_TYPES[0], 0
    for option in options:
        if option in FAMILIES:
            family = option
        elif option in SOCKET_TYPES:
            type_ = option
        elif option.startswith("bind=") and _number(option[5:], PORT_MAX):
            port = int(option[5:])
        else:
            raise ValueError(f"{option!r} is none of inet, inet6, stream, dgram and bind=PORT")
    return Socket(name, family, type_, port)


def _number(text: str, most: int) -> int:
    """A decimal number from 1 to `most`, else 0."""
    number = int(text) if text.isascii() and text.isdecimal() and len(text) <= 10 else 0
    return number if number <= most else 0


class Subject(NamedTuple):
    """Who asks. Every field comes from the kernel; identity is frozen when the client called connect(2).

    `gids` holds the primary and all supplementary groups. `pid` is for the audit record only: nothing is decided
    by it. `comm` is the program's own name for itself, hence for the record only as well. `label` is the MAC label
    of who made the socket, "" when it is not known. `foreign` is true unless the process is shown to live in the
    broker's own user namespace. `session` is logind's name for the login session that the process is in, or "".
    """

    uid: int
    gids: frozenset[int]
    gid: int
    pid: int
    comm: str
    label: str
    foreign: bool
    session: str = ""


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

    @property
    def text(self) -> str:
        """What it names, in a few words."""
        return self.pattern


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

    @property
    def text(self) -> str:
        """What it names, in a few words."""
        return f"{','.join(self.types)}:{self.name or ('new' if self.create else 'pid:*')}"


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

    @property
    def text(self) -> str:
        """What it names, in a few words."""
        return f"socket:net:{self.namespace}"


class TopicRule(NamedTuple):
    """An allow rule for messages: `verb` is one of TOPIC_VERBS, `pattern` a glob of topic names."""

    verb: str
    pattern: str
    source: str
    where: str
    labels: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """What it names, in a few words."""
        return f"{self.verb}:{self.pattern}"


Rule = DeviceRule | NamespaceRule | SocketRule | TopicRule


class Topic(NamedTuple):
    """A topic of the policy: `deliver` says by which of HANDLERS, `maximum_bytes` how long a message may be.

    `keep_s`: for how many seconds the queue keeps a message. `everyone`: a rule lets all users subscribe.
    """

    name: str
    deliver: tuple[str, ...]
    maximum_bytes: int
    keep_s: int = 0
    everyone: bool = False


class User(NamedTuple):
    """A user that the policy, or the machine's databases, name: the positions of the topics it may subscribe to."""

    uid: int
    name: str
    topics: frozenset[int]


class TopicUse(NamedTuple):
    """What a client wants with a topic, for the record: `verb` is one of TOPIC_VERBS, `topic` what the client wrote."""

    verb: str
    topic: str

    @property
    def access(self) -> str:
        """As for a device: to send is to write."""
        return "wo" if self.verb == "send" else "ro"

    @property
    def text(self) -> str:
        """The verb and the topic."""
        return f"{self.verb}:{self.topic}"


class DenyRule(NamedTuple):
    """One entry of `deny`: denied to every subject of `uids` or `gids`, or to all when `everyone`.

    `patterns` are globs of device paths, `rules` say which namespaces and sockets; a socket rule without ports is
    for all sockets, bound or not.
    """

    patterns: tuple[str, ...]
    rules: tuple[NamespaceRule | SocketRule, ...]
    uids: frozenset[int]
    gids: frozenset[int]
    everyone: bool
    source: str
    where: str
    labels: tuple[str, ...] = ()


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


class Offer(NamedTuple):
    """One resource that a subject may open now, with the most access it may ask for, and the rule that says so."""

    resource: Resource
    where: str
