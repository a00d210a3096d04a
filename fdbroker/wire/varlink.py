"""Varlink: a JSON object, then NUL. Calls in, replies out, and the interfaces that the package ships.

Runs in: inbox, client. An attacker controls every byte that `VarlinkReader` and `decode_call` see.
Source: varlink.org, "Method Call" and "Interface Definition".
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import msgspec

from fdbroker.errors import ProtocolViolation
from fdbroker.limits import inbox as limits
from fdbroker.wire.frame import TooLong

SERVICE = "org.varlink.service"
_MESSAGE_BYTES = limits.MESSAGE_BYTES
_FLAGS = frozenset({"oneway", "more", "upgrade"})
_CALL_MEMBERS = _FLAGS | {"method", "parameters"}

# No call and no reply has a float, whose value may take 11 us to find: 1e-320.
_decode = msgspec.json.Decoder(float_hook=lambda _text: 0.5).decode
_encode = msgspec.json.Encoder().encode
Raw = msgspec.Raw  # bytes that are JSON already, as a value of what is to be encoded


class VarlinkError(Exception):
    """An error reply of org.varlink.service: the call is answered with it and the connection goes on."""

    def __init__(self, name: str, **parameters: object) -> None:
        super().__init__(f"{name} {parameters}")
        self.name = name
        self.parameters = parameters


def invalid_parameter(name: str) -> VarlinkError:
    """The parameter `name` does not exist, is missing, or its value is not of its type."""
    return VarlinkError(f"{SERVICE}.InvalidParameter", parameter=name)


class Call(NamedTuple):
    """One call: `interface` and `method` as written ("io.fdbroker.Broker", "Open"), parameters not yet judged."""

    interface: str
    method: str
    parameters: dict[str, Any]
    oneway: bool
    more: bool


class Reply(NamedTuple):
    """One reply: `error` is the full error name or "", `continues` says that more replies to this call follow."""

    parameters: dict[str, Any]
    error: str
    continues: bool


class VarlinkReader:
    """Collects bytes and gives whole messages without their NUL. After TooLong it must not be used again."""

    __slots__ = ("_buffer", "_maximum", "_searched")

    def __init__(self, maximum: int = _MESSAGE_BYTES) -> None:
        self._buffer = bytearray()
        self._maximum = maximum
        self._searched = 0  # no NUL before this index: each byte is looked at once, however it arrives

    def feed(self, data: bytes) -> None:
        """Add what arrived; the caller stops reading while messages wait, so this holds two messages at most."""
        self._buffer += data

    def next_message(self) -> bytes | None:
        """The next whole message, or None until more arrives. Raises TooLong above the maximum."""
        end = self._buffer.find(0, self._searched)
        if end < 0:
            self._searched = len(self._buffer)
            if self._searched > self._maximum:
                raise TooLong(f"a message of more than {self._maximum} bytes")
            return None
        if end > self._maximum:
            raise TooLong(f"a message of {end} bytes, at most {self._maximum}")
        message = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        self._searched = 0
        return message

    @property
    def held(self) -> int:
        """How many bytes wait: once there is no whole message any more, those of the beginning of one."""
        return len(self._buffer)


def _object(message: bytes) -> dict[str, Any]:
    try:
        value = _decode(message)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolViolation(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ProtocolViolation("not a JSON object")
    return value


def decode_call(message: bytes) -> Call:
    """One message of a client.

    Raises ProtocolViolation when no call can be told from it; VarlinkError when the call can, with the answer.
    """
    value = _object(message)
    name = value.get("method")
    if not isinstance(name, str):
        raise ProtocolViolation("a message without a method")
    for member, given in value.items():
        if member not in _CALL_MEMBERS or (member in _FLAGS and type(given) is not bool and given is not None):
            raise invalid_parameter(member)
    if value.get("upgrade"):
        raise invalid_parameter("upgrade")
    parameters = value.get("parameters")
    if parameters is None:
        parameters = {}
    if not isinstance(parameters, dict):
        raise invalid_parameter("parameters")
    interface, _, method = name.rpartition(".")
    return Call(interface, method, parameters, bool(value.get("oneway")), bool(value.get("more")))


def encode_call(name: str, parameters: dict[str, Any], *, more: bool = False) -> bytes:
    """A call with its NUL; `name` is the full method name. Raises ValueError when it is too long for the wire."""
    call: dict[str, Any] = {"method": name, "parameters": parameters}
    if more:
        call["more"] = True
    message = _encode(call)
    if len(message) > _MESSAGE_BYTES:
        raise ValueError(f"a call of {len(message)} bytes, at most {_MESSAGE_BYTES}")
    return message + b"\0"


def encode_object(value: dict[str, Any]) -> bytes:
    """A value of a reply by itself, to be put into several: as `Raw`."""
    return _encode(value)


def encode_reply(parameters: dict[str, Any], *, continues: bool = False) -> bytes:
    """A reply with its NUL."""
    reply: dict[str, Any] = {"parameters": parameters}
    if continues:
        reply["continues"] = True
    return _encode(reply) + b"\0"


def encode_error(name: str, parameters: dict[str, Any]) -> bytes:
    """An error reply with its NUL; `name` is the full error name."""
    return _encode({"error": name, "parameters": parameters}) + b"\0"


def decode_reply(message: bytes) -> Reply:
    """One message of the broker. Raises ProtocolViolation when it is no reply."""
    value = _object(message)
    parameters, error, continues = value.get("parameters"), value.get("error"), value.get("continues")
    if (
        not isinstance(parameters, dict | None)
        or not isinstance(error, str | None)
        or not isinstance(continues, bool | None)
    ):
        raise ProtocolViolation("a reply with members of the wrong type")
    return Reply(parameters or {}, error or "", bool(continues))


def _shipped(name: str) -> str:
    # by the loader, as importlib.resources would: that one brings tempfile, zipfile and random into the inbox
    path = __file__.removesuffix("varlink.py") + name + ".varlink"
    return str(__loader__.get_data(path).decode())  # type: ignore[name-defined]


def _members(text: str, kind: str) -> list[str]:
    # `method NAME(` and `error NAME (` at the beginning of a line, as the interface files write them
    return re.findall(rf"^{kind} ([A-Z][A-Za-z0-9]*) ?\(", text, re.MULTILINE)


_INTERFACES = (SERVICE, "io.fdbroker.Broker", "io.fdbroker.Inbox", "io.fdbroker.Admin")
DESCRIPTIONS: dict[str, str] = {name: _shipped(name) for name in _INTERFACES}
METHODS: dict[str, list[str]] = {name: _members(text, "method") for name, text in DESCRIPTIONS.items()}
ERRORS: dict[str, list[str]] = {name: _members(text, "error") for name, text in DESCRIPTIONS.items()}
