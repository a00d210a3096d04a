"""Every error that leaves a module: what the peer broke, what was refused, what is wrong with a policy.

Runs in: every process but the opener, which needs no more than refusals.py. The kernel's OSError stays OSError.
"""

from __future__ import annotations

import errno
from typing import NamedTuple

from fdbroker.refusals import (
    EX_CONFIG,
    EX_DATAERR,
    EX_IOERR,
    EX_NOINPUT,
    EX_NOPERM,
    EX_OK,
    EX_OSERR,
    EX_PROTOCOL,
    EX_SOFTWARE,
    EX_TEMPFAIL,
    EX_UNAVAILABLE,
    EX_USAGE,
    RETRY_CAUSES,
    ClientNotReading,
    Denied,
    FdbrokerError,
    LinkViolation,
    NoSuchResource,
    NotWhatItWas,
    OpenFailed,
    QuotaExceeded,
    RateLimited,
    Refused,
)

__all__ = [
    "ADMIN_REFUSALS",
    "EX_CONFIG",
    "EX_DATAERR",
    "EX_IOERR",
    "EX_NOINPUT",
    "EX_NOPERM",
    "EX_OK",
    "EX_OSERR",
    "EX_PROTOCOL",
    "EX_SOFTWARE",
    "EX_TEMPFAIL",
    "EX_UNAVAILABLE",
    "EX_USAGE",
    "MESSAGE_REFUSALS",
    "NOT_RELOADED",
    "REFUSALS",
    "RETRY_CAUSES",
    "BrokerUnavailable",
    "ClientNotReading",
    "Denied",
    "DescriptorsRefused",
    "FdbrokerError",
    "Finding",
    "LinkViolation",
    "MessageTooLong",
    "NoSuchRecipient",
    "NoSuchResource",
    "NotWhatItWas",
    "OpenFailed",
    "PolicyBroken",
    "PolicyError",
    "ProtocolViolation",
    "QueueFull",
    "QuotaExceeded",
    "RateLimited",
    "Refused",
    "RestartNeeded",
    "TopicDenied",
]


NOT_RELOADED = "the policy is NOT reloaded, the old one stays in force"  # in the log, and for who asked


class Finding(NamedTuple):
    """One thing that is wrong in a policy file; `line` and `column` count from 1, 0 for the whole of it."""

    file: str
    line: int
    column: int
    what: str
    expected: str = ""
    found: str = ""
    hint: str = ""

    def __str__(self) -> str:
        place = ":".join([self.file, *(str(number) for number in (self.line, self.column) if number)])
        return f"{place}: {self.text}"

    @property
    def text(self) -> str:
        """All but the place."""
        text = self.what
        if self.expected:
            text += f", expected {self.expected}"
        if self.found:
            text += f", found {self.found}"
        if self.hint:
            text += f"; {self.hint}"
        return text


class ProtocolViolation(FdbrokerError):
    """The peer broke the wire's rules; the connection ends and nothing more is read from it."""

    exit_code = EX_DATAERR


class BrokerUnavailable(FdbrokerError):
    """Nobody answers at the broker's address, or the connection was lost. The client is no longer usable."""

    exit_code = EX_UNAVAILABLE


class RestartNeeded(FdbrokerError):
    """A new policy needs a right that the opener gave up when it started; the old policy stays in force."""

    exit_code = EX_CONFIG


class PolicyBroken(Refused):
    """The broker's policy has an error, so it lets nobody in. The connection is closed after this answer."""

    wire_name, errno, exit_code = "PolicyBroken", errno.EAGAIN, EX_TEMPFAIL
    cause = "policy broken"

    def __init__(self) -> None:
        super().__init__(
            "the broker's policy has an error, so it lets nobody in: an admin finds the error with "
            "`fdbroker policy check` and `journalctl -u fdbroker`, and mends it; then try again"
        )


class PolicyError(FdbrokerError):
    """A policy cannot be used. `findings` holds everything that is wrong with it, in order of file and line."""

    exit_code = EX_CONFIG

    def __init__(self, findings: list[Finding]) -> None:
        super().__init__("\n".join(map(str, findings)))
        self.findings = findings


class QueueFull(QuotaExceeded):
    """What the user has sent and others have not yet acknowledged is at its maximum, or no more can be stored."""

    errno = errno.ENOSPC


class TopicDenied(Refused):
    """No rule allows to send to, or to subscribe to, that topic. The same answer whether it exists or not."""

    wire_name, errno, exit_code = "Denied", errno.EACCES, EX_NOPERM
    cause, said = "policy", (("topic", "topic", str),)

    def __init__(self, topic: str) -> None:
        super().__init__(f"topic {topic}: denied: no rule of the policy allows it")
        self.topic = topic


class MessageTooLong(Refused):
    """The message is longer than its topic allows; `maximum` is in bytes."""

    wire_name, errno, exit_code = "TooLong", errno.EMSGSIZE, EX_DATAERR
    cause, said = "too long", (("maximum", "maximum", int),)

    def __init__(self, maximum: int) -> None:
        super().__init__(f"the message is longer than the topic allows: at most {maximum} bytes")
        self.maximum = maximum


class DescriptorsRefused(Refused):
    """The descriptors that came with a message cannot go with it; `reason` says why."""

    wire_name, errno, exit_code = "DescriptorsRefused", errno.EOPNOTSUPP, EX_DATAERR
    cause, said = "descriptors", (("reason", "reason", str),)

    def __init__(self, reason: str) -> None:
        super().__init__(f"the descriptors cannot go with the message: {reason}")
        self.reason = reason


class NoSuchRecipient(Refused):
    """`to` names nobody who may subscribe to the topic."""

    wire_name, errno, exit_code = "NoSuchRecipient", errno.ENXIO, EX_DATAERR
    cause, said = "no recipient", (("to", "to", str),)

    def __init__(self, to: str) -> None:
        super().__init__(f"{to}: no user of that name or number may subscribe to the topic")
        self.to = to


# by their wire names: those of io.fdbroker.Broker, and those of io.fdbroker.Inbox
REFUSALS: dict[str, type[Refused]] = {
    kind.wire_name: kind
    for kind in (
        *(Denied, NoSuchResource, NotWhatItWas, OpenFailed, QuotaExceeded, RateLimited, ClientNotReading),
        PolicyBroken,
    )
}
MESSAGE_REFUSALS: dict[str, type[Refused]] = {
    kind.wire_name: kind
    for kind in (TopicDenied, MessageTooLong, DescriptorsRefused, NoSuchRecipient, QuotaExceeded, RateLimited)
}
ADMIN_REFUSALS: dict[str, type[Refused]] = {kind.wire_name: kind for kind in (Denied, RateLimited)}
