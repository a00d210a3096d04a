"""A policy's own tests: what each expects, and whether it comes out so.

Runs in: launcher, command line. Only the admin writes policies.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from fdbroker.errors import Finding
from fdbroker.policy.compile import Loaded, PolicyTest
from fdbroker.policy.messages import judge
from fdbroker.typed import join_access


def failed_tests(loaded: Loaded) -> list[Finding]:
    """The policy's own tests that do not come out as they say."""
    findings = []
    for test in loaded.tests:
        allowed = bool(judge(loaded.policy, test.subject, test.resource).rules)
        if allowed != test.allowed:
            findings.append(
                test.place.finding(
                    "this test fails",
                    "allow" if test.allowed else "deny",
                    "allow" if allowed else "deny",
                    f"try `{_explain(test, loaded.files[:1])}`",
                )
            )
    return findings


def _explain(test: PolicyTest, policy: Sequence[str]) -> str:
    """The command that asks what the test asks, of the same policy and with all that the test says of who asks."""
    who = test.place.value["as"]
    options = [("--policy", file) for file in policy] + [("--user", who.get("user"))]
    options += [("--groups", ",".join(group.value for group in who.items("groups")))] if "groups" in who.value else []
    options += [("--label", who.get("label"))] if "label" in who.value else []
    word = join_access(test.place.get("open"), test.place.get("access") or "ro", "ro")
    return shlex.join(["fdbroker", "policy", "explain", *(word for option in options for word in option), word])
