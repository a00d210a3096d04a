"""Policy files to a tree of values with their places, strictly: every error at once, as file:line:column.

Runs in: launcher, command line. The author of a file controls its text: root alone where files.py demands that.

A line ends with a line feed and with nothing else, as for editors and grep: characters that Python or YAML take for
further line ends are errors.

Only the YAML syntax is PyYAML's: a scalar stays the text that was written, so YAML 1.1's booleans, octal numbers
and base-60 numbers do not exist here.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

import yaml

from fdbroker.errors import Finding
from fdbroker.limits import policy as limits
from fdbroker.limits.opener import POLICY_FINDINGS
from fdbroker.policy import schema
from fdbroker.policy.files import ANOTHER, policy_files, read

# What YAML 1.1 calls printable (its c-printable), but for what ends a line beside the line feed, and for the tab.
_NOT_TEXT = re.compile("[^\n\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

_HINTED = 20  # findings with a hint
_QUOTE = "quote a value that begins with `*`"


class Node(NamedTuple):
    """A value and where it stands. `value` is a str, int, bool, list of Node or dict of Node by key.

    `partial`: a key of a mapping was wrong, and is left out, so that nothing is to be said of what the mapping lacks.
    """

    value: Any
    file: str
    line: int
    column: int
    partial: bool = False

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


class Digest:
    """SHA-256 over the files of a policy: of each its path, a NUL, its length in decimal, a NUL, and its bytes."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, file: str, text: str) -> None:
        """The next file, in the order in which they are read."""
        data = text.encode()
        self._hash.update(b"%s\0%d\0%s" % (file.encode(errors="surrogateescape"), len(data), data))

    def text(self) -> str:
        """In hexadecimal, lower case."""
        return self._hash.hexdigest()


def load(
    policy: str,
    findings: list[Finding],
    *,
    trusted: bool,
    digest: Digest | None = None,
    another: str = ANOTHER,
) -> list[Node]:
    """All files of a policy, each a tree of what fits the schema; what is wrong is added to `findings`.

    `digest` takes the names and the text of all files. `another` says how the caller is given another file.

    With `trusted`, every file and the folders above it must be root's and not writable by others. Raises PolicyError
    when the folder cannot be listed.
    """
    documents, size = [], 0
    for file in policy_files(policy, findings, trusted=trusted):
        text = read(file, findings, trusted=trusted, another=another)
        size += len((text or "").encode())
        if size > limits.POLICY_BYTES:  # nobody hears from the launcher while it loads: systemd's watchdog waits
            findings.append(
                Finding(file, 0, 0, "is too much with those before it", f"at most {limits.POLICY_BYTES} bytes")
            )
            break
        if text is not None:
            if digest is not None:
                digest.add(file, text)
            document = parse(file, text, findings)
            if document is not None:
                documents.append(document)
    return documents


def in_order(findings: list[Finding], what: str = "errors") -> list[Finding]:
    """By file and line, and no more than a person reads."""
    findings = sorted(dict.fromkeys(findings), key=lambda one: (one.file, one.line, one.column))
    most = POLICY_FINDINGS
    if len(findings) > most:
        findings[most:] = [Finding(findings[0].file, 0, 0, f"and {len(findings) - most} {what} more")]
    return findings


# ---- syntax


class _Composer(yaml.composer.Composer, yaml.resolver.Resolver):
    """Makes nodes of events that were read before: to read a text takes most of the time that loading does."""

    def __init__(self, events: Iterable[yaml.Event]) -> None:
        yaml.composer.Composer.__init__(self)
        yaml.resolver.Resolver.__init__(self)
        self._events = deque(events)

    def check_event(self, *kinds: type[yaml.Event]) -> bool:
        return bool(self._events) and isinstance(self._events[0], kinds)

    def peek_event(self) -> yaml.Event:
        return self._events[0]

    def get_event(self) -> yaml.Event:
        return self._events.popleft()


def parse(file: str, text: str, findings: list[Finding]) -> Node | None:
    """One file's text as a tree that fits the schema; what is wrong is added to `findings`."""
    before = len(findings)
    for number, row in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        wrong = _NOT_TEXT.search(row)
        if wrong and wrong[0] == "\t":
            findings.append(Finding(file, number, wrong.start() + 1, "a tab", "spaces"))
        elif wrong:
            what = f"the character U+{ord(wrong[0]):04X}"
            findings.append(Finding(file, number, wrong.start() + 1, what, "text, and lines that end with a line feed"))
    if len(findings) > before:
        return None
    try:
        events = _check_events(file, text, findings)
        if len(findings) > before:
            return None
        root = _Composer(events).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (0, 0)
        what = " ".join(part for part in (error.context, error.problem) if part)
        hint = _QUOTE if error.context == "while scanning an alias" else ""
        findings.append(Finding(file, line, column, f"not YAML: {what}", hint=hint))
        return None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        findings.append(Finding(file, 0, 0, f"not YAML: {error}"))
        return None
    if root is None:
        findings.append(Finding(file, 0, 0, "is empty", "a mapping that begins with `version: 1`"))
        return None
    return _Walk(file, findings).node(root, schema.POLICY, "a policy")


