"""Globs compared with each other and with names, when a policy is loaded and judged.

Runs in: launcher, command line. Only the admin writes globs.
"""

from __future__ import annotations

import re
from functools import lru_cache

from fdbroker.policy.fit import DANGEROUS_CLASSES, DANGEROUS_NAMES, dangerous_number, is_dangerous_name
from fdbroker.policy.literals import is_literal
from fdbroker.policy.paths import BACKSLASH, PIECE, component_regex, literal

# the glob for a character of a path, where that is not the character itself
_AS_GLOB = {"\\": BACKSLASH, "*": "[*]", "?": "[?]", "[": "[[]", "{": "?", "}": "?"}
# Classes and majors that harmless and dangerous devices share: null and mem, kvm and uinput.
_SHARED_CLASSES = ("mem", "misc")
_SHARED_MAJORS = ("1", "10", "*")


def as_glob(path: str) -> str:
    """The glob that names `path` and, but for braces, which no glob can have, nothing else."""
    return "".join(_AS_GLOB.get(one, one) for one in path)


def within(inner: str, outer: str) -> bool:
    """Whether every path that `inner` matches is surely one that `outer` matches; False also when it is hard to say."""
    inners, outers = inner.split("/"), outer.split("/")
    return len(inners) == len(outers) and all(map(_part_within, inners, outers))


@lru_cache(maxsize=4096)
def _part_within(inner: str, outer: str) -> bool:
    """`within` for one name: where in `outer` each piece of `inner` can lead, a star of `inner` to none but a star."""
    if inner == outer:
        return True
    pieces = list(PIECE.finditer(outer))
    places = _beyond_stars(pieces, {0})
    for piece in PIECE.finditer(inner):
        if not places:
            return False
        after = set()
        for at in places - {len(pieces)}:
            over = pieces[at]
            if over["star"]:
                after.add(at)
            elif not piece["star"] and (
                over["any"] or over[0] == piece[0] or (piece["one"] and _fits(over, literal(piece["one"])))
            ):
                after.add(at + 1)
        places = _beyond_stars(pieces, after)
    return len(pieces) in places


def _beyond_stars(pieces: list[re.Match[str]], places: set[int]) -> set[int]:
    """These places of a glob, and those behind stars that stand at them, for a star may match nothing."""
    for at, piece in enumerate(pieces):
        if at in places and piece["star"]:
            places.add(at + 1)
    return places


def _fits(piece: re.Match[str], letter: str) -> bool:
    """Whether a piece that is no star matches one letter."""
    if piece["set"] is not None:
        return re.fullmatch(component_regex(piece[0]), letter) is not None
    return bool(piece["any"]) or literal(piece["one"]) == letter


def _after(pieces: list[re.Match[str]], text: str) -> set[int]:
    """The places of a glob for one name to which a text leads; len(pieces) among them: the glob matches it."""
    places = _beyond_stars(pieces, {0})
    for letter in text:
        stars = {at for at in places if at < len(pieces) and pieces[at]["star"]}
        after = {at + 1 for at in places - stars - {len(pieces)} if _fits(pieces[at], letter)}
        places = _beyond_stars(pieces, stars | after)
    return places


def dangerous_rule(pattern: str, kernel_class: str, device: str) -> str:
    """The reason for which a rule needs `dangerous: true`, or "": its class, its number, or a name that it can match.

    A star alone below the first folder is no reason; the nodes that it matches are judged when they are opened.
    """
    if kernel_class in DANGEROUS_CLASSES:
        return f"class {kernel_class}"
    what = dangerous_number(device)
    if what:
        return f"device {device}, which is {what}"
    harmless = (kernel_class and kernel_class not in _SHARED_CLASSES) or (
        device and device.partition(":")[0] not in _SHARED_MAJORS
    )
    name = dangerous_name(pattern)
    if name and not (harmless and "/" in name):
        return f"{pattern} can match /dev/{name}"
    return ""


def dangerous_name(pattern: str) -> str:
    """The dangerous name that a glob below /dev can match, with the folders before it as they stand there, or ""."""
    parts = pattern.split("/")[2:]
    for index, part in enumerate(parts):
        name = "" if index and part == "*" else _dangerous_part(part)
        if name:
            return "/".join([*parts[:index], name])
    return ""


@lru_cache(maxsize=4096)
def _dangerous_part(part: str) -> str:
    if is_literal(part) and not is_dangerous_name(literal(part)):
        return ""
    pieces = list(PIECE.finditer(part))
    first = literal(pieces[0]["one"]) if pieces and pieces[0]["one"] else ""
    for name in DANGEROUS_NAMES:
        if first not in ("", name[0]):  # as for most names of most rules
            continue
        places = _after(pieces, name.removesuffix("*"))
        # a name that ends in a star goes on as the glob does
        if len(pieces) in places or (places and name.endswith("*")):
            return name
    return ""
