"""What a subject may open now: every rule's glob looked up in /dev, each match judged as if it were asked for.

Runs in: opener, without any capability raised. An attacker controls nothing here but how often.
"""

from __future__ import annotations

import os

from fdbroker import limits
from fdbroker.errors import Refused
from fdbroker.kernel.devices import nodes_matching
from fdbroker.opener.open import Nodes
from fdbroker.policy.decide import View, decide
from fdbroker.terms import ACCESS_NAMES, Offer, Resource

_OFFERS = limits.OFFERS


def offers(seen: View, nodes: Nodes, folders: set[str]) -> list[Offer]:
    """All that `seen` allows and that exists, in order of name, each with the most access that may be asked for.

    The folders that were looked into are added to `folders`: a change in one of them may change the list.
    """
    paths: set[str] = set()
    for pattern in dict.fromkeys(rule.pattern for rule in seen.allow):
        paths.update(nodes_matching(pattern, folders))
    listed: list[Offer] = []
    for path in sorted(paths):
        if len(listed) == _OFFERS:
            break
        for access in reversed(ACCESS_NAMES):  # rw, wo, ro
            rules = decide(seen, Resource(path, access)).rules
            if rules:
                try:
                    found = nodes.find(path, rules, seen)
                except Refused:
                    continue
                os.close(found.descriptor)
                listed.append(Offer(path, access, found.rule.where))
                break
    return listed
