"""The policy in force, once users, groups or subordinate uids have changed.

Runs in: launcher. Root alone writes these databases. Nothing is needed that needs.py has not counted: each rule was
there at the start, or at a reload.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from fdbroker.errors import Finding, PolicyError
from fdbroker.launcher.needs import check_size
from fdbroker.policy.compile import Loaded, compile_again
from fdbroker.policy.compiled import Policy
from fdbroker.policy.messages import messages
from fdbroker.policy.recipients import with_recipients

_R = TypeVar("_R")


def renewed(path: str, loaded: Loaded) -> tuple[Loaded, str]:
    """Compile the trees of `loaded` with the databases as they are now; and why a reload would fail, and what then is.

    A user or group that is no more loses all that it had, for its number may soon be another one's. When there is too
    much for the children, or for the inbox, nobody is allowed more than before.
    """
    before = loaded.policy
    unknown: list[Finding] = []
    found = compile_again(loaded, unknown)
    why = [*map(str, unknown), "what is allowed to these names, nobody has"] if unknown else []
    said = messages(found.policy)._replace(topics=messages(before).topics)
    policy = found.policy._replace(
        digest=before.digest, generation=before.generation, loaded_us=before.loaded_us, messages=said
    )
    try:
        policy = with_recipients(policy, path)
        check_size(path, policy)
    except PolicyError as error:
        why += [str(error), "nobody is allowed more than before"]
        policy = _no_more(before, policy)
        try:
            check_size(path, policy)
        except PolicyError:  # too much is denied, or there are too many owners
            policy = policy._replace(deny=before.deny, owners=before.owners)
    return found._replace(policy=policy), "\n".join(why)


def _no_more(before: Policy, now: Policy) -> Policy:
    """The later policy, of whose permissions only those are left that the one before has as well."""
    was, said = messages(before), messages(now)
    return now._replace(
        administrator_uids=before.administrator_uids & now.administrator_uids,
        administrator_gids=before.administrator_gids & now.administrator_gids,
        by_uid=_by_both(before.by_uid, now.by_uid),
        by_gid=_by_both(before.by_gid, now.by_gid),
        messages=said._replace(
            by_uid=_by_both(was.by_uid, said.by_uid), by_gid=_by_both(was.by_gid, said.by_gid), users=was.users
        ),
    )


def _by_both(before: Mapping[int, Iterable[_R]], now: Mapping[int, Iterable[_R]]) -> dict[int, tuple[_R, ...]]:
    allowed = {number: frozenset(rules) for number, rules in before.items()}
    return {
        number: tuple(rule for rule in rules if rule in allowed[number])
        for number, rules in now.items()
        if number in allowed
    }
