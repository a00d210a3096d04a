"""What is wrong with a policy, on its way from the launcher to an administrator.

Runs in: launcher (writes), inbox (reads). The opener passes the bytes on.
"""

from __future__ import annotations

from collections.abc import Sequence

from fdbroker.errors import Finding
from fdbroker.limits import opener as limits
from fdbroker.wire import codec

# Longer texts are cut, so that POLICY_FINDINGS findings fit one message.
_TOLD = codec.Record(Finding, codec.Text(255, cut=True), codec.U32, codec.U32, codec.Text(384, cut=True))
_FINDING = codec.Mapped(_TOLD, lambda one: (one.file, one.line, one.column, one.text), lambda one: one)
FINDINGS = codec.Some(_FINDING, limits.POLICY_FINDINGS)


def to_bytes(findings: Sequence[Finding]) -> bytes:
    """The first POLICY_FINDINGS of them."""
    return FINDINGS.write(findings[: limits.POLICY_FINDINGS])


def from_bytes(data: bytes) -> tuple[Finding, ...]:
    """The inverse. Raises LinkViolation."""
    cursor = codec.Cursor(data)
    found: tuple[Finding, ...] = FINDINGS.read(cursor)
    cursor.end()
    return found
