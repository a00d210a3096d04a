"""Which names below /dev a glob matches now.

Runs in: launcher, keeper. Root alone makes names there; nothing here follows or opens what it finds.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from fdbroker.policy.literals import is_literal
from fdbroker.policy.paths import literal, matcher


def nodes_matching(pattern: str, folders: set[str]) -> Iterator[str]:
    """The paths that a glob below /dev matches; one without wildcards need not exist.

    Every folder that was looked into is added to `folders`: a change in one of them may change the answer.
    """
    return _below("/dev", pattern.split("/")[2:], folders)


def _below(folder: str, names: list[str], folders: set[str]) -> Iterator[str]:
    name, rest = names[0], names[1:]
    folders.add(folder)
    if is_literal(name):
        candidates = [literal(name)]
    else:
        try:
            candidates = list(filter(matcher(name).fullmatch, os.listdir(folder)))
        except OSError:
            return
    for candidate in candidates:
        path = f"{folder}/{candidate}"
        if not rest:
            yield path
        elif is_literal(name) or os.path.isdir(path):
            yield from _below(path, rest, folders)
