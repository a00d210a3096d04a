"""Globs that are none.

Runs in: launcher, inbox, keeper, command line. Only the admin writes globs.
"""

from __future__ import annotations


def is_literal(pattern: str) -> bool:
    """Whether a glob names one path only."""
    return not any(character in pattern for character in "*?[")
