"""A compiled policy: its bytes are that policy or a ValueError, TypeError or LookupError, never half of one."""

from __future__ import annotations

from collections.abc import Iterator

from fdbroker.policy.compiled import Policy, from_bytes, to_bytes
from fdbroker.terms import DenyRule, DeviceRule, NamespaceRule, SocketRule, Uplink
from fdbroker.topics import Messages, Topic, TopicRule, User

WORDS = (
    b"[]",
    b"{}",
    b"null",
    b"true",
    b'"device"',
    b'"namespace"',
    b'"socket"',
    b'"topic"',
    b'"1000"',
    b"[[[[",
    b"NaN",
)


def seeds() -> Iterator[bytes]:
    device = DeviceRule("/dev/snd/*", "rw", "sound", "116:*", False, "group audio", "p.yaml:7")
    namespace = NamespaceRule(("net",), "", False, True, Uplink("br0", "10.0.0.0/24", isolated=True), "everyone", "p:8")
    socket = SocketRule("vpn*", ("inet",), ("stream",), (443,), "user bob", "p:9")
    topic = TopicRule("send", "news", "everyone", "p:10")
    deny = DenyRule(
        ("/dev/snd/*",), (namespace, socket), frozenset({5}), frozenset(), False, "user eve", "p:11", (), ((9, 10),)
    )
    empty = Policy(frozenset(), frozenset(), {}, {}, {}, (), (), {}, {}, {})
    yield to_bytes(empty)
    yield to_bytes(empty._replace(by_uid={1000: (device, namespace, socket)}, uid_limits={1000: {"burst": 5}}))
    yield to_bytes(empty._replace(everyone=(socket,), deny=(deny,), by_gid={5: (device,)}, gid_limits={5: {}}))
    topics = (Topic("news", ("queue",), 65536, 60, everyone=True),)
    said = Messages(topics, (User(1000, "bob", frozenset({0})),), {1000: (topic,)}, {5: ()}, (topic,))
    yield to_bytes(empty._replace(messages=said, by_uid={1000: ()}))


def target(data: bytes) -> None:
    try:
        policy = from_bytes(data)
    except (ValueError, TypeError, LookupError):
        return
    assert to_bytes(policy) == data
    assert from_bytes(data) == policy
