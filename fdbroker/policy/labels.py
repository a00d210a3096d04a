"""MAC labels in rules: what a glob matches, for a rule that allows and for one that denies.

Runs in: opener, keeper, inbox, launcher, command line. An attacker has the label that its program was confined with;
without any confinement it may have AppArmor confine it with a profile of its choice, and can give that no name of its
own but in a policy namespace. Only the admin writes globs.

A label is what SO_PEERSEC says: of SELinux a context, of AppArmor `PROFILE (MODE)`, several as `A//&B (MODE)`, those of
a policy namespace as `:NAMESPACE:PROFILE`, and `unconfined`. Source: apparmor(7), and aa_label_snxprint in
security/apparmor/label.c.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from fdbroker.policy.paths import matcher

STACK = "//&"  # between the profiles of a program that has several
_CHILD = "//"  # between a profile and one inside it, such as a hat
MODE = re.compile(r"(?P<name>.*) \((?P<mode>[^()]*)\)", re.DOTALL)
# AppArmor's modes in which a profile forbids what it does not allow
_ENFORCED = ("enforce", "kill")
# What AppArmor says without a mode: no profile; one that we may not see.
_HIDDEN = "---"
NO_PROFILE = ("unconfined", _HIDDEN)
_NAMESPACE = re.compile(r":[^:]*:(?://)?")


def _profiles(label: str) -> tuple[list[str], str]:
    """The profiles, or the one context, that a label names, and their mode, "" where there is none."""
    found = MODE.fullmatch(label)
    name, mode = (found["name"], found["mode"]) if found else (label, "")
    return name.split(STACK), mode


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
    return _match(patterns, (name for name in names if name and name not in NO_PROFILE))


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
