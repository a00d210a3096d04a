"""A resource from the JSON that a client wrote: wire/resources.py has the way back.

Runs in: inbox, client library. Whoever is at the other end controls the JSON.
"""

from __future__ import annotations

from typing import Any

from fdbroker.terms import (
    ACCESS_NAMES,
    FAMILIES,
    NAMESPACE_TYPES,
    PID_MAX,
    PORT_MAX,
    SOCKET_TYPES,
    Device,
    Namespace,
    Resource,
    Socket,
)


class WrongMember(Exception):
    """A member of a Resource that does not exist, is missing, or is not of its type; its name is the text."""


def from_json(value: Any) -> Resource:
    """The inverse. Raises WrongMember, and nothing else."""
    given = _members(value, "resources", "device", "namespace", "socket", "access")
    kinds = [name for name in ("device", "namespace", "socket") if name in given]
    if len(kinds) != 1:
        raise WrongMember(kinds[-1] if kinds else "device")
    access = given.get("access")
    if access is not None and access not in ACCESS_NAMES:
        raise WrongMember("access")
    resource: Resource
    match kinds[0]:
        case "device":
            return Device(_text(given["device"], "device"), access or "ro")
        case "namespace":
            resource = _namespace(given["namespace"])
        case _:
            resource = _socket(given["socket"])
    if access not in (None, resource.access):
        raise WrongMember("access")
    return resource


def _members(value: Any, what: str, *names: str) -> dict[str, Any]:
    """The members of an object that are not null."""
    if not isinstance(value, dict):
        raise WrongMember(what)
    for name in value:
        if name not in names:
            raise WrongMember(name)
    return {name: member for name, member in value.items() if member is not None}


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise WrongMember(what)
    return value


def _one_of(value: Any, words: tuple[str, ...], what: str) -> str:
    if value not in words:
        raise WrongMember(what)
    return str(value)


def _integer(value: Any, most: int, what: str) -> int:
    if type(value) is not int or not 1 <= value <= most:
        raise WrongMember(what)
    return int(value)


def _namespace(value: Any) -> Namespace:
    given = _members(value, "namespace", "type", "name", "pid", "create")
    type_ = _one_of(given.get("type"), NAMESPACE_TYPES, "type")
    if len(given) != 2:
        raise WrongMember("namespace")
    if "name" in given:
        # an empty name would mean another thing than a name to us
        return Namespace(type_, name=_text(given["name"] or None, "name"))
    if "pid" in given:
        return Namespace(type_, pid=_integer(given["pid"], PID_MAX, "pid"))
    if given["create"] is not True:
        raise WrongMember("create")
    return Namespace(type_)


def _socket(value: Any) -> Socket:
    given = _members(value, "socket", "namespace", "family", "type", "bind")
    return Socket(
        _text(given.get("namespace") or None, "namespace"),
        _one_of(given.get("family", FAMILIES[0]), FAMILIES, "family"),
        _one_of(given.get("type", SOCKET_TYPES[0]), SOCKET_TYPES, "type"),
        _integer(given["bind"], PORT_MAX, "bind") if "bind" in given else 0,
    )
