"""What the opener keeps of each view of the policy: what was decided by it lately.

Runs in: opener. An attacker controls which of its user's uids, groups and labels connect, and how many of these.
"""

from __future__ import annotations

from typing import NamedTuple

from fdbroker.policy.compiled import Policy
from fdbroker.policy.decide import View
from fdbroker.policy.views import Views
from fdbroker.terms import Resource, Rule


class Seen(NamedTuple):
    """What a subject may do, and what was decided by that lately (`authorize.py`)."""

    view: View
    decided: dict[Resource, tuple[Rule, ...]]


def views(policy: Policy) -> Views[Seen]:
    """Those of one policy, as the opener judges by them."""
    return Views(policy, lambda made: Seen(made, {}))
