"""The client's half of the protocol: calls to bytes, bytes and descriptors to answers. No I/O.

Runs in: any program. What it reads comes from the broker; a broker that breaks the rules gets ProtocolViolation.
"""

from __future__ import annotations

import base64
import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

from fdbroker.client import closing
from fdbroker.client.descriptor import Descriptor, close_together
from fdbroker.errors import (
    ADMIN_REFUSALS,
    MESSAGE_REFUSALS,
    REFUSALS,
    Denied,
    FdbrokerError,
    Finding,
    NoSuchResource,
    ProtocolViolation,
    Refused,
)
from fdbroker.limits import opener as limits
from fdbroker.limits.inbox import ACKNOWLEDGED
from fdbroker.offers import Offer
from fdbroker.terms import ACCESS_NAMES, INVALID_ID, OTHERS, Resource
from fdbroker.typed import parse
from fdbroker.wire import frame, varlink
from fdbroker.wire.asked import WrongMember, from_json
from fdbroker.wire.resources import to_json

DEFAULT_ADDRESS = "/run/fdbroker/socket"
# SCM_MAX_FD: the most descriptors that one message carries
DESCRIPTORS_PER_READ = 253
_BROKER = "io.fdbroker.Broker"
_INBOX = "io.fdbroker.Inbox"
_NUMBER_MAX = (1 << 63) - 1  # of messages, and what counts them
_ADMIN = "io.fdbroker.Admin"
_REFUSALS = {_BROKER: REFUSALS, _INBOX: MESSAGE_REFUSALS, _ADMIN: ADMIN_REFUSALS}
_PONG = frame.encode_frame(frame.PONG)
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


# A resource as text, with an access of its own, or without one: then one access is meant for all of these.
Asked = str | tuple[str, str]


def asked(texts: Iterable[Asked], access: str) -> list[Resource]:
    """What these words ask for. Raises ValueError for an unknown access or kind, none, or over 64 of them."""
    resources = []
    for text, wanted in ((one, access) if isinstance(one, str) else one for one in texts):
        if wanted not in ACCESS_NAMES:
            raise ValueError(f"access is one of {', '.join(ACCESS_NAMES)}, not {wanted!r}")
        resources.append(parse(text, wanted))
    if not 1 <= len(resources) <= limits.RESOURCES_PER_OPEN:
        raise ValueError(f"1 to {limits.RESOURCES_PER_OPEN} resources at once, not {len(resources)}")
    return resources


def open_call(resources: Iterable[Resource]) -> bytes:
    """The bytes of Open. Raises ValueError when they are over 64 KiB."""
    return varlink.encode_call(f"{_BROKER}.Open", {"resources": list(map(to_json, resources))})


def list_call(*, more: bool) -> bytes:
    """The bytes of List; with `more` the list comes again after each change."""
    return varlink.encode_call(f"{_BROKER}.List", {}, more=more)


class About(NamedTuple):
    """Which policy is in force: `digest` is policy/load.py's of its files, `loaded_us` microseconds since 1970."""

    version: str
    generation: int
    digest: str
    loaded_us: int


def about_call() -> bytes:
    """The bytes of About."""
    return varlink.encode_call(f"{_BROKER}.About", {})


def reload_call() -> bytes:
    """The bytes of Reload."""
    return varlink.encode_call(f"{_ADMIN}.Reload", {})


