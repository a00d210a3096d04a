"""A policy without names, globs checked: what the opener decides by. To bytes and back.

Runs in: launcher (writes), opener, keeper and inbox (read what the launcher wrote), command line. No attacker controls
any of it.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from fdbroker.policy.owners import Owners
from fdbroker.terms import DenyRule, DeviceRule, NamespaceRule, Rule, SocketRule, Uplink

_KINDS: dict[str, Any] = {"device": DeviceRule, "namespace": NamespaceRule, "socket": SocketRule}


class Policy(NamedTuple):
    """The whole policy. `by_uid` and `by_gid` give the rules of a user or group; limits by name.

    Who has rules for topics alone is named there, too, without a rule. What the policy says about topics is in
    `messages`, for messages.py to read; here it is left as it travels.
    `digest` says from which files it was made, `generation` how often one was loaded, `loaded_us` when: microseconds
    since 1970.
    """

    administrator_uids: frozenset[int]
    administrator_gids: frozenset[int]
    limits: dict[str, int]
    by_uid: dict[int, tuple[Rule, ...]]
    by_gid: dict[int, tuple[Rule, ...]]
    everyone: tuple[Rule, ...]
    deny: tuple[DenyRule, ...]
    uid_limits: dict[int, dict[str, int]]
    gid_limits: dict[int, dict[str, int]]
    everyone_limits: dict[str, int]
    messages: Any = ((), (), {}, {}, ())
    owners: Owners = Owners()
    digest: str = ""
    generation: int = 1
    loaded_us: int = 0

    @property
    def uids(self) -> frozenset[int]:
        """All uids that it names, as those of users."""
        return self.administrator_uids.union(self.by_uid, self.uid_limits, *(rule.uids for rule in self.deny))

    @property
    def gids(self) -> frozenset[int]:
        """All groups for which it says anything."""
        named = frozenset((*self.by_gid, *self.gid_limits, *self.administrator_gids))
        return named.union(*(rule.gids for rule in self.deny))


def to_bytes(policy: Policy) -> bytes:
    """The policy as JSON; sets become sorted lists."""

    def plain(value: Any) -> Any:
        if isinstance(value, frozenset):
            return sorted(value)
        if isinstance(value, tuple):
            kind = [name for name, rule in _KINDS.items() if isinstance(value, rule)]
            return kind + [plain(item) for item in value]
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items()}
        return value

    return json.dumps(plain(tuple(policy))).encode()


def from_bytes(data: bytes) -> Policy:
    """The inverse of `to_bytes`. Raises ValueError, TypeError or LookupError for anything else."""
    try:
        policy = _policy(json.loads(data))
    except (AttributeError, RecursionError) as error:
        raise ValueError(f"no compiled policy: {error}") from None
    if to_bytes(policy) != data:
        raise ValueError("no compiled policy: `to_bytes` would write it differently")
    return policy


def _policy(parts: Any) -> Policy:
    uids, gids, limits, by_uid, by_gid, for_everyone, deny, uid_limits, gid_limits, everyone_limits, *rest = parts
    messages, (known, owned), digest, generation, loaded_us = rest

    def rules(items: list[list[Any]]) -> tuple[Any, ...]:
        return tuple(_rule(*item) for item in items)

    return Policy(
        frozenset(uids),
        frozenset(gids),
        limits,
        {int(uid): rules(items) for uid, items in by_uid.items()},
        {int(gid): rules(items) for gid, items in by_gid.items()},
        rules(for_everyone),
        tuple(
            DenyRule(
                *(tuple(paths), rules(others), frozenset(uids), frozenset(gids), everyone, source, where),
                *(tuple(labels), tuple((first, last) for first, last in ranges)),
            )
            for paths, others, uids, gids, everyone, source, where, labels, ranges in deny
        ),
        {int(uid): maxima for uid, maxima in uid_limits.items()},
        {int(gid): maxima for gid, maxima in gid_limits.items()},
        everyone_limits,
        messages,
        Owners(frozenset(known), tuple((first, last, owner) for first, last, owner in owned)),
        *(digest, generation, loaded_us),
    )


def _rule(kind: str, *fields: Any) -> Rule:
    # JSON has lists where we have tuples
    values = [tuple(field) if isinstance(field, list) else field for field in fields]
    rule: Rule = _KINDS[kind](*values)
    if isinstance(rule, NamespaceRule) and rule.uplink is not None:
        return rule._replace(uplink=Uplink(*rule.uplink))
    return rule
