"""Trees of values to one Policy: names to numbers, globs checked, and what no schema can say.

Runs in: launcher, command line. Opens nothing but the policy's files, by files.py; names come from names.py.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

from fdbroker.errors import Finding, PolicyError
from fdbroker.limits import policy as limits
from fdbroker.limits.inbox import MESSAGE_BYTES
from fdbroker.policy import names
from fdbroker.policy.compiled import Policy
from fdbroker.policy.files import ANOTHER
from fdbroker.policy.globs import dangerous_rule
from fdbroker.policy.literals import is_literal
from fdbroker.policy.load import Digest, Node, close, hinted, in_order, load
from fdbroker.policy.ranges import known_owner
from fdbroker.policy.recipients import with_recipients
from fdbroker.policy.spelling import glob_error, label_glob_error, name_glob_error
from fdbroker.terms import (
    ACCESS_COVERS,
    FAMILIES,
    INVALID_ID,
    NEW_NAMESPACE_TYPES,
    NOBODY,
    OWN_TERMINAL,
    SOCKET_TYPES,
    DenyRule,
    DeviceRule,
    NamespaceRule,
    Resource,
    Rule,
    SocketRule,
    Subject,
    Uplink,
)
from fdbroker.topics import TOPIC_VERBS, Messages, Topic, TopicRule, TopicUse
from fdbroker.typed import parse_asked

_R = TypeVar("_R")

# What a class's devices can do at all, where that is less than everything. Source: the drivers' file_operations.
CLASS_ACCESS = {"rtc": "ro", "pps": "ro", "watchdog": "wo"}

# With so many errors no more names are looked up, for each that nobody has takes a look at all accounts.
_SOUGHT = 1000
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


class PolicyTest(NamedTuple):
    """One entry of `tests:`: what `subject` gets when it asks for `resource`."""

    subject: Subject
    resource: Resource | TopicUse
    allowed: bool
    place: Node


class Loaded(NamedTuple):
    """A policy that has no error, its tests, and the trees of its files, as load.py makes them.

    `idle` are rules by the group database that nobody has: a group's first member gets them without a reload.
    """

    policy: Policy
    tests: tuple[PolicyTest, ...]
    documents: tuple[Node, ...] = ()
    idle: tuple[Rule, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """The files that it was read from."""
        return tuple(document.file for document in self.documents)


def load_policy(path: str, *, trusted: bool, another: str = ANOTHER) -> Loaded:
    """Load and compile all files of a policy. Raises PolicyError with everything that is wrong in any of them.

    Rules add up over the files; of a limit that several files set the last one counts. `another`: see files.py.
    """
    findings: list[Finding] = []
    digest = Digest()
    documents = load(path, findings, trusted=trusted, digest=digest, another=another)
    return compile_documents(path, documents, findings, digest.text())


def compile_documents(path: str, documents: Sequence[Node], findings: list[Finding], digest: str) -> Loaded:
    """Compile the trees of a policy's files with what the databases of users and groups say now.

    `findings` holds what is wrong with the files already. Raises PolicyError.
    """
    work = _Compiler(findings)
    for document in documents:
        work.document(document)
    work.check_topics()
    if findings:
        raise PolicyError(in_order(findings))
    loaded = work.result()
    policy = with_recipients(loaded.policy, path)._replace(digest=digest)
    return loaded._replace(policy=policy, documents=tuple(documents))


def compile_again(loaded: Loaded, findings: list[Finding]) -> Loaded:
    """The trees of `loaded` with what the databases say now, but for the recipients of stored messages.

    `findings` takes the names that are no more. What is for one of them is left out, but a deny rule with one is still
    for all that it was for, and for the members that its other groups have now.
    """
    work = _Compiler(findings, loaded.policy)
    for document in loaded.documents:
        work.document(document)
    findings[:] = in_order(findings)
    return work.result()._replace(documents=loaded.documents)


class _Compiler:
    """`before` is what came of the same trees the last time, None for new ones."""

    def __init__(self, findings: list[Finding], before: Policy | None = None) -> None:
        self.findings = findings
        self.before = before
        self.administrators: tuple[set[int], set[int]] = (set(), set())
        self.limits = {name: limit.default for name, limit in limits.USER_LIMITS.items()}
        self.by_uid: dict[int, list[Rule]] = {}
        self.by_gid: dict[int, list[Rule]] = {}
        self.everyone: list[Rule] = []
        self.topics_by_uid: dict[int, list[TopicRule]] = {}
        self.topics_by_gid: dict[int, list[TopicRule]] = {}
        self.topics_of_everyone: list[TopicRule] = []
        self.deny: list[DenyRule] = []
        self.idle: list[Rule] = []
        self.topics: dict[str, Topic] = {}
        self.named_topics: list[Node] = []  # by name, in rules: they must exist
        self.uid_limits: dict[int, dict[str, int]] = {}
        self.gid_limits: dict[int, dict[str, int]] = {}
        self.everyone_limits: dict[str, int] = {}
        self.tests: list[PolicyTest] = []
        self.listed = names.Listed()
        self.owners = self.listed.owners()
        self.subordinate = self.listed.subordinate_uids()

    def result(self) -> Loaded:
        return Loaded(
            Policy(
                frozenset(self.administrators[0]),
                frozenset(self.administrators[1]),
                self.limits,
                _tuples(self.by_uid),
                _tuples(self.by_gid),
                tuple(self.everyone),
                tuple(self.deny),
                self.uid_limits,
                self.gid_limits,
                self.everyone_limits,
                Messages(
                    tuple(self.topics.values()),
                    by_uid=_tuples(self.topics_by_uid),
                    by_gid=_tuples(self.topics_by_gid),
                    everyone=tuple(self.topics_of_everyone),
                ),
                owners=self.owners,
            ),
            tuple(self.tests),
            idle=tuple(self.idle),
        )

    def document(self, document: Node) -> None:
        parts = document.value
        if "administrators" in parts:
            self.administrators[0].update(self.ids(parts["administrators"].items("users"), "user"))
            self.administrators[1].update(self.ids(parts["administrators"].items("groups"), "group"))
        if "limits" in parts:
            self.limits |= _plain(parts["limits"])
        for name, (place, entry) in parts["groups"].value.items() if "groups" in parts else ():
            gid = self.id(place, "group")
            source = f"group {name}"
            if gid is None:
                self.entry(entry, source, [], [], {})  # for what else is wrong in it
            else:
                rules, said = self.by_gid.setdefault(gid, []), self.topics_by_gid.setdefault(gid, [])
                self.entry(entry, source, rules, said, self.gid_limits.setdefault(gid, {}), gid)
        for name, (place, entry) in parts["users"].value.items() if "users" in parts else ():
            uid = self.id(place, "user")
            source = f"user {name}"
            if uid is None:
                self.entry(entry, source, [], [], {})
            else:
                rules, said = self.by_uid.setdefault(uid, []), self.topics_by_uid.setdefault(uid, [])
                self.entry(entry, source, rules, said, self.uid_limits.setdefault(uid, {}))
        if "everyone" in parts:
            said = self.topics_of_everyone
            self.entry(parts["everyone"], "everyone", self.everyone, said, self.everyone_limits)
        for name, (place, entry) in parts["topics"].value.items() if "topics" in parts else ():
            self.topic(name, place, entry)
        for node in document.items("deny"):
            self.deny_rule(node)
        for node in document.items("tests"):
            self.test(node)

    # ---- names

    def id(self, node: Node, kind: str) -> int | None:
        if len(self.findings) >= _SOUGHT:
            return None
        number = self.listed.uid_of(node.value) if kind == "user" else names.gid_of(node.value)
        if number is None:
            hint = close(node.value, self.listed.names(kind)) if hinted(self.findings) else ""
            self.findings.append(node.finding(f"unknown {kind} {node.value!r}", hint=hint))
        elif number in NOBODY or number > INVALID_ID:
            self.findings.append(
                node.finding(f"{kind} {node.value!r} is number {number}, which stands for nobody and matches nothing")
            )
            return None
        return number

    def ids(self, nodes: Iterable[Node], kind: str) -> frozenset[int]:
        numbers = [self.id(node, kind) for node in nodes]
        return frozenset(number for number in numbers if number is not None)

    # ---- rules

    def entry(
        self,
        entry: Node,
        source: str,
        rules: list[Rule],
        said: list[TopicRule],
        maxima: dict[str, int],
        gid: int | None = None,
    ) -> None:
        if "limits" in entry.value:
            maxima |= _plain(entry.value["limits"])
        compiled: list[tuple[Node, Rule]] = [(node, self.device(node, source)) for node in entry.items("devices")]
        compiled += [(node, self.namespace(node, source)) for node in entry.items("namespaces")]
        compiled += [(node, self.socket(node, source)) for node in entry.items("sockets")]
        for verb in TOPIC_VERBS:
            said += [self.topic_rule(verb, node, source) for node in entry.items(verb)]
        for node, rule in compiled:
            if node.get("membership") == "nss" and gid is not None:
                # the database's word: the rule goes to its members of this moment, one by one
                members = self.listed.members_of(gid)
                for uid in members:
                    self.by_uid.setdefault(uid, []).append(rule)
                if not members:
                    self.idle.append(rule)
            else:
                rules.append(rule)

    def labels(self, node: Node, *, allows: bool = True) -> tuple[str, ...]:
        for one in node.items("label"):
            trouble = label_glob_error(one.value, allows=allows)
            if trouble:
                self.findings.append(one.finding(f"label {one.value!r}: {trouble}"))
        return tuple(dict.fromkeys(one.value for one in node.items("label")))

    def glob(self, node: Node) -> str:
        trouble = glob_error(node.value)
        if trouble:
            what = repr(node.value).replace("\\\\", "\\")  # a glob's backslashes as they were written
            self.findings.append(node.finding(f"path {what}: {trouble}"))
            return ""
        return str(node.value)

    def device(self, node: Node, source: str) -> DeviceRule:
        pattern = self.glob(node.value["path"])
        access = node.get("access") or "ro"
        kernel_class = node.get("class") or ""
        dangerous = bool(node.get("dangerous"))
        most = CLASS_ACCESS.get(kernel_class, "rw")
        if access not in ACCESS_COVERS[most]:
            place = node.value.get("access", node)
            self.findings.append(place.finding(f"access of class {kernel_class}", most, access))
        number = node.get("device") or ""
        power = dangerous_rule(pattern, kernel_class, number) if pattern and not dangerous else ""
        if power:
            self.findings.append(
                node.value["path"].finding(
                    f"{power}, which gives power over the machine",
                    hint="add `dangerous: true` to say that this is meant, or write a narrower rule",
                )
            )
        where = f"{node.file}:{node.line}"
        if pattern == "/dev/tty" or number == OWN_TERMINAL:
            place = node.value["path" if pattern == "/dev/tty" else "device"]
            hint = "remove the rule: a program opens its own terminal by itself"
            self.findings.append(
                place.finding("/dev/tty (5:0), which is the terminal of the process that opens it", hint=hint)
            )
        return DeviceRule(pattern, access, kernel_class, number, dangerous, source, where, self.labels(node))

    def name_glob(self, node: Node, key: str) -> str:
        pattern = str(node.get(key) or "")
        trouble = name_glob_error(pattern) if pattern else ""
        if trouble:
            self.findings.append(node.value[key].finding(f"{key} {pattern!r}: {trouble}"))
            return ""
        return pattern

    def namespace(self, node: Node, source: str) -> NamespaceRule:
        types = tuple(dict.fromkeys(one.value for one in node.items("type")))
        create = node.get("create")
        if create is False:
            self.findings.append(node.value["create"].finding("create", "true", "false", "remove the rule"))
        for one in node.items("type"):
            if "name" in node.value and one.value != "net":
                hint = "write `of: caller`, or `create: true`"
                self.findings.append(one.finding("a namespace with a name", "type net", one.value, hint))
            elif create and one.value not in NEW_NAMESPACE_TYPES:
                expected = f"one of {', '.join(NEW_NAMESPACE_TYPES)}"
                self.findings.append(one.finding("a namespace to create", expected, one.value))
        where = f"{node.file}:{node.line}"
        link = node.value.get("link")
        uplink = None
        if link is not None:
            if not create or types != ("net",):
                self.findings.append(link.finding("a link", "in a rule with `type: net` and `create: true` alone"))
            uplink = self.uplink(link)
        name = self.name_glob(node, "name")
        return NamespaceRule(types, name, "of" in node.value, bool(create), uplink, source, where, self.labels(node))

    def uplink(self, node: Node) -> Uplink:
        text = str(node.get("address"))
        isolated = node.get("isolated")
        try:
            address = ipaddress.ip_interface(text)
        except ValueError as error:
            self.findings.append(node.value["address"].finding(f"address {text!r}", "such as 10.88.0.0/24", str(error)))
        else:
            bits = address.network.max_prefixlen - address.network.prefixlen
            if bits < 2:
                hint = "it holds the bridge's address and at least one more"
                self.findings.append(node.value["address"].finding(f"address {text!r}", "a larger network", hint=hint))
            elif address.is_multicast or address.is_loopback or address.is_unspecified:
                self.findings.append(node.value["address"].finding(f"address {text!r}", "one that a machine can have"))
        return Uplink(str(node.get("bridge")), text, isolated is None or isolated)

    def socket(self, node: Node, source: str) -> SocketRule:
        families = tuple(dict.fromkeys(one.value for one in node.items("families"))) or FAMILIES
        types = tuple(dict.fromkeys(one.value for one in node.items("types"))) or SOCKET_TYPES
        ports = tuple(dict.fromkeys(one.value for one in node.items("bind")))
        name, where = self.name_glob(node, "namespace"), f"{node.file}:{node.line}"
        return SocketRule(name, families, types, ports, source, where, self.labels(node))

    def topic(self, name: str, place: Node, node: Node) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or len(name) > limits.TOPIC_BYTES:
            expected = f"letters, digits, dots, hyphens and underscores, at most {limits.TOPIC_BYTES}"
            self.findings.append(place.finding(f"topic {name!r}", expected))
        elif name in self.topics:
            self.findings.append(place.finding(f"topic {name!r} for the second time", "each in one file"))
        elif len(self.topics) >= limits.TOPICS:
            self.findings.append(place.finding(f"over {limits.TOPICS} topics"))
        deliver = tuple(dict.fromkeys(one.value for one in node.items("deliver"))) or ("subscribers",)
        keep = node.get("keep")
        keep_s = int(keep[:-1]) * _UNITS_S[keep[-1]] if keep else limits.KEEP_SECONDS
        if "queue" not in deliver:
            keep_s = 0
            if keep:
                self.findings.append(node.value["keep"].finding("keep, but nothing is stored", "`queue` in `deliver`"))
        most = limits.ATTACHED_BYTES if deliver == ("subscribers",) else MESSAGE_BYTES
        maximum = node.get("maximum_bytes") or most
        if maximum > MESSAGE_BYTES and deliver != ("subscribers",):
            expected = f"at most {MESSAGE_BYTES} where the journal or the queue has them"
            self.findings.append(node.value["maximum_bytes"].finding("maximum_bytes", expected, str(maximum)))
        self.topics[name] = Topic(name, deliver, maximum, keep_s)

    def topic_rule(self, verb: str, node: Node, source: str) -> TopicRule:
        topic = node.value["topic"]
        trouble = name_glob_error(topic.value)
        if trouble:
            self.findings.append(topic.finding(f"topic {topic.value!r}: {trouble}"))
        elif is_literal(topic.value):
            self.named_topics.append(topic)
        where = f"{node.file}:{node.line}"
        return TopicRule(verb, "" if trouble else topic.value, source, where, self.labels(node))

    def check_topics(self) -> None:
        """Once all files are read: a rule that names a topic which does not exist is a mistake."""
        for node in self.named_topics:
            if node.value not in self.topics:
                meant = close(node.value, self.topics) if hinted(self.findings) else ""
                hint = meant or "declare it under `topics:`"
                self.findings.append(node.finding(f"unknown topic {node.value!r}", hint=hint))

    def deny_rule(self, node: Node) -> None:
        parts = []
        users, groups = node.items("users"), node.items("groups")
        for label, nodes in (("user", users), ("group", groups)):
            parts += [f"{label} {one.value}" for one in nodes]
        if node.get("everyone"):
            parts.append("everyone")
        if not parts and not node.partial and "users" not in node.value and "groups" not in node.value:
            self.findings.append(node.finding("a deny rule for nobody", hint="`everyone: false` names nobody"))
        source = ", ".join(parts)
        globs = self.labels(node, allows=False)
        if globs:
            source += f" with the label {' or '.join(globs)}"
        patterns = tuple(self.glob(one) for one in node.items("devices"))
        others: list[NamespaceRule | SocketRule] = [self.namespace(one, source) for one in node.items("namespaces")]
        others += [self.socket(one, source) for one in node.items("sockets")]
        if not node.partial and not any(key in node.value for key in ("devices", "namespaces", "sockets")):
            self.findings.append(node.finding("a deny rule without any of devices, namespaces, sockets"))
        unknown = len(self.findings)
        gids = self.ids(groups, "group")
        # a process can leave its groups, and be any subordinate uid of its user: the rule is for all of these
        uids = self.ids(users, "user").union(*map(self.listed.members_of, gids))
        ranges = tuple((first, last) for user, first, last in self.subordinate if user in uids)
        if self.before is not None and len(self.findings) > min(unknown, _SOUGHT - 1):  # by then none is looked up
            was = self.before.deny[len(self.deny)]
            gids, uids = gids | was.gids, uids | was.uids
            ranges = tuple(dict.fromkeys((*ranges, *was.ranges)))
        everyone = bool(node.get("everyone"))
        where = f"{node.file}:{node.line}"
        self.deny.append(DenyRule(patterns, tuple(others), uids, gids, everyone, source, where, globs, ranges))

    def test(self, node: Node) -> None:
        subject = node.value["as"]
        uid = self.id(subject.value["user"], "user")
        gids = self.ids(subject.items("groups"), "group")
        resource = self.asked(node)
        if uid is None or resource is None:
            return
        gid, all_gids = (min(gids, default=INVALID_ID), gids) if "groups" in subject.value else names.groups_of(uid)
        label, owner = subject.get("label") or "", known_owner(self.owners, uid)
        who = Subject(uid, all_gids, gid, 0, "", label, foreign=False, owner=owner)
        self.tests.append(PolicyTest(who, resource, node.get("expect") == "allow", node))

    def asked(self, node: Node) -> Resource | TopicUse | None:
        """What a test asks for."""
        text = node.get("open")
        try:
            resource = parse_asked(text, node.get("access") or "ro")
        except ValueError as error:
            self.findings.append(node.value["open"].finding(f"open {text!r}", str(error)))
            return None
        if isinstance(resource, TopicUse):
            self.named_topics.append(node.value["open"]._replace(value=resource.topic))
        return resource


def _tuples(lists: dict[int, list[_R]]) -> dict[int, tuple[_R, ...]]:
    return {number: tuple(items) for number, items in lists.items()}


def _plain(node: Node) -> dict[str, int]:
    return {name: child.value for name, child in node.value.items()}
