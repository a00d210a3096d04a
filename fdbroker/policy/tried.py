"""A policy's own tests: what each expects, and whether it comes out so.

Runs in: launcher, command line. Only the admin writes policies.
"""

from __future__ import annotations

from fdbroker.errors import Finding
from fdbroker.policy.compile import Loaded
from fdbroker.policy.messages import judge


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
                    f"try `fdbroker policy explain` for uid {test.subject.uid} and {test.resource.text}",
                )
            )
    return findings
