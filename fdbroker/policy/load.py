"""Policy files to a tree of values with their places, strictly: every error at once, as file:line:column.

Runs in: launcher, command line. With `trusted`, only root can have written what is read here; without it
(`policy check`), whoever wrote the file.

Only the YAML syntax is PyYAML's: a scalar stays the text that was written, so YAML 1.1's booleans, octal numbers
and base-60 numbers do not exist here.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
from collections.abc import Iterable
from typing import Any, NamedTuple

import yaml

from fdbroker import limits
from fdbroker.errors import Finding, PolicyError
from fdbroker.policy import schema


class Node(NamedTuple):
    """A value and where it stands. `value` is a str, int, bool, list of Node or dict of Node by key."""

    value: Any
    file: str
    line: int
    column: int

    def get(self, key: str) -> Any:
        """The plain value of a mapping's key, or None."""
        child = self.value.get(key)
        return None if child is None else child.value

    def items(self, key: str) -> list[Node]:
        """The items of a mapping's list, or none."""
        child = self.value.get(key)
        return [] if child is None else list(child.value)

    def finding(self, what: str, expected: str = "", found: str = "", hint: str = "") -> Finding:
        """Something that is wrong at this place."""
        return Finding(self.file, self.line, self.column, what, expected, found, hint)


def policy_files(policy: str) -> list[str]:
    """The policy file and the *.yaml of the folder policy.d beside it, in order of name. Raises PolicyError."""
    folder = os.path.join(os.path.dirname(policy), "policy.d")
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith(".yaml"))
    except (FileNotFoundError, NotADirectoryError):
        names = []
    except OSError as error:
        raise PolicyError([Finding(folder, 0, 0, f"cannot be read: {error.strerror}")]) from None
    if len(names) >= limits.POLICY_FILES:
        raise PolicyError([Finding(folder, 0, 0, f"over {limits.POLICY_FILES} files")])
    return [policy, *(os.path.join(folder, name) for name in names)]


def load(policy: str, findings: list[Finding], *, trusted: bool) -> list[Node]:
    """All files of a policy, each a tree of what fits the schema; what is wrong is added to `findings`.

    With `trusted`, every file and the folders above it must be root's and not writable by others. Raises PolicyError
    when the folder cannot be listed.
    """
    policy = os.path.abspath(policy)
    documents = []
    for file in policy_files(policy):
        text = _read(file, findings, trusted=trusted)
        if text is not None:
            document = parse(file, text, findings)
            if document is not None:
                documents.append(document)
    return documents


def in_order(findings: list[Finding]) -> list[Finding]:
    """By file and line, and no more than a person reads."""
    findings = sorted(dict.fromkeys(findings), key=lambda one: (one.file, one.line, one.column))
    most = limits.POLICY_FINDINGS
    if len(findings) > most:
        findings[most:] = [Finding(findings[0].file, 0, 0, f"and {len(findings) - most} errors more")]
    return findings


# ---- files


def untrusted(status: os.stat_result, *, sticky_is_fine: bool) -> str:
    """Why somebody else than root could change what stands there, "" when nobody could."""
    if status.st_uid != 0:
        return f"must belong to root, belongs to uid {status.st_uid}"
    if status.st_mode & 0o022 and not (sticky_is_fine and status.st_mode & stat.S_ISVTX):
        return f"must not be writable by group or others, has mode {stat.S_IMODE(status.st_mode):04o}"
    return ""


def _folders_above(file: str) -> Iterable[tuple[str, bool]]:
    folder = os.path.realpath(os.path.dirname(file))
    yield folder, False
    while folder != "/":
        folder = os.path.dirname(folder)
        yield folder, True  # in a sticky folder, such as /tmp, others cannot replace what is root's


def _read(file: str, findings: list[Finding], *, trusted: bool) -> str | None:
    def wrong(what: str, expected: str = "", hint: str = "") -> None:
        findings.append(Finding(file, 0, 0, what, expected, "", hint))

    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (os.O_NOFOLLOW if trusted else 0))
    except OSError as error:
        wrong(f"cannot be read: {error.strerror}", hint="`--policy FILE` takes another file")
        return None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            wrong("is not a regular file")
            return None
        if trusted:
            trouble = untrusted(status, sticky_is_fine=False)
            if trouble:
                wrong(trouble, hint=f"chown root:root {file} && chmod 0644 {file}")
            for folder, sticky_is_fine in _folders_above(file):
                trouble = untrusted(os.stat(folder), sticky_is_fine=sticky_is_fine)
                if trouble:
                    wrong(f"its folder {folder} {trouble}")
        data = b""
        while len(data) <= limits.POLICY_FILE_BYTES:
            piece = os.read(descriptor, 65536)
            if not piece:
                break
            data += piece
    finally:
        os.close(descriptor)
    if len(data) > limits.POLICY_FILE_BYTES:
        wrong("is too large", expected=f"at most {limits.POLICY_FILE_BYTES} bytes")
        return None
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        findings.append(Finding(file, line, column, "is not UTF-8"))
        return None


