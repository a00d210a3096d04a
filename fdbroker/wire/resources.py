"""A resource as JSON on the wire, and as bytes between our processes. As words: typed.py.

Runs in: every process. A taken-over inbox controls the bytes.
"""

from __future__ import annotations

from typing import Any

from fdbroker.refusals import LinkViolation
from fdbroker.terms import (
    ACCESS_NAMES,
    FAMILIES,
    NAMESPACE_TYPES,
    PID_MAX,
    SOCKET_TYPES,
    Device,
    Namespace,
    Resource,
    Socket,
)
from fdbroker.wire import codec

# ---- JSON, as io.fdbroker.Broker says


def to_json(resource: Resource) -> dict[str, Any]:
    """A Resource of io.fdbroker.Broker; the inverse is wire/asked.py's `from_json`."""
    match resource:
        case Device(path, access):
            return {"device": path, "access": access}
        case Namespace(type_, name, pid):
            which: tuple[str, Any] = ("name", name) if name else ("pid", pid) if pid else ("create", True)
            return {"namespace": {"type": type_, which[0]: which[1]}, "access": resource.access}
        case Socket(namespace, family, type_, port):
            asked: dict[str, Any] = {"namespace": namespace, "family": family, "type": type_}
            if port:
                asked["bind"] = port
            return {"socket": asked, "access": resource.access}


# ---- bytes between our processes


def _as_asked(type_: str, name: str, pid: int) -> Namespace:
    if pid and name:
        raise LinkViolation("a namespace that cannot be")
    return Namespace(type_, name, pid)


def _in_a_namespace(namespace: str, family: str, type_: str, port: int) -> Socket:
    if not namespace:
        raise LinkViolation("a socket in no namespace")
    return Socket(namespace, family, type_, port)


_NAME = codec.Text(0xFFFF)
NAMESPACE = codec.Record(_as_asked, codec.word(*NAMESPACE_TYPES), _NAME, codec.number(32, PID_MAX))
SOCKET = codec.Record(_in_a_namespace, _NAME, codec.word(*FAMILIES), codec.word(*SOCKET_TYPES), codec.U16)
RESOURCE = codec.Choice(
    {Device: codec.Record(Device, _NAME, codec.word(*ACCESS_NAMES)), Namespace: NAMESPACE, Socket: SOCKET}
)
