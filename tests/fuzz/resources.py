"""A resource is the same one in JSON, in bytes between our processes, and in words; nothing else is any."""

from __future__ import annotations

import json
from collections.abc import Iterator

from fdbroker.errors import LinkViolation
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
from fdbroker.typed import parse
from fdbroker.wire import asked, resources
from fdbroker.wire.codec import Cursor

ASKED = (
    *(Device("/dev/snd/ä", "rw"), Namespace("net", "vpn"), Namespace("mnt", pid=7), Namespace("uts")),
    *(Socket("vpn", "inet6", "dgram", 443), Socket("vpn", "inet", "stream")),
)
WORDS = (
    *(
        f'"{word}"'.encode()
        for word in ["device", "namespace", "socket", "access", "type", "name", "pid", "create", "family", "bind"]
    ),
    *(word.encode() for word in (*ACCESS_NAMES, *NAMESPACE_TYPES, *FAMILIES, *SOCKET_TYPES)),
    *(b":pid:", b":new", b"socket:net:", b",bind=", b"4194304", b"4194305", b"65535", b"65536", b"\\u0000", b"null"),
)


def seeds() -> Iterator[bytes]:
    for one in ASKED:
        yield b"\0" + json.dumps(resources.to_json(one)).encode()
        yield b"\1" + resources.RESOURCE.write(one)
        yield b"\2" + one.text.encode()


def target(data: bytes) -> None:
    kind, data = data[0] % 3 if data else 0, data[1:]
    try:
        match kind:
            case 0:
                resource = asked.from_json(json.loads(data))
            case 1:
                resource = taken(data)
                assert resources.RESOURCE.write(resource) == data
            case _:
                resource = parse(data.decode(), "rw")
                assert parse(resource.text, resource.access) == resource
    except (LinkViolation, asked.WrongMember, ValueError, RecursionError):
        return
    judge(resource)
    assert asked.from_json(json.loads(json.dumps(resources.to_json(resource)))) == resource
    try:
        packed = resources.RESOURCE.write(resource)
    except UnicodeEncodeError:  # a lone surrogate, which our JSON reader refuses and Python's does not
        return
    assert taken(packed) == resource


def taken(data: bytes) -> Resource:
    """As in a message that has nothing else but its type."""
    cursor = Cursor(data)
    resource = resources.RESOURCE.read(cursor)
    cursor.end()
    return resource


def judge(resource: Resource) -> None:
    assert resource.access in ACCESS_NAMES
    match resource:
        case Namespace(type_, name, pid):
            assert type_ in NAMESPACE_TYPES
            assert 0 <= pid <= PID_MAX
            assert not (name and pid)
        case Socket(_, family, type_, port):
            assert (family in FAMILIES, type_ in SOCKET_TYPES) == (True, True)
            assert 0 <= port <= PORT_MAX