# ---- syntax


class _Text(yaml.SafeLoader):
    """Composes nodes; constructs nothing."""


def parse(file: str, text: str, findings: list[Finding]) -> Node | None:
    """One file's text as a tree that fits the schema; what is wrong is added to `findings`."""
    before = len(findings)
    for number, row in enumerate(text.splitlines(), 1):
        if "\t" in row:
            findings.append(Finding(file, number, row.index("\t") + 1, "a tab", "spaces"))
    if len(findings) > before:
        return None
    try:
        _check_events(file, text, findings)
        if len(findings) > before:
            return None
        root = yaml.compose(text, Loader=_Text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (0, 0)
        what = " ".join(part for part in (error.context, error.problem) if part)
        findings.append(Finding(file, line, column, f"not YAML: {what}"))
        return None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        findings.append(Finding(file, 0, 0, f"not YAML: {error}"))
        return None
    if root is None:
        findings.append(Finding(file, 0, 0, "is empty", "a mapping that begins with `version: 1`"))
        return None
    return _Walk(file, findings).node(root, schema.POLICY, "a policy")


def _check_events(file: str, text: str, findings: list[Finding]) -> None:
    """Refuse what a policy needs not and a reader overlooks, before anything is built from it."""

    def wrong(event: Any, what: str, hint: str = "") -> None:
        findings.append(Finding(file, event.start_mark.line + 1, event.start_mark.column + 1, what, hint=hint))

    depth = documents = 0
    for event in yaml.parse(text, Loader=_Text):
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents == 2:
                wrong(event, "a second document", "one file holds one policy")
                return
        anchor, tag = getattr(event, "anchor", None), getattr(event, "tag", None)
        if isinstance(event, yaml.AliasEvent):
            wrong(event, f"the alias *{anchor}", "aliases are not allowed: write it out")
        elif anchor:
            wrong(event, f"the anchor &{anchor}", "anchors are not allowed")
        if tag:
            wrong(event, f"the tag {tag}", "tags are not allowed")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > limits.POLICY_DEPTH:
                wrong(event, f"over {limits.POLICY_DEPTH} levels deep")
                return
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


# ---- shape

_ACCESS_ALIASES = {
    "r": "ro",
    "read": "ro",
    "w": "wo",
    "write": "wo",
    "readwrite": "rw",
    "read-write": "rw",
    "r/w": "rw",
}


def _kind_of(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    if getattr(node, "style", None) is None and node.value in ("", "~", "null", "Null", "NULL"):
        return "nothing"
    return repr(node.value)


class _Walk:
    """Judges YAML nodes by the schema; a node that does not fit becomes a finding and None."""

    def __init__(self, file: str, findings: list[Finding]) -> None:
        self.file = file
        self.findings = findings

    def wrong(self, node: yaml.Node, what: str, expected: str = "", found: str = "", hint: str = "") -> None:
        mark = node.start_mark
        self.findings.append(Finding(self.file, mark.line + 1, mark.column + 1, what, expected, found, hint))

    def node(self, node: yaml.Node, kind: schema.Kind, what: str) -> Node | None:
        value: Any
        match kind:
            case schema.Mapping():
                value = self.mapping(node, kind)
            case schema.Named():
                value = self.named(node, kind)
            case schema.Sequence(item):
                value = self.sequence(node, item, what)
            case schema.Short(mapping) if isinstance(node, yaml.MappingNode):
                value = self.mapping(node, mapping)
            case schema.Short(mapping, key):
                child = self.node(node, mapping.fields[key].kind, what)
                value = None if child is None else {key: child}
            case schema.OneOrMore(item) if isinstance(node, yaml.SequenceNode):
                value = self.sequence(node, item, what)
            case schema.OneOrMore(item):
                child = self.node(node, item, what)
                value = None if child is None else [child]
            case _:
                value = self.scalar(node, kind, what)
        if value is None:
            return None
        return Node(value, self.file, node.start_mark.line + 1, node.start_mark.column + 1)

    def scalar(self, node: yaml.Node, kind: schema.Kind, what: str) -> str | int | bool | None:
        expected = ""
        plain = isinstance(node, yaml.ScalarNode) and _kind_of(node) != "nothing"
        text = node.value if plain else ""
        match kind:
            case schema.Text(expected, pattern):
                if plain and text and (not pattern or re.fullmatch(pattern, text)):
                    return str(text)
            case schema.Integer(least, most):
                expected = f"a number from {least} to {most}"
                if plain and re.fullmatch("0|[1-9][0-9]{0,17}", text) and least <= int(text) <= most:
                    return int(text)
            case schema.Flag():
                expected = "true or false"
                if plain and text in ("true", "false"):
                    return bool(text == "true")
            case schema.Choice(words):
                expected = " or ".join(words)
                if plain and text in words:
                    return str(text)
            case schema.Later():
                self.wrong(node, f"{what} is not in this version", hint="remove it; nothing else would enforce it")
                return None
        self.wrong(node, what, expected, _kind_of(node), did_you_mean(text, kind))
        return None

    def sequence(self, node: yaml.Node, item: schema.Kind, what: str) -> list[Node] | None:
        if not isinstance(node, yaml.SequenceNode) or not node.value:
            found = "an empty list" if isinstance(node, yaml.SequenceNode) else _kind_of(node)
            self.wrong(node, what, "a list of at least one item", found)
            return None
        children = [self.node(child, item, what) for child in node.value]
        return [child for child in children if child is not None]

    def keys(self, node: yaml.Node, what: str) -> Iterable[tuple[str, yaml.Node, yaml.Node]]:
        """The keys of a mapping that are text and stand in it once."""
        if not isinstance(node, yaml.MappingNode):
            self.wrong(node, what, "a mapping", _kind_of(node))
            return
        first: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self.wrong(key, f"a key of {what}", "a word", _kind_of(key))
            elif key.value in first:
                hint = f"the first is in line {first[key.value]}"
                self.wrong(key, f"the key {key.value!r} for the second time", hint=hint)
            else:
                first[key.value] = key.start_mark.line + 1
                yield key.value, key, value

    def mapping(self, node: yaml.Node, kind: schema.Mapping) -> dict[str, Node] | None:
        children: dict[str, Node] = {}
        seen = set()
        for name, key, value in self.keys(node, kind.what):
            seen.add(name)
            field = kind.fields.get(name)
            if field is None:
                known = [known for known, one in kind.fields.items() if not isinstance(one.kind, schema.Later)]
                expected = "one of " + ", ".join(known)
                self.wrong(key, f"unknown key {name!r} in {kind.what}", expected, "", close(name, known))
                continue
            child = self.node(key if isinstance(field.kind, schema.Later) else value, field.kind, name)
            if child is not None:
                children[name] = child
        if not isinstance(node, yaml.MappingNode):
            return None
        required = [name for name, field in kind.fields.items() if field.required]
        for name in required:
            if name not in seen:
                self.wrong(node, f"{kind.what} without {name}")
        given = [name for name in kind.one_of if name in seen]
        if kind.one_of and not given:
            self.wrong(node, f"{kind.what} without any of {', '.join(kind.one_of)}")
            return None
        if kind.only and len(given) > 1:
            self.wrong(node, f"{kind.what} with {' and '.join(given)}", f"one of {', '.join(kind.one_of)}")
            return None
        return children if all(name in children for name in required) else None

    def named(self, node: yaml.Node, kind: schema.Named) -> dict[str, tuple[Node, Node]] | None:
        children: dict[str, tuple[Node, Node]] = {}
        for name, key, value in self.keys(node, kind.what):
            child = self.node(value, kind.value, f"{kind.what} {name}")
            if child is not None:
                place = Node(name, self.file, key.start_mark.line + 1, key.start_mark.column + 1)
                children[name] = (place, child)
        return children if isinstance(node, yaml.MappingNode) else None


def close(word: str, words: Iterable[str]) -> str:
    """A hint with the most alike of `words`, or ""."""
    near = difflib.get_close_matches(word, list(words), 1)
    return f"did you mean {near[0]}?" if near else ""


def did_you_mean(text: str, kind: schema.Kind) -> str:
    """What an admin who wrote `text` may have wanted."""
    match kind:
        case schema.Flag() if text.lower() in ("yes", "on", "true", "y"):
            return "did you mean true?"
        case schema.Flag() if text.lower() in ("no", "off", "false", "n"):
            return "did you mean false?"
        case schema.Choice(words):
            meant = _ACCESS_ALIASES.get(text.lower(), "")
            if meant in words:
                return f"did you mean {meant}?"
            return close(text, words)
    return ""
