"""What a decoded request means: an answer at once, or a question to the opener.

Runs in: inbox. An attacker controls every value here; none of them says who it is.
"""

from __future__ import annotations

import base64
import errno
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypedDict, TypeGuard

from fdbroker import __version__
from fdbroker.errors import (
    Denied,
    Finding,
    Refused,
)
from fdbroker.inbox.attached import Attached
from fdbroker.limits import opener as limits
from fdbroker.limits.inbox import ACKNOWLEDGED, DESCRIPTORS_PER_MESSAGE, VALUES_PER_UNIT
from fdbroker.limits.policy import TOPICS
from fdbroker.offers import Offer
from fdbroker.policy.compiled import Policy
from fdbroker.terms import Device, Resource
from fdbroker.wire import frame, varlink
from fdbroker.wire.asked import WrongMember, from_json
from fdbroker.wire.resources import to_json
from fdbroker.wire.varlink import SERVICE, Call, VarlinkError, invalid_parameter

_RESOURCES = limits.RESOURCES_PER_OPEN
_BROKER = "io.fdbroker.Broker"
_INBOX = "io.fdbroker.Inbox"
_ADMIN = "io.fdbroker.Admin"
# Where the messages of the inbox framing go, which name no topic.
FRAMED_TOPIC = "inbox"
SENT = (frame.encode_status(0), varlink.encode_reply({}))  # by the framing, by Varlink


class Answer(NamedTuple):
    """Send these bytes, if any; the request is done."""

    data: bytes


# `weight` of a question: what it counts for among those that the opener answers at once


class AskOpen(NamedTuple):
    """Ask the opener for these; it answers the client itself, or says how to refuse."""

    resources: tuple[Resource, ...]
    weight: int


class AskList(NamedTuple):
    """Ask the keeper what the client may open; with `watch` again after every change."""

    watch: bool
    weight: int = 1


class AskShutdown(NamedTuple):
    """Ask the opener to stop the service, if the client is an administrator; there is no answer then."""

    weight: int = 0


class AskReload(NamedTuple):
    """Ask the opener to have the policy loaded again, if the client is an administrator."""

    weight: int = 0


class TellAbout(NamedTuple):
    """Answer which policy is in force; the opener has said it."""


class Publish(NamedTuple):
    """Hand this message to the handlers of its topic; `text` is the payload as it came, in `encoding`.

    `to` is a user's name or number, "" for all. `silent`: the client wants no answer. Of the descriptors that came with
    it, `file` is the one that has the payload, None when the message has it itself; `others` are sent along.
    """

    topic: str
    payload: bytes
    text: str
    encoding: str
    to: str = ""
    silent: bool = False
    file: int | None = None
    others: tuple[int, ...] = ()


class _Text(TypedDict):
    text: str
    encoding: str


class Subscribe(NamedTuple):
    """From now on the client gets the messages of these topics, and before them what is stored after that number."""

    topics: list[str]
    after: int | None
    weight: int = 0


class Receive(NamedTuple):
    """The client's user has the messages of these numbers; give it at most `maximum` of the others.

    `silent`: the client wants no answer.
    """

    maximum: int
    acknowledge: list[int]
    silent: bool = False
    weight: int = 0


# What the latest calls of Open ask for, by their bytes, whoever sent them: most programs ask for what others asked for.
_opens: dict[bytes, AskOpen] = {}

Question = AskOpen | AskList | AskShutdown | AskReload | Subscribe | Receive
Action = Answer | Question | Publish | TellAbout


def dispatch_frame(payload: bytes, attached: Attached | None = None) -> Action:
    """A frame of the inbox framing: what is neither PING nor SHUTDOWN is a message for the topic `inbox`.

    What is no message needs none of the descriptors that came with it: they are closed.
    """
    if payload == frame.PING:
        return _PONG
    if payload == frame.SHUTDOWN:
        return AskShutdown()
    return Publish(FRAMED_TOPIC, payload, **text_of(payload), others=tuple(range(_count(attached))))


def text_of(payload: bytes) -> _Text:
    """A payload as it travels: as it is, or in base64 because it is no text."""
    try:
        return {"text": payload.decode(), "encoding": "text"}
    except UnicodeDecodeError:
        return {"text": base64.b64encode(payload).decode(), "encoding": "base64"}


