"""Every error that leaves a module: what the peer broke, what was refused, what is wrong with a policy.

Runs in: every process; imports nothing of ours. An expected outcome has one wire name, one errno and one exit code,
all in the class that stands for it. The kernel's OSError stays OSError.
"""

from __future__ import annotations

import errno
from typing import ClassVar, NamedTuple

# sysexits.h, as far as the command line uses it
EX_OK, EX_USAGE, EX_DATAERR, EX_UNAVAILABLE, EX_SOFTWARE = 0, 64, 65, 69, 70
EX_OSERR, EX_TEMPFAIL, EX_NOPERM, EX_CONFIG = 71, 75, 77, 78


class FdbrokerError(Exception):
    """Base of all that this package raises by itself."""

    exit_code: ClassVar[int] = EX_SOFTWARE


class ProtocolViolation(FdbrokerError):
    """The peer broke the wire's rules; the connection ends and nothing more is read from it."""

    exit_code = EX_DATAERR


class LinkViolation(FdbrokerError):
    """One of our own processes sent another what it must not: the service ends, for it may be taken over."""


class BrokerUnavailable(FdbrokerError):
    """Nobody answers at the broker's address, or the connection was lost. The client is no longer usable."""

    exit_code = EX_UNAVAILABLE


class RestartNeeded(FdbrokerError):
    """A new policy needs a right that the opener gave up when it started; the old policy stays in force."""

    exit_code = EX_CONFIG


class Finding(NamedTuple):
    """One thing that is wrong in a policy file; `line` and `column` count from 1, 0 for the file as a whole."""

    file: str
    line: int
    column: int
    what: str
    expected: str = ""
    found: str = ""
    hint: str = ""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}:{self.column}" if self.line else self.file
        text = f"{place}: {self.what}"
        if self.expected:
            text += f", expected {self.expected}"
        if self.found:
            text += f", found {self.found}"
        if self.hint:
            text += f"; {self.hint}"
        return text


class PolicyError(FdbrokerError):
    """A policy cannot be used. `findings` holds everything that is wrong with it, in order of file and line."""

    exit_code = EX_CONFIG

    def __init__(self, findings: list[Finding]) -> None:
        super().__init__("\n".join(map(str, findings)))
        self.findings = findings


class Refused(FdbrokerError):
    """A request that is answered with an error. The connection stays usable unless the class says otherwise.

    `wire_name` is the Varlink error's name below its interface, `errno` what the inbox framing would answer.
    `index` is the position of the refused resource in the request; None where the request as a whole is meant.
    """

    wire_name: ClassVar[str]
    errno: ClassVar[int]
    index: int | None

    def __init__(self, message: str, *, index: int | None = None) -> None:
        super().__init__(message)
        self.index = index


class Denied(Refused):
    """No rule allows it, or a deny rule forbids it. The same answer whether the path exists or not."""

    wire_name, errno, exit_code = "Denied", errno.EACCES, EX_NOPERM

    def __init__(self, message: str, *, index: int | None = None, rule: str = "") -> None:
        super().__init__(message, index=index)
        self.rule = rule  # FILE:LINE of the deny rule, for the record only: the client is not told


class NoSuchResource(Refused):
    """The policy allows it, and it is not there now."""

    wire_name, errno, exit_code = "NoSuchResource", errno.ENOENT, EX_TEMPFAIL


class NotWhatItWas(Refused):
    """The node that was found is not what the rule says: its type, number, class, or the links that led to it."""

    wire_name, errno, exit_code = "NotWhatItWas", errno.ENODEV, EX_NOPERM

    def __init__(self, reason: str, *, index: int | None = None) -> None:
        super().__init__(f"not what the policy names: {reason}", index=index)
        self.reason = reason


class OpenFailed(Refused):
    """The kernel or the driver refused to open or to make what is allowed; `number` is its errno, e.g. EBUSY."""

    wire_name, errno, exit_code = "OpenFailed", errno.EIO, EX_TEMPFAIL

    def __init__(self, number: int, *, index: int | None = None) -> None:
        name = errno.errorcode.get(number, str(number))
        super().__init__(f"it could not be opened: {name}", index=index)
        self.number = number


class QuotaExceeded(Refused):
    """A limit is reached; `limit` is its name in the policy, or descriptors, or reply_bytes, `maximum` its value."""

    wire_name, errno, exit_code = "QuotaExceeded", errno.EDQUOT, EX_TEMPFAIL

    def __init__(self, limit: str, maximum: int) -> None:
        super().__init__(f"limit {limit} is reached, maximum {maximum}")
        self.limit = limit
        self.maximum = maximum


class RateLimited(Refused):
    """Too many requests by this user; the same request may pass after `retry_after_ms` milliseconds."""

    wire_name, errno, exit_code = "RateLimited", errno.EAGAIN, EX_TEMPFAIL

    def __init__(self, retry_after_ms: int) -> None:
        super().__init__(f"too many requests, try again in {retry_after_ms} ms")
        self.retry_after_ms = retry_after_ms


class ClientNotReading(Refused):
    """Too many grants wait unread on this connection, which is closed after this answer."""

    wire_name, errno, exit_code = "ClientNotReading", errno.EAGAIN, EX_TEMPFAIL

    def __init__(self) -> None:
        super().__init__("too many grants wait unread; the connection is closed")


class QueueFull(QuotaExceeded):
    """What the user has sent and others have not yet acknowledged is at its maximum, or no more can be stored."""

    errno = errno.ENOSPC


class TopicDenied(Refused):
    """No rule allows to send to, or to subscribe to, that topic. The same answer whether it exists or not."""

    wire_name, errno, exit_code = "Denied", errno.EACCES, EX_NOPERM

    def __init__(self, topic: str) -> None:
        super().__init__(f"topic {topic}: denied: no rule of the policy allows it")
        self.topic = topic


class MessageTooLong(Refused):
    """The message is longer than its topic allows; `maximum` is in bytes."""

    wire_name, errno, exit_code = "TooLong", errno.EMSGSIZE, EX_DATAERR

    def __init__(self, maximum: int) -> None:
        super().__init__(f"the message is longer than the topic allows: at most {maximum} bytes")
        self.maximum = maximum


class DescriptorsRefused(Refused):
    """The descriptors that came with a message cannot go with it; `reason` says why."""

    wire_name, errno, exit_code = "DescriptorsRefused", errno.EOPNOTSUPP, EX_DATAERR

    def __init__(self, reason: str) -> None:
        super().__init__(f"the descriptors cannot go with the message: {reason}")
        self.reason = reason


class NoSuchRecipient(Refused):
    """`to` names nobody who may subscribe to the topic."""

    wire_name, errno, exit_code = "NoSuchRecipient", errno.ENXIO, EX_DATAERR

    def __init__(self, to: str) -> None:
        super().__init__(f"{to}: no user of that name or number may subscribe to the topic")
        self.to = to


# by their wire names: those of io.fdbroker.Broker, and those of io.fdbroker.Inbox
REFUSALS: dict[str, type[Refused]] = {
    kind.wire_name: kind
    for kind in (Denied, NoSuchResource, NotWhatItWas, OpenFailed, QuotaExceeded, RateLimited, ClientNotReading)
}
MESSAGE_REFUSALS: dict[str, type[Refused]] = {
    kind.wire_name: kind
    for kind in (TopicDenied, MessageTooLong, DescriptorsRefused, NoSuchRecipient, QuotaExceeded, RateLimited)
}