def _check_events(file: str, text: str, findings: list[Finding]) -> list[yaml.Event]:
    """What a text says in YAML. What a policy needs not and a reader overlooks is refused before anything is built."""

    def wrong(event: Any, what: str, hint: str = "") -> None:
        findings.append(Finding(file, event.start_mark.line + 1, event.start_mark.column + 1, what, hint=hint))

    depth = documents = 0
    events: list[yaml.Event] = []
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        events.append(event)
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents == 2:
                wrong(event, "a second document", "one file holds one policy")
                break
        anchor, tag = getattr(event, "anchor", None), getattr(event, "tag", None)
        if isinstance(event, yaml.AliasEvent):
            wrong(event, f"the alias *{anchor}", f"aliases are not allowed: write it out; {_QUOTE}")
        elif anchor:
            wrong(event, f"the anchor &{anchor}", "anchors are not allowed")
        if tag:
            wrong(event, f"the tag {tag}", "tags are not allowed")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > limits.POLICY_DEPTH:
                wrong(event, f"over {limits.POLICY_DEPTH} levels deep")
                break
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
    return events


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
        self.partial: set[yaml.Node] = set()

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
        partial = node in self.partial
        return Node(value, self.file, node.start_mark.line + 1, node.start_mark.column + 1, partial)

    def scalar(self, node: yaml.Node, kind: schema.Kind, what: str) -> str | int | bool | None:
        expected = ""
        plain = isinstance(node, yaml.ScalarNode) and _kind_of(node) != "nothing"
        text = node.value if plain else ""
        match kind:
            case schema.Text(expected, pattern):
                if plain and text and (not pattern or re.fullmatch(pattern, text)):
                    return str(text)
            case schema.Integer(least, most):
                expected = f"a number from {least} to {most}" if least < most else str(least)
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
        hint = did_you_mean(text, kind) if hinted(self.findings) else ""
        self.wrong(node, what, expected, _kind_of(node), hint)
        return None

    def sequence(self, node: yaml.Node, item: schema.Kind, what: str) -> list[Node] | None:
        if not isinstance(node, yaml.SequenceNode) or not node.value:
            found = "an empty list" if isinstance(node, yaml.SequenceNode) else _kind_of(node)
            self.wrong(node, what, "a list of at least one item", found, _as_list(node, item))
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
        seen, meant = set(), set()
        for name, key, value in self.keys(node, kind.what):
            seen.add(name)
            field = kind.fields.get(name)
            if field is None:
                known = [known for known, one in kind.fields.items() if not isinstance(one.kind, schema.Later)]
                expected = "one of " + ", ".join(known)
                near = [closest(name, known)] if hinted(self.findings) else known
                meant.update(near)
                hint = f"did you mean {near[0]}?" if len(near) == 1 and near[0] else ""
                self.wrong(key, f"unknown key {name!r} in {kind.what}", expected, "", hint)
                continue
            later = isinstance(field.kind, schema.Later)
            if later:  # it may be what would do for one of these
                meant.update(kind.one_of)
            child = self.node(key if later else value, field.kind, name)
            if child is not None:
                children[name] = child
        if not isinstance(node, yaml.MappingNode):
            return None
        if seen & kind.fields.keys() - children.keys() or any(meant):
            self.partial.add(node)
        required = [name for name, field in kind.fields.items() if field.required]
        for name in required:
            if name not in seen | meant:  # a key that is there by another name does not lack as well
                only = kind.fields[name].kind
                hint = f"add `{name}: {only.least}`" if isinstance(only, schema.Integer) else ""
                self.wrong(node, f"{kind.what} without {name}", hint=hint)
        given = [name for name in kind.one_of if name in seen]
        if kind.one_of and not given:
            if meant.isdisjoint(kind.one_of):
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


def _as_list(node: yaml.Node, item: schema.Kind) -> str:
    """A hint how one word is written as a list of one item, or ""."""
    if not isinstance(node, yaml.ScalarNode) or _kind_of(node) == "nothing" or isinstance(item, schema.Mapping):
        return ""
    plain = re.fullmatch(r"[A-Za-z0-9/_][A-Za-z0-9/._+@*-]*", node.value)
    text = node.value if plain else "'" + node.value.replace("'", "''") + "'"
    return f"write `[{text}]`"


def hinted(findings: list[Finding]) -> bool:
    """Whether the next one gets a hint: to find what is alike takes long, and the launcher is silent meanwhile."""
    return len(findings) < _HINTED


def close(word: str, words: Iterable[str]) -> str:
    """A hint with the most alike of `words`, or ""."""
    near = closest(word, words)
    return f"did you mean {near}?" if near else ""


def closest(word: str, words: Iterable[str]) -> str:
    """The most alike of `words`, or ""."""
    return next(iter(difflib.get_close_matches(word, list(words), 1)), "")


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
        case schema.Text(_, pattern) if text[:1].isdecimal() and pattern:
            # a number is written without zeros before it, and that of a device with its minor, or a star
            short = re.sub(r"(?<![0-9])0+(?=[0-9])", "", text)
            meant = next((one for one in (short, f"{short}:*") if re.fullmatch(pattern, one)), "")
            return f'did you mean "{meant}"?' if meant else ""
    return ""
