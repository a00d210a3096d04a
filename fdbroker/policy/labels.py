"""MAC labels in rules: what a glob matches, for a rule that allows and for one that denies.

Runs in: opener, launcher, command line. An attacker has the label that its program was confined with; without any
confinement it may have AppArmor confine it with a profile of its choice, and can give that no name of its own but in a
policy namespace. Only the admin writes globs.

A label is what SO_PEERSEC says: of SELinux a context, of AppArmor `PROFILE (MODE)`, several as `A//&B (MODE)`, those of
a policy namespace as `:NAMESPACE:PROFILE`, and `unconfined`. Source: apparmor(7), and aa_label_snxprint in
security/apparmor/label.c.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from fdbroker import limits
from fdbroker.policy.paths import is_literal, matcher, name_glob_error

_LABEL_BYTES = limits.LABEL_BYTES
_STACK = "//&"  # between the profiles of a program that has several
_CHILD = "//"  # between a profile and one inside it, such as a hat
_MODE = re.compile(r"(?P<name>.*) \((?P<mode>[^()]*)\)", re.DOTALL)
# AppArmor's modes in which a profile forbids what it does not allow
_ENFORCED = ("enforce", "kill")
# What AppArmor says without a mode: no profile; one that we may not see.
_HIDDEN = "---"
_NO_PROFILE = ("unconfined", _HIDDEN)
_NAMESPACE = re.compile(r":[^:]*:(?://)?")


def glob_error(pattern: str, *, allows: bool) -> str:
    """What is wrong with a rule's glob for labels, or ""; `allows`: in a rule that allows."""
    if len(pattern.encode()) > _LABEL_BYTES:
        return f"it is over {_LABEL_BYTES} bytes"
    if _STACK in pattern:
        return "each profile of a stack counts by itself: write one"
    if pattern.startswith(":"):
        return "write the profile without its namespace; no rule allows anything to one in another namespace"
    if _MODE.fullmatch(pattern):
        return "write it without its mode"
    if allows and is_literal(pattern) and pattern in _NO_PROFILE:
        return "it stands for no confinement, and never allows anything"
    if "{" in pattern or "}" in pattern:
        return "no braces: AppArmor has them in the names of some profiles, write ? for each"
    for part in pattern.split("/"):
        trouble = name_glob_error(part) if part else ""
        if trouble:
            return trouble
    return ""


def _profiles(label: str) -> tuple[list[str], str]:
    """The profiles, or the one context, that a label names, and their mode, "" where there is none."""
    found = _MODE.fullmatch(label)
    name, mode = (found["name"], found["mode"]) if found else (label, "")
    return name.split(_STACK), mode


def _match(patterns: Iterable[str], names: Iterable[str]) -> bool:
    names = list(names)
    return any(matcher(pattern).fullmatch(name) for pattern in patterns for name in names)


def allowing(patterns: tuple[str, ...], label: str) -> bool:
    """Whether a rule that allows counts for a program with this label: without globs always.

    With globs, one must match a profile that surely confines the program. An unknown label, "", matches none.
    """
    if not patterns:
        return True
    names, mode = _profiles(label)
    if mode and mode not in _ENFORCED:
        return False
    for index, name in enumerate(names):
        if name.startswith(":"):
            # the namespace is said once for several: what comes after may be in it too, under a name of its owner's
            names = names[:index]
            break
    return _match(patterns, (name for name in names if name and name not in _NO_PROFILE))


def denying(patterns: tuple[str, ...], label: str) -> bool:
    """Whether a deny rule counts for a program with this label: without globs always.

    With globs, one must match a profile of the program in whatever mode and namespace, or one that this is a child of.
    An unknown label, "", could be any, and matches all.
    """
    names, _ = _profiles(label)
    if not patterns or not label or _HIDDEN in names:
        return True
    found = []
    for name in names:
        words = _NAMESPACE.sub("", name, count=1).split(_CHILD) if name.startswith(":") else name.split(_CHILD)
        found += [_CHILD.join(words[:count]) for count in range(1, len(words) + 1)]
    return _match(patterns, found)
