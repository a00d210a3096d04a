"""Device paths and globs as text: which paths are well-formed, and what a glob matches.

Runs in: opener, keeper, inbox, launcher, command line. An attacker controls every path; only the admin writes globs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Generic, TypeVar

from fdbroker.limits import opener as limits

_Value = TypeVar("_Value")
_PATH_BYTES, _NAME_BYTES = limits.PATH_BYTES, limits.NAME_BYTES

# one component's piece: a star, a question mark, a set such as [!a-c], or one other character; two backslashes are one
PIECE = re.compile(r"(?P<star>\*)|(?P<any>\?)|\[(?P<set>!?\]?[^\]]*)\]|(?P<one>\\\\|.)", re.DOTALL)
BACKSLASH = "\\\\"  # as a glob has it


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


def literal(pattern: str) -> str:
    """The one path, or name, that a glob without wildcards names."""
    return pattern.replace(BACKSLASH, "\\")


def set_regex(text: str) -> str:
    """The regular expression of a set of a glob, without its brackets."""
    negated = text.startswith("!")
    body = literal(text[1:] if negated else text)
    # only a range's hyphen keeps a meaning; the slash, which no set matches, stands apart: beside a hyphen it would
    # begin or end a range
    body = "".join(re.escape(one) if one != "-" else "-" for one in body)
    return f"(?!/)[{'^' if negated else ''}{body}]"


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
            chunks[-1] += set_regex(found["set"])
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


class Globs(Generic[_Value]):
    """Values under globs: of all of them, only those are tried that begin as a path does."""

    def __init__(self, globs: Iterable[tuple[str, _Value]]) -> None:
        self._beginning: dict[str, list[tuple[int, str, _Value]]] = {}
        for position, (pattern, value) in enumerate(globs):
            self._beginning.setdefault(_beginning(pattern), []).append((position, pattern, value))
        self._sizes = sorted({len(beginning) for beginning in self._beginning})

    def matching(self, path: str) -> list[_Value]:
        """The values of those that match `path`, in order, one for each glob."""
        found = []
        for size in self._sizes:
            if size > len(path):
                break
            for position, pattern, value in self._beginning.get(path[:size], ()):
                if matcher(pattern).fullmatch(path):
                    found.append((position, value))
        return [value for _, value in sorted(found, key=lambda one: one[0])]


def _beginning(pattern: str) -> str:
    """What every path begins with that the glob matches."""
    return literal(re.split(r"[*?\[]", pattern, maxsplit=1)[0])
