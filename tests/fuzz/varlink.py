"""Varlink: messages are what stands between NULs, a call means what its JSON says, and every call has one answer."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

from fuzz.fuzzing import cuts

from fdbroker.errors import ProtocolViolation
from fdbroker.inbox import dispatch
from fdbroker.limits import every as limits
from fdbroker.terms import Device, Namespace, Socket
from fdbroker.wire import link, resources, varlink
from fdbroker.wire.asked import from_json
from fdbroker.wire.frame import TooLong

MAXIMUM = 40  # of a message, for the reader: so that the limit is within reach
METHODS = [f"{interface}.{method}" for interface, methods in varlink.METHODS.items() for method in methods]
WORDS = (
    *(f'"method":"{method}"'.encode() for method in METHODS),
    *(
        f'"{name}":'.encode()
        for name in ["parameters", "resources", "device", "namespace", "socket", "access", "type", "name", "pid"]
    ),
    *(
        f'"{name}":'.encode()
        for name in ["create", "family", "bind", "topic", "topics", "payload", "encoding", "to", "after", "maximum"]
    ),
    *(f'"{name}":'.encode() for name in ["acknowledge", "fileDescriptor", "fileDescriptors", "interface", "method"]),
    *(b'"more":true', b'"oneway":true', b'"upgrade":true', b"null", b"true", b"base64", b"9223372036854775808"),
    *(b"1e999", b"1E400", b"-0", b"\\ud800", b"\\u0000", b"\xef\xbb\xbf", b"NaN", b"\0{", b'"uid":0'),
)


class Brought:
    """Descriptors that came with a message, as far as dispatch looks at them."""

    over = False

    def __init__(self, count: int) -> None:
        self.numbers = tuple(range(100, 100 + count))


def seeds() -> Iterator[bytes]:
    def call(name: str, parameters: dict[str, Any], *, more: bool = False) -> bytes:
        return varlink.encode_call(name, parameters, more=more)

    asked = [Device("/dev/snd/pcmC0D0p", "rw"), Namespace("net", "vpn"), Namespace("mnt", pid=7), Namespace("uts")]
    asked += [Socket("vpn", "inet6", "dgram", 443)]
    yield call(
        "io.fdbroker.Broker.Open",
        {"resources": [{**resources.to_json(one)} for one in asked]},
    )
    for one in asked:
        yield call("io.fdbroker.Broker.Open", {"resources": [resources.to_json(one)]})
    yield call("io.fdbroker.Broker.List", {}, more=True) + b'{"method":"org.varlink.service.GetInfo","oneway":true}\0'
    yield call("org.varlink.service.GetInterfaceDescription", {"interface": "io.fdbroker.Inbox"})
    yield call("io.fdbroker.Inbox.Send", {"topic": "news", "payload": "aGVsbG8=", "encoding": "base64", "to": "bob"})
    yield call("io.fdbroker.Inbox.Send", {"topic": "news", "fileDescriptor": 0, "fileDescriptors": [1]})
    yield call("io.fdbroker.Inbox.Subscribe", {"topics": ["news", "inbox"], "after": 7}, more=True)
    yield call("io.fdbroker.Inbox.Receive", {"maximum": 10, "acknowledge": [1, 2]})
    yield b'{"method":"a.b","parameters":{"\\u00e9":[1.5,-2e3,null,false]},"upgrade":false}\0{"half'
    yield b'{"a":' * 30


def meant(data: bytes) -> tuple[list[bytes], int, bool]:
    """By the document alone: the messages, how many bytes are left over, and whether a message is too long."""
    *whole, left = data.split(b"\0")
    for index, message in enumerate(whole):
        if len(message) > MAXIMUM:
            return whole[:index], 0, True
    return whole, 0 if len(left) > MAXIMUM else len(left), len(left) > MAXIMUM


def read(pieces: list[bytes]) -> tuple[list[bytes], int, bool]:
    reader, messages = varlink.VarlinkReader(MAXIMUM), []
    try:
        for piece in pieces:
            reader.feed(piece)
            while (message := reader.next_message()) is not None:
                messages.append(message)
            assert reader.held <= MAXIMUM
    except TooLong:
        return messages, 0, True
    return messages, reader.held, False


def target(data: bytes) -> None:
    wanted = meant(data)
    for pieces in cuts(data):
        assert read(pieces) == wanted
    for message in data.split(b"\0"):
        judge_call(message)
        for descriptors in (None, Brought(0), Brought(2)):
            judge_action(message, descriptors)


def judge_call(message: bytes) -> None:
    """What we take for a call is the same call for everybody else who reads JSON, and for us once more."""
    try:
        call = varlink.decode_call(message)
    except (ProtocolViolation, varlink.VarlinkError):
        return
    value = json.loads(message, parse_float=lambda _: 0.5)  # we never look for a float's value
    assert f"{call.interface}.{call.method}".removeprefix(".") == value["method"].removeprefix(".")
    assert call.parameters == (value.get("parameters") or {})
    assert (call.oneway, call.more) == (bool(value.get("oneway")), bool(value.get("more")))
    again = varlink.encode_call(value["method"], call.parameters, more=call.more)
    assert varlink.decode_call(again[:-1]) == call._replace(oneway=False)


def judge_action(message: bytes, brought: Brought | None) -> None:
    """One answer, which keeps to the interface, or a question within its limits."""
    count = 0 if brought is None else len(brought.numbers)
    try:
        action = dispatch.dispatch_varlink(message, brought)
    except ProtocolViolation:
        return
    match action:
        case dispatch.Answer(b""):
            assert json.loads(message)["oneway"] is True
        case dispatch.Answer(answer):
            assert answer.count(b"\0") == 1
            reply = varlink.decode_reply(answer.removesuffix(b"\0"))
            interface, _, error = reply.error.rpartition(".")
            assert not reply.error or error in varlink.ERRORS[interface]
        case dispatch.AskOpen(asked):
            assert 1 <= len(asked) <= limits.RESOURCES_PER_OPEN
            assert tuple(from_json(resources.to_json(one)) for one in asked) == asked
            assert link.INBOX_TO_OPENER.decode(link.INBOX_TO_OPENER.encode(link.Open(1, asked))) == link.Open(1, asked)
        case dispatch.Publish():
            text, encoding = action.text, action.encoding
            assert (base64.b64decode(text) if encoding == "base64" else text.encode()) == action.payload
            named = [*action.others] if action.file is None else [action.file, *action.others]
            assert sorted(named) == list(range(count))
        case dispatch.Subscribe(topics, after):
            assert 1 <= len(topics) <= limits.TOPICS
            assert after is None or 0 <= after < 2**63
        case dispatch.Receive(maximum, acknowledge):
            assert len(acknowledge) <= limits.ACKNOWLEDGED
            assert all(0 <= number < 2**63 for number in [maximum, *acknowledge])
        case dispatch.AskList():
            pass
        case other:
            raise AssertionError(other)
