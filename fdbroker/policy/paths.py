"""Device paths and globs as text: which paths are well-formed, what a glob matches, which names are dangerous.

Runs in: opener, launcher, command line. An attacker controls every path; only the admin writes globs.
"""

from __future__ import annotations

import re
from functools import cache, lru_cache

from fdbroker import limits

_PATH_BYTES, _NAME_BYTES = limits.PATH_BYTES, limits.NAME_BYTES

# Nodes whose reader or writer has power over the machine, or over other people's sessions: the first name below /dev.
DANGEROUS_NAMES = (
    "mem",
    "port",
    "kmsg",
    "watchdog*",
    "tty*",
    "pts",
    "vcs*",
    "console",
    "sd*",
    "nvme*",
    "loop*",
    "st*",
    "uinput",
    # beyond the design's list: block devices' other names, raw access to disks and firmware, and typing for others
    "vd*",
    "dm-*",
    "mapper",
    "mmcblk*",
    "sg*",
    "bsg",
    "mtd*",
    "nvram",
    "ipmi*",
    "btrfs-control",
    "uhid",
)

# one component's piece: a star, a question mark, a set such as [!a-c], or one other character
_PIECE = re.compile(r"(?P<star>\*)|(?P<any>\?)|\[(?P<set>!?\]?[^\]]*)\]|(?P<one>.)", re.DOTALL)
# characters that a glob may not hold, and why
_FORBIDDEN = {
    "\\": "there is no escape character",
    "{": "there are no alternatives in braces; write two rules",
    "}": "there are no alternatives in braces; write two rules",
}
_ALPHABET = "".join(map(chr, range(33, 127)))


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
    if "[" in _PIECE.sub(lambda found: found["one"] or "", pattern):
        return "a [ without its ]"
    for found in _PIECE.finditer(pattern):
        if found["set"] is not None and _set_error(found["set"]):
            return f"[{found['set']}] is not a set of characters"
    return ""


def _set_regex(text: str) -> str:
    negated = text.startswith("!")
    body = text[1:] if negated else text
    # only a range's hyphen keeps a meaning; the slash, which no set matches, stands apart: beside a hyphen it would
    # begin or end a range
    body = "".join(re.escape(one) if one != "-" else "-" for one in body)
    return f"(?!/)[{'^' if negated else ''}{body}]"


def _set_error(text: str) -> bool:
    if text in ("", "!") or "--" in text:
        return True
    try:
        re.compile(_set_regex(text))
    except re.error:
        return True
    return False


def _component_regex(name: str) -> str:
    # The text between two stars may be matched at its first place for good (atomic group): what follows finds no
    # match later that it would not find then. So matching takes linear time, whatever path a client sends.
    chunks: list[str] = [""]
    for found in _PIECE.finditer(name):
        if found["star"]:
            chunks.append("")
        elif found["any"]:
            chunks[-1] += "[^/]"
        elif found["set"] is not None:
            chunks[-1] += _set_regex(found["set"])
        else:
            chunks[-1] += re.escape(found["one"])
    if len(chunks) == 1:
        return chunks[0]
    middle = "".join(f"(?>[^/]*?{chunk})" for chunk in chunks[1:-1])
    return f"{chunks[0]}{middle}[^/]*{chunks[-1]}"


@lru_cache(maxsize=4096)
def matcher(pattern: str) -> re.Pattern[str]:
    """The regular expression of a glob; use `fullmatch`. Wildcards never match a slash."""
    return re.compile("/".join(map(_component_regex, pattern.split("/"))), re.DOTALL)


def is_literal(pattern: str) -> bool:
    """Whether a glob names one path only."""
    return not any(character in pattern for character in "*?[")


def literal_folder(pattern: str) -> str:
    """The deepest folder that all matches of a glob lie below, e.g. /dev/snd of /dev/snd/pcm*."""
    folder = pattern.rpartition("/")[0]
    while not is_literal(folder):
        folder = folder.rpartition("/")[0]
    return folder


_DANGEROUS = re.compile("/dev/(?:" + "|".join(map(_component_regex, DANGEROUS_NAMES)) + ")(?:/.*)?", re.DOTALL)


def is_dangerous(path: str) -> bool:
    """Whether a path below /dev, without wildcards, is on the list of dangerous names or below one of them."""
    return _DANGEROUS.fullmatch(path) is not None


def dangerous_name(pattern: str) -> str:
    """The entry of DANGEROUS_NAMES that a glob below /dev can match, or ""."""
    first = pattern.split("/", 3)[2]
    return next((name for name in DANGEROUS_NAMES if _overlap(first, name)), "")


def _overlap(left: str, right: str) -> bool:
    """Whether one name matches both globs."""
    lefts = list(_PIECE.finditer(left))
    rights = list(_PIECE.finditer(right))

    @cache
    def meet(i: int, j: int) -> bool:
        if i == len(lefts) and j == len(rights):
            return True
        if i < len(lefts) and lefts[i]["star"]:
            return meet(i + 1, j) or (j < len(rights) and meet(i, j + 1))
        if j < len(rights) and rights[j]["star"]:
            return meet(i, j + 1) or (i < len(lefts) and meet(i + 1, j))
        if i == len(lefts) or j == len(rights):
            return False
        both = [re.compile(_component_regex(side[0])) for side in (lefts[i], rights[j])]
        return any(all(one.fullmatch(letter) for one in both) for letter in _ALPHABET) and meet(i + 1, j + 1)

    return meet(0, 0)
