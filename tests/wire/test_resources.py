"""A resource in words, as JSON, and as bytes between our processes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdbroker.errors import LinkViolation
from fdbroker.terms import (
    ACCESS_NAMES,
    FAMILIES,
    NAMESPACE_TYPES,
    NEW_NAMESPACE_TYPES,
    PID_MAX,
    SOCKET_TYPES,
    Device,
    Namespace,
    Socket,
)
from fdbroker.typed import parse
from fdbroker.wire import resources
from fdbroker.wire.asked import WrongMember, from_json
from fdbroker.wire.codec import Cursor
from fdbroker.wire.resources import to_json

NAMES = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), min_size=1, max_size=60)
ANY = st.one_of(
    st.builds(Device, NAMES.map("/dev/".__add__), st.sampled_from(ACCESS_NAMES)),
    st.builds(Namespace, st.sampled_from(NAMESPACE_TYPES), NAMES, st.just(0)),
    st.builds(Namespace, st.sampled_from(NAMESPACE_TYPES), st.just(""), st.integers(1, PID_MAX)),
    st.builds(Namespace, st.sampled_from(NEW_NAMESPACE_TYPES), st.just(""), st.just(0)),
    st.builds(Socket, NAMES, st.sampled_from(FAMILIES), st.sampled_from(SOCKET_TYPES), st.integers(0, 65535)),
)
WORDS = {
    "/dev/x": Device("/dev/x", "rw"),
    "net:vpn-a": Namespace("net", "vpn-a"),
    "net:a:b": Namespace("net", "a:b"),
    "net:pid": Namespace("net", "pid"),
    "net:pid:7": Namespace("net", pid=7),
    "pid:pid:7": Namespace("pid", pid=7),
    "user:pid:4194304": Namespace("user", pid=4194304),
    "uts:new": Namespace("uts"),
    "socket:net:vpn-a": Socket("vpn-a", "inet", "stream"),
    "socket:net:a,inet6": Socket("a", "inet6", "stream"),
    "socket:net:a,dgram,bind=443": Socket("a", "inet", "dgram", 443),
    "socket:net:a,inet6,dgram,bind=65535": Socket("a", "inet6", "dgram", 65535),
}


@pytest.mark.parametrize("text", WORDS)
def test_words_say_a_resource_and_a_resource_says_the_words(text):
    assert parse(text, "rw") == WORDS[text]
    assert WORDS[text].text == text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "a resource is"),
        ("dev/null", "a resource is"),
        ("net", "a resource is"),
        ("net:", "a resource is"),
        ("nets:vpn", "TYPE is one of net, mnt"),
        ("secret:x", "a resource is"),
        ("net:pid:", "'' is no process id"),
        ("net:pid:0", "'0' is no process id"),
        ("net:pid:4194305", "no process id"),
        ("net:pid:-1", "no process id"),
        ("net:pid:٣", "no process id"),
        ("pid:new", "a new pid namespace cannot be asked for"),
        ("user:new", "a new user namespace cannot be asked for"),
        ("uts:name", "only net namespaces have names: uts:pid:PID or uts:new"),
        ("socket:net:", "a socket is asked for as"),
        ("socket:uts:a", "a socket is asked for as"),
        ("socket:vpn", "a socket is asked for as"),
        ("socket:net:a,raw", "'raw' is none of inet"),
        ("socket:net:a,bind=0", "'bind=0' is none of"),
        ("socket:net:a,bind=65536", "is none of"),
        ("socket:net:a,", "'' is none of"),
    ],
)
def test_other_words_are_an_error_that_says_what_to_write(text, why):
    with pytest.raises(ValueError) as caught:
        parse(text, "ro")
    assert why in str(caught.value)


@given(ANY)
def test_a_resource_survives_json_and_bytes(resource):
    assert from_json(json.loads(json.dumps(to_json(resource)))) == resource
    packed = resources.RESOURCE.write(resource)
    cursor = Cursor(packed)
    assert resources.RESOURCE.read(cursor) == resource
    cursor.end()
    for cut in range(len(packed)):
        with pytest.raises(LinkViolation):
            resources.RESOURCE.read(Cursor(packed[:cut] or b"\0"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(
            [
                *("device", "namespace", "socket", "access", "type", "name", "pid", "create", "family", "bind"),
                *("uid", "x"),
            ]
        ),
        inner | st.sampled_from(["net", "inet", "stream", "ro", True, 5]),
        max_size=4,
    ),
    max_leaves=12,
)


@given(JSON)
def test_whatever_json_it_is_a_resource_or_the_name_of_a_member(value):
    try:
        resource = from_json(value)
    except WrongMember:
        return
    assert from_json(to_json(resource)) == resource


@given(st.binary(min_size=1, max_size=40))
def test_whatever_bytes_they_are_a_resource_or_a_violation(data):
    try:
        resource = resources.RESOURCE.read(Cursor(data))
    except LinkViolation:
        return
    assert resource.access in ACCESS_NAMES


@pytest.mark.parametrize(
    "data",
    [
        b"\x03",
        b"\0\0\0\x03",
        b"\x01\x08\0\0\0\0\0\0",
        b"\x01\0\0\x01a\0\0\0\x01",  # a name and a pid
        b"\x01\0\0\0\xff\xff\xff\xff",
        b"\x02\0\x01a\x02\0\0\0",
        b"\x02\0\x01a\0\x02\0\0",
        b"\x02\0\0\0\0\0\0",  # in no namespace
        b"\0\0\x01\xff\0",
    ],
)
def test_a_kind_a_word_or_a_number_that_does_not_exist_is_a_violation(data):
    with pytest.raises(LinkViolation):
        resources.RESOURCE.read(Cursor(data))
