"""What is wrong with a glob as an admin wrote it: of a path, of one name, of a MAC label.

Runs in: launcher, command line. Only the admin writes globs.
"""

from __future__ import annotations

import re

from fdbroker.limits import opener as limits
from fdbroker.policy.labels import MODE, NO_PROFILE, STACK
from fdbroker.policy.literals import is_literal
from fdbroker.policy.paths import BACKSLASH, PIECE, literal, set_regex

_PATH_BYTES, _NAME_BYTES, _LABEL_BYTES = limits.PATH_BYTES, limits.NAME_BYTES, limits.LABEL_BYTES


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
        re.compile(set_regex(text))
    except re.error:
        return wrong
    return ""


def literal_folder(pattern: str) -> str:
    """The deepest folder that all matches of a glob lie below, e.g. /dev/snd of /dev/snd/pcm*."""
    folder = pattern.rpartition("/")[0]
    while not is_literal(folder):
        folder = folder.rpartition("/")[0]
    return literal(folder)


def label_glob_error(pattern: str, *, allows: bool) -> str:
    """What is wrong with a rule's glob for labels, or ""; `allows`: in a rule that allows."""
    if len(pattern.encode()) > _LABEL_BYTES:
        return f"it is over {_LABEL_BYTES} bytes"
    if STACK in pattern:
        return "each profile of a stack counts by itself: write one"
    if pattern.startswith(":"):
        return "write the profile without its namespace; no rule allows anything to one in another namespace"
    if MODE.fullmatch(pattern):
        return "write it without its mode"
    if allows and is_literal(pattern) and pattern in NO_PROFILE:
        return "it stands for no confinement, and never allows anything"
    if "{" in pattern or "}" in pattern:
        return "no braces: AppArmor has them in the names of some profiles, write ? for each"
    for part in pattern.split("/"):
        trouble = name_glob_error(part) if part else ""
        if trouble:
            return trouble
    return ""