class Message(NamedTuple):
    """A message as it was received: who sent it, when (microseconds since 1970), and how many were lost before it.

    `payload` is the bytes that were sent; `uid`, `gid`, `pid` and `session` are the kernel's and logind's word.
    `owner` is the user behind the uid, mostly the same; 4294967295 where the broker does not know the user. A large
    payload is not there but in `file`, a memfd that nobody can change; `read` gives it either way. `descriptors` were
    sent along. The receiver owns these and `file`: `close` the message, or leave its `with` block.
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
    file: Descriptor | None = None
    descriptors: tuple[Descriptor, ...] = ()
    owner: int = OTHERS

    def read(self, maximum: int | None = None) -> bytes:
        """The payload, wherever it is, or its first `maximum` bytes."""
        if self.file is None:
            return self.payload[:maximum]
        number = self.file.fileno()
        return os.pread(number, os.fstat(number).st_size if maximum is None else maximum, 0)

    def close(self) -> None:
        """Close what came with it; what was detached is not."""
        close_together([*self.descriptors, *([self.file] if self.file is not None else [])])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def send_call(topic: str, payload: str | bytes | None, to: str | int | None, others: int) -> bytes:
    """The bytes of Send, with which `others` descriptors go; without `payload` a memfd that has it is before them.

    Raises ValueError when the message is too long for the wire: then it must be without.
    """
    parameters: dict[str, Any] = {"topic": topic}
    if to is not None:
        parameters["to"] = str(to)
    if payload is None:
        parameters["fileDescriptor"] = 0
    elif isinstance(payload, str):
        parameters["payload"] = payload
    else:
        try:
            parameters["payload"] = payload.decode()
        except UnicodeDecodeError:
            parameters |= {"payload": base64.b64encode(payload).decode(), "encoding": "base64"}
    if others:
        first = 1 if payload is None else 0
        parameters["fileDescriptors"] = list(range(first, first + others))
    return varlink.encode_call(f"{_INBOX}.Send", parameters)


def probe_call(topic: str) -> bytes:
    """The bytes of a Send that is never delivered: its answer is TopicDenied, or else NoSuchRecipient.

    The kernel says EPERM to a client that sends descriptors and may send to no topic (SO_PASSRIGHTS, Linux 6.16), and
    may say EPERM for other reasons. This call finds out which it was, as no user has the number (uid_t)-1.
    """
    return varlink.encode_call(f"{_INBOX}.Send", {"topic": topic, "payload": "", "to": str(INVALID_ID)})


def _check_numbers(name: str, *numbers: int) -> None:
    """Raises ValueError for a value that is not a message number."""
    for number in numbers:
        if not 0 <= number <= _NUMBER_MAX:
            raise ValueError(f"{name} is {number}, must be a number of 0 to {_NUMBER_MAX}")


def subscribe_call(topics: Sequence[str], after: int | None) -> bytes:
    """The bytes of Subscribe. Raises ValueError for an `after` that is not a message number."""
    parameters: dict[str, Any] = {"topics": list(topics)}
    if after is not None:
        _check_numbers("after", after)
        parameters["after"] = after
    return varlink.encode_call(f"{_INBOX}.Subscribe", parameters, more=True)


def receive_call(maximum: int, acknowledge: Iterable[int]) -> bytes:
    """The bytes of Receive. Raises ValueError for values that are not message numbers, and for over ACKNOWLEDGED."""
    numbers = list(acknowledge)
    _check_numbers("maximum", maximum)
    _check_numbers("acknowledge", *numbers)
    if len(numbers) > ACKNOWLEDGED:
        raise ValueError(f"{len(numbers)} numbers are acknowledged, at most {ACKNOWLEDGED} in one call")
    return varlink.encode_call(f"{_INBOX}.Receive", {"maximum": maximum, "acknowledge": numbers})


def messages(reply: varlink.Reply) -> list[Message]:
    """The reply to Receive. Raises ProtocolViolation."""
    found = reply.parameters.get("messages")
    if not isinstance(found, list):
        raise ProtocolViolation("a reply to Receive that is none")
    return [message(one, []) for one in found]


def message(said: Any, numbers: list[int]) -> Message:
    """A message of a reply; takes `numbers`, its descriptors. Raises ProtocolViolation, and they are closed."""
    owned = [Descriptor(number, "message", "", "", sender=_sender(said)) for number in numbers]
    try:
        indexes, file = list(said.get("fileDescriptors") or ()), said.get("fileDescriptor")
        if sorted(indexes if file is None else [file, *indexes]) != list(range(len(owned))):
            raise ValueError(f"{len(owned)} descriptors, not those that it names")
        payload = str(said["payload"])
        return Message(
            *(int(said["number"]), str(said["topic"]), int(said["uid"]), int(said["gid"]), int(said["pid"])),
            *(str(said.get("session") or ""), int(said["time"])),
            base64.b64decode(payload, validate=True) if said["encoding"] == "base64" else payload.encode(),
            int(said.get("lost") or 0),
            None if file is None else owned[file],
            tuple(owned[index] for index in indexes),
            int(said.get("owner", said["uid"])),
        )
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        for descriptor in owned:
            descriptor.close()
        raise ProtocolViolation(f"a message that is none: {error}") from None


def _sender(said: Any) -> int:
    """The user who sent a message; OTHERS where it does not say."""
    owner = said.get("owner", said.get("uid")) if isinstance(said, dict) else None
    return owner if isinstance(owner, int) else OTHERS


def refusal(error: str, parameters: Mapping[str, Any]) -> FdbrokerError:
    """The exception for an error reply."""
    interface, _, name = error.rpartition(".")
    kind = _REFUSALS.get(interface, {}).get(name)
    if kind is None:
        return CallFailed(error, parameters)
    if interface == _ADMIN and kind is Denied:
        said: list[Any] = ["denied: that is for those whom the policy's `administrators` names"]
    elif kind in _TEXTS:
        said = [_TEXTS[kind]]
    else:
        said = [_value(parameters.get(name), of) for _, name, of in kind.said if name]
    made = kind(*said)
    resource = parameters.get("resource")
    if isinstance(resource, dict):
        with contextlib.suppress(WrongMember):  # a broker that says more than we know: the error alone
            made.args = (f"{from_json(resource).text}: {made}",)
    return made


def _value(value: Any, kind: type[int | str]) -> int | str:
    return value if isinstance(value, kind) else kind()


def answer(reply: varlink.Reply) -> varlink.Reply:
    """The reply itself. Raises the exception of an error reply."""
    if reply.error:
        raise refusal(reply.error, reply.parameters)
    return reply


def is_pong(received: bytes) -> bool:
    """Whether `received`, all bytes since PING was sent, are the whole answer; false while more must come.

    A client that is turned away gets a Varlink error, whatever protocol it speaks. No frame begins with the first
    byte of that error. Raises the error, or ProtocolViolation when the bytes are no answer of a broker.
    """
    if received.startswith(b"{"):
        reader = varlink.VarlinkReader()
        reader.feed(received)
        message = reader.next_message()
        if message is None:
            return False
        answer(varlink.decode_reply(message))
    if not _PONG.startswith(received):
        raise ProtocolViolation("the program at that address is no fdbroker")
    return received == _PONG


def count_descriptors(reply: varlink.Reply) -> int:
    """How many descriptors a reply owns: one for each grant of Open, and what a message says."""
    if reply.error:
        return 0
    grants, message = reply.parameters.get("grants", []), reply.parameters.get("message", {})
    others = message.get("fileDescriptors", []) if isinstance(message, dict) else []
    count = sum(len(one) for one in (grants, others) if isinstance(one, list))
    return count + (1 if isinstance(message, dict) and message.get("fileDescriptor") is not None else 0)


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
        return [
            # a broker of an earlier version says no generation
            Offer(from_json(one["resource"]), str(one["rule"]), int(one.get("generation", 0)))
            for one in reply.parameters["resources"]
        ]
    except (LookupError, TypeError, ValueError, AttributeError, WrongMember) as error:
        raise ProtocolViolation(f"a reply to List that is none: {error}") from None


def about(reply: varlink.Reply) -> About:
    """The answer of About's reply. Raises ProtocolViolation."""
    try:
        said = reply.parameters
        return About(str(said["version"]), int(said["generation"]), str(said["digest"]), int(said["loadedAt"]))
    except (LookupError, TypeError, ValueError) as error:
        raise ProtocolViolation(f"a reply to About that is none: {error}") from None


def reloaded(reply: varlink.Reply) -> list[Finding]:
    """What Reload's reply says is wrong; nothing when the new policy is in force. Raises ProtocolViolation."""
    try:
        said = reply.parameters
        findings = [
            Finding(str(one["file"]), int(one["line"]), int(one["column"]), str(one["message"]))
            for one in said["findings"]
        ]
        if bool(said["applied"]) == bool(findings):
            raise ValueError("applied, and findings")
    except (LookupError, TypeError, ValueError) as error:
        raise ProtocolViolation(f"a reply to Reload that is none: {error}") from None
    return findings


def discard(reply: varlink.Reply, numbers: Iterable[int]) -> None:
    """Close what came with a reply that nobody wants any more."""
    said = reply.parameters.get("message")
    if said is None:
        close_all(numbers)
    else:
        closing.close_later(numbers, _sender(said))


def close_all(numbers: Iterable[int]) -> None:
    """Close these descriptors; negative numbers are left out."""
    for number in numbers:
        if number >= 0:
            os.close(number)
