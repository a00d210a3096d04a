"""The client's half of the protocol: calls to bytes, bytes and descriptors to answers. No I/O.

Runs in: any program. What it reads comes from the broker; a broker that breaks the rules gets ProtocolViolation.
"""

from __future__ import annotations

import base64
import contextlib
import os
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from fdbroker import limits
from fdbroker.client.descriptor import Descriptor
from fdbroker.errors import (
    MESSAGE_REFUSALS,
    REFUSALS,
    ClientNotReading,
    Denied,
    FdbrokerError,
    MessageTooLong,
    NoSuchResource,
    NotWhatItWas,
    OpenFailed,
    ProtocolViolation,
    QuotaExceeded,
    RateLimited,
    Refused,
    TopicDenied,
)
from fdbroker.terms import ACCESS_NAMES, Offer, Resource, parse
from fdbroker.wire import varlink
from fdbroker.wire.resources import WrongMember, from_json, to_json

DEFAULT_ADDRESS = "/run/fdbroker/socket"
# A listing is at most OFFERS names of 4 KiB; everything else is far smaller.
REPLY_BYTES = 32 * 1024 * 1024
# SCM_MAX_FD: the most descriptors that one message carries
DESCRIPTORS_PER_READ = 253
_BROKER = "io.fdbroker.Broker"
_INBOX = "io.fdbroker.Inbox"
_REFUSALS = {_BROKER: REFUSALS, _INBOX: MESSAGE_REFUSALS}
_TEXTS: dict[type[Refused], str] = {
    Denied: "denied: no rule of the policy allows it, or a deny rule forbids it",
    NoSuchResource: "the policy allows it, and it is not there now",
}


class CallFailed(FdbrokerError):
    """The broker answered with an error that this library does not know; `name` is the full Varlink name."""

    def __init__(self, name: str, parameters: Mapping[str, Any]) -> None:
        super().__init__(f"{name} {dict(parameters)}")
        self.name = name
        self.parameters = dict(parameters)


def address(given: str | None, environment: Mapping[str, str]) -> str:
    """Where the broker is: what was given, else `$FDBROKER_SOCKET`, else the default."""
    return given or environment.get("FDBROKER_SOCKET") or DEFAULT_ADDRESS


def asked(texts: Iterable[str], access: str) -> list[Resource]:
    """What these words ask for. Raises ValueError for an unknown access or kind, none, or over 64 of them."""
    if access not in ACCESS_NAMES:
        raise ValueError(f"access is one of {', '.join(ACCESS_NAMES)}, not {access!r}")
    resources = [parse(text, access) for text in texts]
    if not 1 <= len(resources) <= limits.RESOURCES_PER_OPEN:
        raise ValueError(f"1 to {limits.RESOURCES_PER_OPEN} resources at once, not {len(resources)}")
    return resources


def open_call(resources: Iterable[Resource]) -> bytes:
    """The bytes of Open. Raises ValueError when they are over 64 KiB."""
    return varlink.encode_call(f"{_BROKER}.Open", {"resources": list(map(to_json, resources))})


def list_call(*, more: bool) -> bytes:
    """The bytes of List; with `more` the list comes again after each change."""
    return varlink.encode_call(f"{_BROKER}.List", {}, more=more)


class Message(NamedTuple):
    """A message as it was received: who sent it, when (microseconds since 1970), and how many were lost before it.

    `payload` is the bytes that were sent; `uid`, `gid`, `pid` and `session` are the kernel's and logind's word.
    """

    number: int
    topic: str
    uid: int
    gid: int
    pid: int
    session: str
    time_us: int
    payload: bytes
    lost: int


def send_call(topic: str, payload: str | bytes) -> bytes:
    """The bytes of Send. Raises ValueError when the message is too long for the wire."""
    if isinstance(payload, str):
        return varlink.encode_call(f"{_INBOX}.Send", {"topic": topic, "payload": payload})
    text = base64.b64encode(payload).decode()
    return varlink.encode_call(f"{_INBOX}.Send", {"topic": topic, "payload": text, "encoding": "base64"})


def subscribe_call(topics: Sequence[str]) -> bytes:
    """The bytes of Subscribe."""
    return varlink.encode_call(f"{_INBOX}.Subscribe", {"topics": list(topics)}, more=True)


def message(reply: varlink.Reply) -> Message:
    """One reply to Subscribe. Raises ProtocolViolation."""
    try:
        said = reply.parameters["message"]
        payload = str(said["payload"])
        return Message(
            *(int(said["number"]), str(said["topic"]), int(said["uid"]), int(said["gid"]), int(said["pid"])),
            *(str(said.get("session") or ""), int(said["time"])),
            base64.b64decode(payload, validate=True) if said["encoding"] == "base64" else payload.encode(),
            int(said.get("lost") or 0),
        )
    except (LookupError, TypeError, ValueError) as error:
        raise ProtocolViolation(f"a reply to Subscribe that is none: {error}") from None


