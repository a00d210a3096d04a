"""What the policy says about each subject, made once for all connections about which it says the same.

Runs in: opener, keeper, inbox. An attacker controls which of its user's uids, groups and labels connect, and how many.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from fdbroker.policy.compiled import Policy
from fdbroker.terms import NOBODY, OTHERS, Subject, in_ranges

# When there are more, all are made anew. A guess: as many as there are accounts.
_KEPT = 1024
_Said = TypeVar("_Said", bound=tuple[Any, ...])
_Made = TypeVar("_Made")


class Views(Generic[_Made]):
    """Those of one policy: what `look` says of a subject, and what is kept of that, which `make` makes.

    Of a subject's groups only those that the policy names matter.
    """

    def __init__(
        self, policy: Policy, look: Callable[[Policy, Subject], _Said], make: Callable[[_Said], _Made]
    ) -> None:
        self.policy = policy
        self._look, self._make = look, make
        self._gids = tuple(sorted(policy.gids))
        self._uids = policy.uids | NOBODY | {0}
        self._ranges = tuple(rule.ranges for rule in policy.deny if rule.ranges)
        self._by_subject: dict[tuple[object, ...], _Made] = {}
        self._by_view: dict[tuple[object, ...], _Made] = {}

    def groups(self, subject: Subject) -> tuple[int, ...]:
        """Those of a subject's groups that the policy names: of the others it says nothing."""
        return tuple([gid for gid in self._gids if gid in subject.gids])

    def of(self, subject: Subject) -> _Made:
        """For a subject; the same object for all about whom the policy says the same."""
        # uids that no rule names are one, or each of a user's subordinate uids had a view to be made
        uid, owner = (one if one in self._uids else None for one in (subject.uid, subject.owner))
        denied = tuple([in_ranges(subject.uid, ranges) for ranges in self._ranges])
        others = subject.owner == OTHERS
        who = (uid, owner, others, denied, subject.foreign, subject.label, self.groups(subject))
        kept = self._by_subject.get(who)
        if kept is None:
            if len(self._by_subject) >= _KEPT:
                self._by_subject.clear()
            if len(self._by_view) >= _KEPT:
                self._by_view.clear()
            made = self._look(self.policy, subject)
            # every field, so that one which comes later cannot be forgotten here
            what = tuple([tuple(one.items()) if isinstance(one, dict) else one for one in made])
            kept = self._by_view.get(what)
            if kept is None:
                kept = self._by_view[what] = self._make(made)
            self._by_subject[who] = kept
        return kept
