"""What the broker answers instead of a descriptor, and how its processes break with each other.

Runs in: every process; imports nothing of ours. An expected outcome has one wire name, one errno, one exit code, and
what its answer says beside the name, all in the class that stands for it: whoever writes or reads it goes by that.
"""

from __future__ import annotations

import errno
from typing import ClassVar

# sysexits.h, as far as the command line uses it
EX_OK, EX_USAGE, EX_DATAERR, EX_NOINPUT, EX_UNAVAILABLE, EX_SOFTWARE = 0, 64, 65, 66, 69, 70
EX_OSERR, EX_IOERR, EX_TEMPFAIL, EX_PROTOCOL, EX_NOPERM, EX_CONFIG = 71, 74, 75, 76, 77, 78


class FdbrokerError(Exception):
    """Base of all that this package raises by itself."""

    exit_code: int = EX_SOFTWARE


class LinkViolation(FdbrokerError):
    """One of our own processes sent another what it must not: the service ends, for it may be taken over."""


# Why a request can pass later, in the words of a record.
RETRY_CAUSES = {
    "rate": "too many requests",
    "records": "too many records of this owner",
    "journal": "the journal takes no record now",
    "in flight": "too many descriptors are on their way to others",
    "busy": "the owner's requests before it are not done",
    "unknown": "not now: too many requests, or the broker has no room",
}


class Refused(FdbrokerError):
    """A request that is answered with an error. The connection stays usable unless the class says otherwise.

    `wire_name` is the Varlink error's name below its interface, `errno` what the inbox framing would answer. `said` are
    the arguments that it is made of, of which at most one is a number and one a text: the attribute, the parameter's
    name on the wire, "" for what clients are not told, and the type. `of_resource`: the answer names a resource.
    `index` is the position of the refused resource in the request; None where the request as a whole is meant.
    `cause` is the reason in one or two words, for the record alone: several causes can have one name on the wire.
    `offends`: the client asked too often or too much, and is served more slowly if others wait.
    """

    wire_name: ClassVar[str]
    errno: ClassVar[int]
    said: ClassVar[tuple[tuple[str, str, type[int | str]], ...]] = ()
    of_resource = False
    index: int | None
    cause: str
    offends = False

    def __init__(self, message: str, *, index: int | None = None) -> None:
        super().__init__(message)
        self.index = index


class Denied(Refused):
    """No rule allows it, or a deny rule forbids it. The same answer whether the path exists or not."""

    wire_name, errno, exit_code = "Denied", errno.EACCES, EX_NOPERM
    cause, of_resource = "policy", True

    def __init__(self, message: str = "no rule allows it", *, index: int | None = None, rule: str = "") -> None:
        super().__init__(message, index=index)
        self.rule = rule  # FILE:LINE of the deny rule, for the record only: the client is not told


class NoSuchResource(Refused):
    """The policy allows it, and it is not there now."""

    wire_name, errno, exit_code = "NoSuchResource", errno.ENOENT, EX_NOINPUT
    cause, of_resource = "not there", True

    def __init__(self, message: str = "it is not there now", *, index: int | None = None) -> None:
        super().__init__(message, index=index)


class NotWhatItWas(Refused):
    """The node that was found is not what the rule says: its type, number, class, or the links that led to it."""

    wire_name, errno, exit_code = "NotWhatItWas", errno.ENODEV, EX_PROTOCOL
    cause, of_resource = "not what the rule says", True
    said = (("reason", "reason", str),)

    def __init__(self, reason: str, *, index: int | None = None) -> None:
        super().__init__(f"not what the policy names: {reason}", index=index)
        self.reason = reason


class OpenFailed(Refused):
    """The kernel or the driver refused to open or to make what is allowed; `number` is its errno, e.g. EBUSY.

    `rdev` is the device number, "" where who is told does not know it.
    """

    wire_name, errno, exit_code = "OpenFailed", errno.EIO, EX_IOERR
    cause, of_resource = "kernel", True
    said = (("number", "errno", int),)

    def __init__(self, number: int, *, index: int | None = None, rdev: str = "") -> None:
        name = errno.errorcode.get(number, str(number))
        if number in (errno.ENODEV, errno.ENXIO):
            name += f": no driver is loaded for {rdev or 'its number'}, or the device behind it is gone"
            self.exit_code = EX_TEMPFAIL  # it may come
        super().__init__(f"it could not be opened: {name}", index=index)
        self.number = number


class QuotaExceeded(Refused):
    """A limit is reached; `limit` is its name in the policy, or descriptors, or reply_bytes, `maximum` its value."""

    wire_name, errno, exit_code = "QuotaExceeded", errno.EDQUOT, EX_TEMPFAIL
    said = (("limit", "limit", str), ("maximum", "maximum", int))

    def __init__(self, limit: str, maximum: int) -> None:
        super().__init__(f"limit {limit} is reached, maximum {maximum}")
        self.limit = limit
        self.maximum = maximum
        self.cause = f"limit {limit}"


class RateLimited(Refused):
    """Not now; the same request may pass after `retry_after_ms` milliseconds.

    `cause` is one of RETRY_CAUSES; the client is not told which: most say something of other users.
    """

    wire_name, errno, exit_code = "RateLimited", errno.EAGAIN, EX_TEMPFAIL
    said = (("retry_after_ms", "retryAfterMilliseconds", int), ("cause", "", str))

    def __init__(self, retry_after_ms: int, cause: str = "unknown") -> None:
        super().__init__(f"{RETRY_CAUSES[cause]}, try again in {retry_after_ms} ms")
        self.retry_after_ms = retry_after_ms
        self.cause = cause
        self.offends = cause not in ("journal", "in flight")  # which are others' doing


class ClientNotReading(Refused):
    """Too many grants wait unread on this connection, which is closed after this answer."""

    wire_name, errno, exit_code = "ClientNotReading", errno.EAGAIN, EX_TEMPFAIL
    cause = "unread grants"
    offends = True

    def __init__(self) -> None:
        super().__init__("too many grants wait unread; the connection is closed")