def dispatch_varlink(message: bytes, attached: Attached | None = None) -> Action:
    """A Varlink message, and what came with it. Raises ProtocolViolation when no call can be told from it."""
    known = _opens.get(message)
    if known is not None:
        return known
    oneway = False
    try:
        call = varlink.decode_call(message)
        oneway = call.oneway
        action = _method(call)(call)
        if isinstance(action, Publish) and not (attached is not None and attached.over):
            _check_indexes(action, _count(attached))
    except VarlinkError as error:
        action = Answer(varlink.encode_error(error.name, error.parameters))
    # who wants no answer gets none; every method but these is nothing but its answer
    if oneway:
        return action._replace(silent=True) if isinstance(action, Publish | Receive) else Answer(b"")
    if isinstance(action, AskOpen) and len(message) <= limits.KEPT_BYTES:
        if len(_opens) >= limits.KEPT_VALUES:
            _opens.clear()
        _opens[message] = action
    return action


def _method(call: Call) -> Callable[[Call], Action]:
    methods = varlink.METHODS.get(call.interface)
    if methods is None:
        raise VarlinkError(f"{SERVICE}.InterfaceNotFound", interface=call.interface)
    if call.method not in methods:
        raise VarlinkError(f"{SERVICE}.MethodNotFound", method=f"{call.interface}.{call.method}")
    return HANDLERS[call.interface, call.method]


def _only(call: Call, *names: str) -> None:
    for name in call.parameters:
        if name not in names:
            raise invalid_parameter(name)


# encoded once: whoever asks in a loop costs no more than it must
_PONG = Answer(frame.encode_frame(frame.PONG))
_INFO = Answer(
    varlink.encode_reply(
        {
            "vendor": "fdbroker",
            "product": "fdbroker",
            "version": __version__,
            "url": "man:fdbroker(8)",
            "interfaces": list(varlink.DESCRIPTIONS),
        }
    )
)
_DESCRIBED = {name: Answer(varlink.encode_reply({"description": text})) for name, text in varlink.DESCRIPTIONS.items()}


def _get_info(call: Call) -> Action:
    _only(call)
    return _INFO


def _get_interface_description(call: Call) -> Action:
    _only(call, "interface")
    name = call.parameters.get("interface")
    if not isinstance(name, str):
        raise invalid_parameter("interface")
    if name not in varlink.DESCRIPTIONS:
        raise VarlinkError(f"{SERVICE}.InterfaceNotFound", interface=name)
    return _DESCRIBED[name]


def _open(call: Call) -> Action:
    _only(call, "resources")
    listed = call.parameters.get("resources")
    if not isinstance(listed, list) or not 1 <= len(listed) <= _RESOURCES:
        raise invalid_parameter("resources")
    try:
        resources = tuple(map(from_json, listed))
    except WrongMember as error:
        raise invalid_parameter(str(error)) from None
    # what the namespaces worker opens takes long, and the opener nothing
    return AskOpen(resources, len(resources) if all(isinstance(one, Device) for one in resources) else 0)


def _list(call: Call) -> Action:
    _only(call)
    return AskList(call.more)


def _about(call: Call) -> Action:
    _only(call)
    return TellAbout()


def _reload(call: Call) -> Action:
    _only(call)
    return AskReload()


def _count(attached: Attached | None) -> int:
    return 0 if attached is None else len(attached.numbers)


def _check_indexes(message: Publish, descriptors: int) -> None:
    """Each descriptor that came is named once, and no other."""
    if message.file is not None and message.file >= descriptors:
        raise invalid_parameter("fileDescriptor")
    named = message.others if message.file is None else (message.file, *message.others)
    if sorted(named) != list(range(descriptors)):
        raise invalid_parameter("fileDescriptors")


_SEND = ("topic", "payload", "encoding", "to", "fileDescriptor", "fileDescriptors")


def _send(call: Call) -> Action:
    _only(call, *_SEND)
    topic, text, encoding, to, file, others = (call.parameters.get(name) for name in _SEND)
    if not isinstance(topic, str):
        raise invalid_parameter("topic")
    if file is not None and not _is_number(file):
        raise invalid_parameter("fileDescriptor")
    if others is not None and not (
        isinstance(others, list) and len(others) <= DESCRIPTORS_PER_MESSAGE and all(map(_is_number, others))
    ):
        raise invalid_parameter("fileDescriptors")
    if file is not None and text is None:
        text = ""
    elif file is not None or not isinstance(text, str):
        raise invalid_parameter("payload")
    if encoding not in (None, "text", "base64"):
        raise invalid_parameter("encoding")
    if to is not None and not (isinstance(to, str) and to):
        raise invalid_parameter("to")
    try:
        payload = base64.b64decode(text, validate=True) if encoding == "base64" else text.encode()
    except ValueError:
        raise invalid_parameter("payload") from None
    return Publish(topic, payload, **text_of(payload), to=to or "", file=file, others=tuple(others or ()))


