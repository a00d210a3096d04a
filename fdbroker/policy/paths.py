"""Device paths and globs as text: which paths are well-formed, and what a glob matches.

Runs in: opener, launcher, command line. An attacker controls every path; only the admin writes globs.
"""

from __future__ import annotations

import re
from functools import lru_cache

from fdbroker import limits

_PATH_BYTES, _NAME_BYTES = limits.PATH_BYTES, limits.NAME_BYTES

# one component's piece: a star, a question mark, a set such as [!a-c], or one other character; two backslashes are one
PIECE = re.compile(r"(?P<star>\*)|(?P<any>\?)|\[(?P<set>!?\]?[^\]]*)\]|(?P<one>\\\\|.)", re.DOTALL)
BACKSLASH = "\\\\"  # as a glob has it
# characters that a glob may not hold, and why
_FORBIDDEN = {
    "{": "there are no alternatives in braces; write two rules",
    "}": "there are no alternatives in braces; write two rules",
}
# a character class as regular expressions have it: what to write instead, in a set
_CLASSES = {
    "digit": "0-9",
    "alpha": "a-zA-Z",
    "alnum": "0-9a-zA-Z",
    "xdigit": "0-9a-fA-F",
    "upper": "A-Z",
    "lower": "a-z",
}
_CLASS = re.compile(r"\[[^\]]*\[[:.=](?P<name>[^\]:.=]*)[^\]]*\]*")


def is_device_path(path: str) -> bool:
    """Whether a path that a client wrote can name a node below /dev at all: the plain spelling and no other.

    No "..", ".", "//", slash at the end, unprintable character, lone surrogate, and nothing over the kernel's limits.
    """
    if not path.startswith("/dev/") or not path.isprintable():
        return False
    names = path.split("/")[1:]
    return len(path.encode()) <= _PATH_BYTES and all(
        name not in ("", ".", "..") and len(name.encode()) <= _NAME_BYTES for name in names
    )


def is_namespace_name(name: str) -> bool:
    """Whether a name that a client wrote can be that of a file in a folder: ip-netns(8) keeps namespaces as files."""
    return name not in ("", ".", "..") and "/" not in name and name.isprintable() and len(name.encode()) <= _NAME_BYTES


def glob_error(pattern: str) -> str:
    """What is wrong with a device rule's glob, or ""."""
    if not pattern.startswith("/dev/"):
        return "a device's path begins with /dev/"
    for name in pattern.split("/")[1:]:
        trouble = name_glob_error(name)
        if trouble:
            return trouble
    if len(pattern.encode()) > _PATH_BYTES:
        return f"it is over {_PATH_BYTES} bytes"
    return ""


def name_glob_error(pattern: str) -> str:
    """What is wrong with a glob for one name, or ""."""
    if "\\" in pattern.replace(BACKSLASH, ""):
        return "a backslash is written as two, \\\\: there is no other use of it"
    for character, why in _FORBIDDEN.items():
        if character in pattern:
            return f"{character!r} is not allowed: {why}"
    if "**" in pattern:
        return "** is not allowed: * never matches a slash; write a rule for each level"
    if not pattern.isprintable():
        return "it has characters that cannot be printed"
    if pattern == "":
        return "it has an empty name (// or a slash at its end)"
    if pattern in (".", ".."):
        return f"{pattern} is not allowed"
    if "/" in pattern:
        return "it is one name, without a slash"
    if len(pattern.encode()) > _NAME_BYTES:
        return f"a name is over {_NAME_BYTES} bytes"
    if "[" in PIECE.sub(lambda found: found["one"] or "", pattern):
        return "a [ without its ]"
    for found in PIECE.finditer(pattern):
        trouble = "" if found["set"] is None else _set_error(found["set"], pattern[found.start() :])
        if trouble:
            return trouble
    return ""


def literal(pattern: str) -> str:
    """The one path, or name, that a glob without wildcards names."""
    return pattern.replace(BACKSLASH, "\\")


def _set_regex(text: str) -> str:
    negated = text.startswith("!")
    body = literal(text[1:] if negated else text)
    # only a range's hyphen keeps a meaning; the slash, which no set matches, stands apart: beside a hyphen it would
    # begin or end a range
    body = "".join(re.escape(one) if one != "-" else "-" for one in body)
    return f"(?!/)[{'^' if negated else ''}{body}]"


def _set_error(text: str, rest: str) -> str:
    """What is wrong with the set `text`, or ""; `rest` is the glob from the set's bracket on."""
    if text.startswith("^"):
        return f"[{text}] would match ^ itself: a set of other characters is written [!{text[1:]}]"
    named = _CLASS.match(rest)
    if named and re.search(r"\[[:.=]", text):
        letters = _CLASSES.get(named["name"], "a-z")
        return f"{named[0]} is not known: write the characters themselves, such as [{letters}]"
    wrong = f"[{text}] is not a set of characters"
    if text in ("", "!") or "--" in text:
        return wrong
    try:
        re.compile(_set_regex(text))
    except re.error:
        return wrong
    return ""


def component_regex(name: str) -> str:
    """The regular expression, as text, of a glob for one name."""
    # The text between two stars may be matched at its first place for good (atomic group): what follows finds no
    # match later that it would not find then. So matching takes linear time, whatever path a client sends.
    chunks: list[str] = [""]
    for found in PIECE.finditer(name):
        if found["star"]:
            chunks.append("")
        elif found["any"]:
            chunks[-1] += "[^/]"
        elif found["set"] is not None:
            chunks[-1] += _set_regex(found["set"])
        else:
            chunks[-1] += re.escape(literal(found["one"]))
    if len(chunks) == 1:
        return chunks[0]
    middle = "".join(f"(?>[^/]*?{chunk})" for chunk in chunks[1:-1])
    return f"{chunks[0]}{middle}[^/]*{chunks[-1]}"


@lru_cache(maxsize=4096)
def matcher(pattern: str) -> re.Pattern[str]:
    """The regular expression of a glob; use `fullmatch`. Wildcards never match a slash."""
    return re.compile("/".join(map(component_regex, pattern.split("/"))), re.DOTALL)


def is_literal(pattern: str) -> bool:
    """Whether a glob names one path only."""
    return not any(character in pattern for character in "*?[")


def literal_folder(pattern: str) -> str:
    """The deepest folder that all matches of a glob lie below, e.g. /dev/snd of /dev/snd/pcm*."""
    folder = pattern.rpartition("/")[0]
    while not is_literal(folder):
        folder = folder.rpartition("/")[0]
    return literal(folder)
