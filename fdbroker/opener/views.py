"""What the opener keeps of each view of the policy: what was decided by it lately, and what came of that.

Runs in: opener. An attacker controls which of its user's uids, groups and labels connect, and how many of these.
"""

from __future__ import annotations

from functools import cached_property

from fdbroker.policy.compiled import Policy
from fdbroker.policy.decide import View, view
from fdbroker.policy.views import Views
from fdbroker.terms import Grant, Resource, Rule


class Permit:
    """The rules that allow a resource, never none; and the grant that the last one of its nodes led to.

    `judged` is all that this followed from: the facts about the node, and the names on the way there. A node is found,
    and the kernel asked for its facts, each time; what is kept spares judging the same facts by the same rules again.
    """

    __slots__ = ("grant", "judged", "resource", "rules")

    def __init__(self, resource: Resource, rules: tuple[Rule, ...]) -> None:
        self.resource = resource
        self.rules = rules
        self.judged: object = None
        self.grant: Grant | None = None


class Seen(View):
    """What a subject may do, and what was decided by it lately, for all about whom the policy says the same."""

    @cached_property
    def permits(self) -> dict[Resource, Permit]:
        """By what was asked for (`authorize.py`)."""
        return {}


def views(policy: Policy) -> Views[Seen]:
    """Those of one policy, as the opener judges by them."""
    return Views(policy, view, Seen._make)
