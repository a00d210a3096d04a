"""Resources and topics as people type them: `/dev/snd/timer`, `net:new`, `send:inbox`.

Runs in: command line, client library, and the launcher, for the tests of a policy. Whoever types controls it.
"""

from __future__ import annotations

from fdbroker.terms import (
    ACCESS_NAMES,
    FAMILIES,
    NAMESPACE_TYPES,
    NEW_NAMESPACE_TYPES,
    PID_MAX,
    PORT_MAX,
    SOCKET_TYPES,
    Device,
    Namespace,
    Resource,
    Socket,
)
from fdbroker.topics import TOPIC_VERBS, TopicUse

_FORMS = (
    "a resource is a path below /dev, net:NAME, TYPE:pid:PID, TYPE:new or socket:net:NAME; "
    f"TYPE is one of {', '.join(NAMESPACE_TYPES)}"
)
_ENDINGS = tuple(f":{name}" for name in ACCESS_NAMES)


def typed(text: str) -> str:
    """A resource as people type it, and as `list` prints it, in the form that `parse` takes.

    In a path, two backslashes are one; any other backslash stands for itself, as in a path that a shell completed.
    """
    return text.replace("\\\\", "\\") if text.startswith("/") else text


def split_access(word: str, access: str) -> tuple[str, str]:
    """RESOURCE[:ACCESS] as the resource and its access, which is `access` where the word says none.

    Only a path has an access, and a path may have colons: only a final :ro, :wo or :rw is one. A path that ends so
    itself must be written with its access.
    """
    if word.startswith("/") and word.endswith(_ENDINGS):
        return word[:-3], word[-2:]
    return word, access


def join_access(resource: str, access: str, default: str) -> str:
    """The word that `split_access` with `default` takes apart again; without the access where none is needed."""
    if resource.startswith("/") and (access != default or resource.endswith(_ENDINGS)):
        return f"{resource}:{access}"
    return resource


def parse_asked(text: str, access: str) -> Resource | TopicUse:
    """A resource as `typed` takes it, or a topic: send:TOPIC, subscribe:TOPIC. Raises ValueError as `parse` does."""
    verb, colon, topic = text.partition(":")
    if verb in TOPIC_VERBS and colon and topic:
        return TopicUse(verb, topic)
    if not text.startswith("/") and (not colon or verb not in (*NAMESPACE_TYPES, "socket")):
        raise ValueError(f"{_FORMS}; a topic is send:TOPIC or subscribe:TOPIC")
    return parse(typed(text), access)


def parse(text: str, access: str) -> Resource:
    """What the command line calls a resource; `access` is for devices. Raises ValueError that says what is wrong."""
    if text.startswith("/"):
        return Device(text, access)
    kind, colon, rest = text.partition(":")
    if colon and rest and kind == "socket":
        return _parse_socket(rest)
    if not colon or not rest or kind not in NAMESPACE_TYPES:
        raise ValueError(_FORMS)
    if rest.startswith("pid:"):
        number = _number(rest[4:], PID_MAX)
        if not number:
            raise ValueError(f"{rest[4:]!r} is no process id")
        return Namespace(kind, pid=number)
    if rest == "new":
        if kind not in NEW_NAMESPACE_TYPES:
            raise ValueError(f"a new {kind} namespace cannot be asked for: one of {', '.join(NEW_NAMESPACE_TYPES)} can")
        return Namespace(kind)
    if kind != "net":
        raise ValueError(f"only net namespaces have names: {kind}:pid:PID or {kind}:new")
    return Namespace(kind, name=rest)


def _parse_socket(rest: str) -> Socket:
    kind, _, rest = rest.partition(":")
    name, *options = rest.split(",")
    if kind != "net" or not name:
        raise ValueError("a socket is asked for as socket:net:NAME[,inet6][,dgram][,bind=PORT]")
    family, type_, port = FAMILIES[0], SOCKET_TYPES[0], 0
    for option in options:
        if option in FAMILIES:
            family = option
        elif option in SOCKET_TYPES:
            type_ = option
        elif option.startswith("bind=") and _number(option[5:], PORT_MAX):
            port = int(option[5:])
        else:
            raise ValueError(f"{option!r} is none of inet, inet6, stream, dgram and bind=PORT")
    return Socket(name, family, type_, port)


def _number(text: str, most: int) -> int:
    """A decimal number from 1 to `most`, else 0."""
    number = int(text) if text.isascii() and text.isdecimal() and len(text) <= 10 else 0
    return number if number <= most else 0