def refusal(error: str, parameters: Mapping[str, Any]) -> FdbrokerError:
    """The exception for an error reply."""
    interface, _, name = error.rpartition(".")
    kind = _REFUSALS.get(interface, {}).get(name)
    if kind is None:
        return CallFailed(error, parameters)
    made: Refused
    if kind is NotWhatItWas:
        made = NotWhatItWas(str(parameters.get("reason", "")))
    elif kind is OpenFailed:
        made = OpenFailed(_integer(parameters, "errno"))
    elif kind is QuotaExceeded:
        made = QuotaExceeded(str(parameters.get("limit", "")), _integer(parameters, "maximum"))
    elif kind is RateLimited:
        made = RateLimited(_integer(parameters, "retryAfterMilliseconds"))
    elif kind is ClientNotReading:
        made = ClientNotReading()
    elif kind is TopicDenied:
        made = TopicDenied(str(parameters.get("topic", "")))
    elif kind is MessageTooLong:
        made = MessageTooLong(_integer(parameters, "maximum"))
    else:
        made = kind(_TEXTS[kind])
    resource = parameters.get("resource")
    if isinstance(resource, dict):
        with contextlib.suppress(WrongMember):  # a broker that says more than we know: the error alone
            made.args = (f"{from_json(resource).text}: {made}",)
    return made


def _integer(parameters: Mapping[str, Any], name: str) -> int:
    value = parameters.get(name)
    return value if isinstance(value, int) else 0


def answer(reply: varlink.Reply) -> varlink.Reply:
    """The reply itself. Raises the exception of an error reply."""
    if reply.error:
        raise refusal(reply.error, reply.parameters)
    return reply


def count_grants(reply: varlink.Reply) -> int:
    """How many descriptors a reply owns."""
    grants = reply.parameters.get("grants", [])
    return len(grants) if isinstance(grants, list) and not reply.error else 0


def opened(reply: varlink.Reply, numbers: list[int], resources: Sequence[Resource]) -> list[Descriptor]:
    """The grants of Open's reply as owned descriptors, in the order of `resources`; takes `numbers`.

    Raises ProtocolViolation, with every descriptor of this reply closed, when the reply is not what was asked for.
    """
    made: list[Descriptor] = []
    try:
        grants = reply.parameters["grants"]
        count = len(resources)
        if len(grants) != count or len(numbers) != count:
            raise ProtocolViolation(f"{len(grants)} grants and {len(numbers)} descriptors, {count} were asked for")
        for grant, resource in zip(grants, resources, strict=True):
            said = from_json(grant["resource"])
            index = grant["fileDescriptor"]
            if not isinstance(index, int) or not 0 <= index < len(numbers) or numbers[index] < 0:
                raise ProtocolViolation(f"descriptor {index!r} is not there")
            if said != resource:
                raise ProtocolViolation(f"{said.text!r} in place of {resource.text!r}")
            access, rule, rdev, usable, why = _said(grant)
            number, numbers[index] = numbers[index], -1
            made.append(Descriptor(number, resource.text, access, rule, rdev, usable=usable, why=why))
    except (ProtocolViolation, LookupError, TypeError, WrongMember) as error:
        for descriptor in made:
            descriptor.close()
        close_all(numbers)
        raise ProtocolViolation(f"a reply to Open that does not fit its descriptors: {error}") from None
    return made


def _said(grant: dict[str, Any]) -> tuple[str, str, str, bool | None, str]:
    usable = grant.get("usable")
    if not isinstance(usable, bool | None):
        raise ProtocolViolation("usable is a boolean")
    return str(grant["access"]), str(grant["rule"]), str(grant.get("rdev") or ""), usable, str(grant.get("why") or "")


def offered(reply: varlink.Reply) -> list[Offer]:
    """The offers of List's reply. Raises ProtocolViolation."""
    try:
        return [Offer(from_json(one["resource"]), str(one["rule"])) for one in reply.parameters["resources"]]
    except (LookupError, TypeError, WrongMember) as error:
        raise ProtocolViolation(f"a reply to List that is none: {error}") from None


def close_all(numbers: Iterable[int]) -> None:
    """Close these descriptors; negative numbers are left out."""
    for number in numbers:
        if number >= 0:
            os.close(number)


class Replies:
    """Bytes and descriptors in, replies out, each with the descriptors that it owns.

    Bytes that were sent before a message with descriptors can arrive together with it, so received descriptors wait
    in a FIFO and each reply takes as many as it says. After ProtocolViolation it must be closed.
    """

    def __init__(self) -> None:
        self._reader = varlink.VarlinkReader(REPLY_BYTES)
        self._descriptors: deque[int] = deque()

    def feed(self, data: bytes, descriptors: Iterable[int]) -> None:
        """Add what arrived; takes the descriptors."""
        self._descriptors.extend(descriptors)
        self._reader.feed(data)

    def next_reply(self) -> varlink.Reply | None:
        """The next whole reply, or None until more arrives. Raises ProtocolViolation."""
        message = self._reader.next_message()
        return None if message is None else varlink.decode_reply(message)

    def take(self, count: int) -> list[int]:
        """The next `count` descriptors, now the caller's. Raises ProtocolViolation when fewer came."""
        if len(self._descriptors) < count:
            raise ProtocolViolation(f"a reply with {count} descriptors, and {len(self._descriptors)} came")
        return [self._descriptors.popleft() for _ in range(count)]

    @property
    def spent(self) -> bool:
        """Whether nothing waits: what is left once every call has its answer belongs to none."""
        return not self._descriptors and not self._reader.partial

    def close(self) -> None:
        """Close the descriptors that no reply has taken."""
        close_all(self._descriptors)
        self._descriptors.clear()
