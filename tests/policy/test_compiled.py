"""A compiled policy's bytes: that policy and no other, or one of the errors that are declared."""

from __future__ import annotations

import pytest

from fdbroker.policy.compiled import Policy, from_bytes, to_bytes
from fdbroker.terms import DenyRule

EMPTY = to_bytes(Policy(frozenset({3}), frozenset(), {"burst": 5}, {}, {}, (), (), {}, {}, {}))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[" * 100_000,
        b"{}",
        EMPTY[:-1],
        EMPTY.replace(b"{}", b"[]", 1),
        EMPTY.replace(b"[3]", b'"33"'),  # would be a set of letters
        EMPTY.replace(b"[3]", b"[3, 3]"),
        EMPTY.replace(b'{"burst": 5}', b'{"burst": 4, "burst": 5}'),
        b" " + EMPTY,
    ],
)
def test_what_no_launcher_writes_is_refused_by_one_of_the_declared_errors(data):
    assert to_bytes(from_bytes(EMPTY)) == EMPTY
    with pytest.raises((ValueError, TypeError, LookupError)):
        from_bytes(data)


def test_the_groups_of_a_policy_are_all_that_it_says_anything_for():
    """Of the others the keeper is told nothing: rules, limits, administrators and two deny rules have their own here."""
    deny = DenyRule(("/dev/a",), (), frozenset(), frozenset({4}), False, "groups", "f:1")
    policy = from_bytes(EMPTY)._replace(
        by_gid={1: ()},
        gid_limits={2: {}},
        administrator_gids=frozenset({3}),
        deny=(deny, deny._replace(gids=frozenset({5}))),
    )
    assert policy.gids == {1, 2, 3, 4, 5}
    assert from_bytes(EMPTY).gids == set()
