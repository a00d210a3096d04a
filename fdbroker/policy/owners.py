"""The owner of a uid: the user behind it. Everything that is counted or limited for a user is counted for its owner.

Runs in: launcher (makes the table), opener, command line. A user controls with which of its uids a program runs; root
alone writes passwd(5) and subuid(5), where the table comes from.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import NamedTuple

from fdbroker.terms import INVALID_ID, OTHERS

EVERY_UID = ((0, INVALID_ID - 1),)


class Owners(NamedTuple):
    """`users` are the uids of passwd(5); `ranges` are (first uid, last uid, owner), in order and apart."""

    users: frozenset[int] = frozenset()
    ranges: tuple[tuple[int, int, int], ...] = ()

    def of(self, uid: int) -> int | None:
        """The owner's uid; None for a uid that is neither a user's own nor in a range."""
        if uid in self.users:
            return uid
        index = bisect_right(self.ranges, (uid, INVALID_ID, INVALID_ID)) - 1
        if index >= 0 and uid <= self.ranges[index][1]:
            return self.ranges[index][2]
        return None

    def known_of(self, uid: int) -> int:
        """The owner by this table alone: OTHERS for a uid that is in no line of it."""
        owner = self.of(uid)
        return OTHERS if owner is None else owner

    def uids(self, owner: int) -> tuple[tuple[int, int], ...]:
        """The uids of an owner, as (first, last). Every uid stands for the uids of OTHERS, which no table lists."""
        own = () if any(first <= owner <= last for first, last, _ in self.ranges) else ((owner, owner),)
        ranges = tuple((first, last) for first, last, of in self.ranges if of == owner)
        return EVERY_UID if owner == OTHERS else (*own, *ranges)


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
