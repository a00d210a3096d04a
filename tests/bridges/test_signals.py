"""Whatever D-Bus can carry becomes JSON, and nothing in it ends the bridge."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from dbus_fast import Variant
from dbus_fast.signature import get_signature_tree
from hypothesis import given
from hypothesis import strategies as st

from fdbroker.bridges.signals import signal_text


def body_of(*body, signature=""):
    return json.loads(signal_text(":1.5", "/a", "a.b", "C", signature, list(body)), parse_constant=pytest.fail)["body"]


def test_a_signal_is_one_object():
    text = signal_text(":1.5", "/org/a", "org.a.B", "Changed", "si", ["é", -1])
    assert text == (
        '{"sender":":1.5","path":"/org/a","interface":"org.a.B","member":"Changed","signature":"si","body":["é",-1]}'
    )


def test_the_documentation_shows_what_is_said():
    where = ("/org/freedesktop/login1", "org.freedesktop.login1.Manager", "PrepareForSleep")
    text = signal_text(":1.4", *where, "b", [True])
    assert f"```json\n{text}\n```" in (Path(__file__).parents[2] / "docs/bridges.md").read_text()


@pytest.mark.parametrize(
    ("value", "becomes"),
    [
        (
            Variant("a{sv}", {"a": Variant("ay", b"\0\xff"), "b": Variant("v", Variant("u", 5))}),
            {"a": [0, 255], "b": 5},
        ),
        ({True: 1, False: 2}, {"true": 1, "false": 2}),
        ({5: [True, None]}, {"5": [True, None]}),
        ((1, (2.5, "x")), [1, [2.5, "x"]]),
        (2**64 - 1, 2**64 - 1),
        (math.nan, None),
        ([-math.inf], [None]),
        ('"\n\0\x1b', '"\n\0\x1b'),
    ],
)
def test_values(value, becomes):
    assert body_of(value) == [becomes]


def test_nesting_as_deep_as_d_bus_allows():
    value = Variant("s", "x")
    for _ in range(64):
        value = Variant("v", value)
    assert body_of([[value]]) == [[["x"]]]


# (signature, value, what it becomes) of each basic type
basic = st.one_of(
    *(
        kind.map(lambda value, name=name: (name, value, value))
        for name, kind in {
            "b": st.booleans(),
            "x": st.integers(-(2**63), 2**63 - 1),
            "t": st.integers(0, 2**64 - 1),
            "s": st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
        }.items()
    ),
    st.floats().map(lambda value: ("d", value, value if math.isfinite(value) else None)),
    st.binary().map(lambda value: ("ay", value, list(value))),
)


def containers(inner):
    """A variant, an array, a structure and a dictionary of these."""
    keys = st.sampled_from([("s", "k", "k"), ("i", -3, "-3"), ("b", True, "true")])
    return st.one_of(
        inner.map(lambda one: ("v", Variant(one[0], one[1]), one[2])),
        inner.map(lambda one: ("a" + one[0], [one[1]], [one[2]])),
        inner.map(lambda one: (f"({one[0]}s)", [one[1], "x"], [one[2], "x"])),
        st.tuples(keys, inner).map(
            lambda pair: (f"a{{{pair[0][0]}{pair[1][0]}}}", {pair[0][1]: pair[1][1]}, {pair[0][2]: pair[1][2]})
        ),
    )


@given(st.recursive(basic, containers, max_leaves=8))
def test_whatever_the_bus_can_carry_becomes_json(item):
    signature, value, becomes = item
    get_signature_tree(signature).verify([value])
    assert body_of(value, signature=signature) == [becomes]
