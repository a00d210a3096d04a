"""The table of owners, made of the machine's users and of their subordinate uids.

Runs in: launcher, command line. Root alone writes passwd(5) and subuid(5).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

from fdbroker.policy.owners import Owners
from fdbroker.terms import OTHERS


def make_owners(users: Iterable[int], subordinate: Iterable[tuple[int | None, int, int]]) -> Owners:
    """The table of all users and of subordinate ranges: (the user's uid or None, first uid, last uid).

    A range is an owner of its own, called by its first uid, when it is root's or an unknown user's, when it shares
    uids with a range of somebody else, or when it covers the uid of a user. Ranges that share uids become one.
    """
    known = frozenset(users)
    merged: list[tuple[int, int, int | None]] = []
    for user, first, last in sorted(subordinate, key=lambda one: one[1]):
        if merged and first <= merged[-1][1]:
            before, end, of = merged[-1]
            merged[-1] = (before, max(end, last), of if of == user else None)
        else:
            merged.append((first, last, user))
    ordered = sorted(known)
    ranges = []
    for first, last, user in merged:
        covered = bisect_right(ordered, last) > bisect_right(ordered, first - 1)
        owner = user or first
        if not user or user not in known or covered:
            # not by a number that a user has: that user would be charged for the range
            owner = next((uid for uid in range(first, last + 1) if uid not in known), first)
        ranges.append((first, last, owner))
    return Owners(known, tuple(ranges))


def known_owner(owners: Owners, uid: int) -> int:
    """The owner by this table alone: OTHERS for a uid that is in no line of it."""
    owner = owners.of(uid)
    return OTHERS if owner is None else owner