def _subscribe(call: Call) -> Action:
    _only(call, "topics", "after")
    topics = call.parameters.get("topics")
    if not isinstance(topics, list) or not 1 <= len(topics) <= TOPICS:
        raise invalid_parameter("topics")
    if not all(isinstance(topic, str) for topic in topics):
        raise invalid_parameter("topics")
    after = call.parameters.get("after")
    if after is not None and not _is_number(after):
        raise invalid_parameter("after")
    if not call.more:
        raise VarlinkError(f"{SERVICE}.ExpectedMore")
    return Subscribe(topics, after)


def _receive(call: Call) -> Action:
    _only(call, "maximum", "acknowledge")
    maximum, acknowledge = call.parameters.get("maximum"), call.parameters.get("acknowledge")
    if not _is_number(maximum):
        raise invalid_parameter("maximum")
    if acknowledge is None:
        acknowledge = []
    if not isinstance(acknowledge, list) or len(acknowledge) > ACKNOWLEDGED:
        raise invalid_parameter("acknowledge")
    if not all(map(_is_number, acknowledge)):
        raise invalid_parameter("acknowledge")
    return Receive(maximum, acknowledge)


def _is_number(value: Any) -> TypeGuard[int]:
    """Whether it is what SQLite and every JSON reader take for a number of ours; true is none."""
    return type(value) is int and 0 <= value < 1 << 63


HANDLERS: dict[tuple[str, str], Callable[[Call], Action]] = {
    (SERVICE, "GetInfo"): _get_info,
    (SERVICE, "GetInterfaceDescription"): _get_interface_description,
    (_BROKER, "Open"): _open,
    (_BROKER, "List"): _list,
    (_BROKER, "About"): _about,
    (_ADMIN, "Reload"): _reload,
    (_INBOX, "Send"): _send,
    (_INBOX, "Subscribe"): _subscribe,
    (_INBOX, "Receive"): _receive,
}


def units(message: bytes) -> int:
    """What decoding a message counts as, beside its bytes: objects and arrays take the longest."""
    return 1 + (message.count(b"{") + message.count(b"[")) // VALUES_PER_UNIT


def refusal_status(refusal: Refused) -> bytes:
    """The status of a refused SHUTDOWN."""
    return frame.encode_status(errno.EPERM if isinstance(refusal, Denied) else refusal.errno)


def refusal_reply(refusal: Refused, resources: Sequence[Resource]) -> bytes:
    """The error reply of Open or List; `resources` are those that were asked for."""
    return varlink.encode_error(f"{_BROKER}.{refusal.wire_name}", _parameters(refusal, resources))


def _parameters(refusal: Refused, resources: Sequence[Resource] = ()) -> dict[str, Any]:
    """What the interface says of an error."""
    said = {name: getattr(refusal, attribute) for attribute, name, _ in refusal.said if name}
    if refusal.of_resource and resources:
        said["resource"] = to_json(resources[refusal.index or 0])
    return said


def about_reply(policy: Policy) -> bytes:
    """The reply of About."""
    return varlink.encode_reply(
        {
            "version": __version__,
            "generation": policy.generation,
            "digest": policy.digest,
            "loadedAt": policy.loaded_us,
        }
    )


def reloaded_reply(findings: Sequence[Finding]) -> bytes:
    """The reply of Reload."""
    listed = [{"file": one.file, "line": one.line, "column": one.column, "message": one.text} for one in findings]
    return varlink.encode_reply({"applied": not listed, "findings": listed})


def reload_refused(refusal: Refused) -> bytes:
    """The error reply of Reload."""
    return varlink.encode_error(f"{_ADMIN}.{refusal.wire_name}", _parameters(refusal))


def message_refused(refusal: Refused, *, framed: bool) -> bytes:
    """The answer to a message, or a subscription, that was refused: one of MESSAGE_REFUSALS."""
    if framed:
        return frame.encode_status(refusal.errno)
    return varlink.encode_error(f"{_INBOX}.{refusal.wire_name}", _parameters(refusal))


def messages_reply(messages: Sequence[bytes]) -> bytes:
    """The reply of Receive: messages that are JSON already."""
    return varlink.encode_reply({"messages": list(map(varlink.Raw, messages))})


def offers_reply(offers: Sequence[Offer], *, continues: bool) -> bytes:
    """The reply of List."""
    listed = [
        {
            "resource": to_json(one.resource),
            "access": one.resource.access,
            "rule": one.where,
            "generation": one.generation,
        }
        for one in offers
    ]
    return varlink.encode_reply({"resources": listed}, continues=continues)
