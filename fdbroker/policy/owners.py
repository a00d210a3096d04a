"""The owner of a uid: the user behind it. Everything that is counted or limited for a user is counted for its owner.

Runs in: opener, keeper, inbox, launcher, command line; ranges.py makes the table. A user controls with which of its
uids a program runs; root alone writes passwd(5) and subuid(5), where the table comes from.
"""

from __future__ import annotations

from bisect import bisect_right
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

    def uids(self, owner: int) -> tuple[tuple[int, int], ...]:
        """The uids of an owner, as (first, last). Every uid stands for the uids of OTHERS, which no table lists."""
        own = () if any(first <= owner <= last for first, last, _ in self.ranges) else ((owner, owner),)
        ranges = tuple((first, last) for first, last, of in self.ranges if of == owner)
        return EVERY_UID if owner == OTHERS else (*own, *ranges)
