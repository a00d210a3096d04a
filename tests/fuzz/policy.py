"""A policy's text is a tree that its own schema takes, or findings with places in it: never an exception, never both.

What compiles goes to the opener and back unchanged, and its tests, and questions about it, can be answered.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fdbroker.errors import Finding
from fdbroker.limits import every as limits
from fdbroker.policy import compile as compiler
from fdbroker.policy import names, schema
from fdbroker.policy.compiled import to_bytes
from fdbroker.policy.decide import decide, view
from fdbroker.policy.fit import Facts
from fdbroker.policy.lint import Look, Machine, warnings
from fdbroker.policy.load import Node, in_order, parse
from fdbroker.policy.messages import from_bytes
from fdbroker.policy.paths import matcher
from fdbroker.policy.rules import all_rules
from fdbroker.policy.tried import failed_tests
from fdbroker.terms import Device, DeviceRule, Subject

_STEP = 400


@cache
def _keys() -> tuple[bytes, ...]:
    """Every word of the schema."""
    found: set[str] = set()

    def walk(kind: Any) -> None:
        match kind:
            case schema.Mapping(_, fields):
                for name, field in fields.items():
                    if name not in found:
                        found.add(name)
                        walk(field.kind)
            case schema.Named(_, inner) | schema.Sequence(inner) | schema.OneOrMore(inner):
                walk(inner)
            case schema.Choice(words):
                found.update(words)

    walk(schema.POLICY)
    return tuple(f"{word}: ".encode() for word in sorted(found))


WORDS = (
    *_keys(),
    b"version: 1\n",
    b"/dev/",
    b"\n  ",
    b"- ",
    b"{",
    b"}",
    b"[",
    b"]",
    b"!!",
    b"&a",
    b"*a",
    b"---\n",
    b"? ",
)
WORDS += (b"|\n", b">\n", b'"', b"'", b"<<: ", b"audio", b"alice", b"true", b"%YAML 1.1", b"\xc2\x85", b"\xe2\x80\xa8")
WORDS += (b"\t", b"\x1e", b"\x0c", b"\r", b"\r\n", b"\xef\xbb\xbf")


def seeds() -> Iterator[bytes]:
    design = """version: 1
administrators: {groups: [wheel]}
limits: {connections: 64, burst: 1000}
groups:
  audio:
    devices: [{path: "/dev/snd/pcmC*D*[pc]", access: rw, class: sound, device: "116:*"}]
    namespaces: [{type: net, name: "vpn-*"}, {type: [uts, ipc], of: caller}, {type: net, create: true}]
    sockets: [{namespace: vpn, bind: [443]}]
users: {alice: {devices: [{path: /dev/ttyUSB*, access: rw, dangerous: true}], send: [news]}}
everyone: {subscribe: ["*"]}
topics: {news: {deliver: [queue, subscribers], keep: 7d}}
deny: [{groups: [audio], devices: [/dev/snd/*]}]
tests: [{as: {user: alice, groups: [audio]}, open: /dev/snd/pcmC0D0p, access: rw, expect: deny}]
"""
    yield design.encode()
    for line in design.splitlines()[1:]:
        if line[0] != " " and line[-1] != ":":
            yield f"version: 1\n{line}\n".encode()
    yield b"version: 1\nversion: 1\nuser: {\n"
    yield b"version: yes\neveryone: &a {devices: [{path: /dev/../mem, acess: r}]}\n---\n*a"
    yield b"[" * 40
    yield b"version: 1\n# \x1e\x0c\x0b\n\tx: 1\n"
    yield (Path(__file__).parents[2] / "policy" / "policy.yaml").read_bytes()[:4000]


class Databases:
    """The machine's users and groups, the same everywhere; as pwd and as grp."""

    def __init__(self, numbers: dict[str, int]) -> None:
        self.entries = [
            SimpleNamespace(
                pw_name=name,
                pw_uid=number,
                pw_gid=number,
                pw_shell="/bin/sh",
                gr_name=name,
                gr_gid=number,
                gr_mem=["alice", "gone"],
            )
            for name, number in numbers.items()
        ]

    def by(self, key: str, value: object) -> SimpleNamespace:
        for entry in self.entries:
            if getattr(entry, key) == value:
                return entry
        raise KeyError(value)

    getpwall = getgrall = lambda self: self.entries
    getpwnam = lambda self, name: self.by("pw_name", name)
    getpwuid = lambda self, uid: self.by("pw_uid", uid)
    getgrnam = lambda self, name: self.by("gr_name", name)
    getgrgid = lambda self, gid: self.by("gr_gid", gid)


USERS = Databases({"root": 0, "alice": 1000, "nobody": 65534})
GROUPS = Databases({"audio": 29, "wheel": 10, "nogroup": 65534})


@contextmanager
def known_names() -> Iterator[None]:
    had = names.pwd, names.grp
    names.pwd, names.grp = USERS, GROUPS
    try:
        yield
    finally:
        names.pwd, names.grp = had


NODES = {
    "/dev/null": Facts("/dev/null", stat.S_IFCHR, "1:3", "mem", "null"),
    "/dev/snd": Facts("/dev/snd", stat.S_IFDIR, "0:0", "", ""),
    "/dev/sda": Facts("/dev/sda", stat.S_IFBLK, "8:0", "block", "sda"),
    "/dev/pts/0": Facts("/dev/pts/0", stat.S_IFCHR, "136:0", "", ""),
}
MACHINE = Machine(
    lambda pattern: [path for path in NODES if matcher(pattern).fullmatch(path)],
    lambda path: Look((path,), NODES[path]),
    lambda: ["vpn"],
    lambda uid, gids: "no" if uid not in gids else "",
    lambda name: name == "br0",
)


def target(data: bytes) -> None:
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return
    findings: list[Finding] = []
    tree = parse("p.yaml", text, findings)
    judge_findings(text, findings)
    if tree is None:
        assert findings
        return
    with known_names():
        work = compiler._Compiler(findings)
        work.document(tree)
        work.check_topics()
        judge_findings(text, findings)
        if not findings:
            judge_policy(tree, work.result())


def judge_findings(text: str, findings: list[Finding]) -> None:
    assert len(in_order(findings)) <= limits.POLICY_FINDINGS + 1
    rows = text.split("\n")
    for finding in findings:
        assert finding.what
        assert 0 <= finding.line <= len(rows)
        assert 0 <= finding.column <= len(rows[finding.line - 1]) + 1
        assert str(finding).startswith("p.yaml:")


def judge_policy(tree: Node, loaded: compiler.Loaded) -> None:
    policy = loaded.policy
    assert from_bytes(to_bytes(policy)) == policy
    failed_tests(loaded)
    for warning in warnings(policy, MACHINE):
        assert warning.line > 0
        assert warning.what
    nobody = Subject(1001, frozenset({1001}), 1001, 1, "", "", foreign=False)
    for rule in all_rules(policy):
        if isinstance(rule, DeviceRule):
            assert rule.pattern.startswith("/dev/")
    for path in ("/dev/null", "/dev/mem", "/dev/snd/pcmC0D0p", "/dev/../mem"):
        decision = decide(view(policy, nobody), Device(path, "ro"))
        assert not decision.rules or set(decision.rules) <= set(policy.everyone)
    for name, value in policy.limits.items():
        assert limits.USER_LIMITS[name].least <= value <= limits.USER_LIMITS[name].most
