"""For whom a message is stored: the users that may subscribe, by the policy and the machine's databases.

Runs in: launcher, command line. At run time nobody may ask NSS, so all that is known of users is put down here.
"""

from __future__ import annotations

from collections.abc import Iterable

from fdbroker.errors import Finding, PolicyError
from fdbroker.limits import policy as limits
from fdbroker.policy import names
from fdbroker.policy.compiled import Policy
from fdbroker.policy.messages import covers, messages, topic_rules
from fdbroker.terms import NOBODY, Subject
from fdbroker.topics import TopicRule, TopicUse, User


def with_recipients(policy: Policy, path: str) -> Policy:
    """The policy with its topics' `everyone`, and with `users`. Raises PolicyError when there are over USERS of them.

    Known are: the users that a rule for subscribing names, the members of groups that one names, and, when everyone
    may subscribe to a topic that is stored, all accounts of people. A rule for a label counts for its users here: only
    their programs with that label can read what is stored.
    """
    said = messages(policy)
    topics = tuple(
        topic._replace(everyone=any(covers(rule, TopicUse("subscribe", topic.name)) for rule in said.everyone))
        for topic in said.topics
    )
    uids = {uid for uid, rules in said.by_uid.items() if _subscribes(rules)}
    listed = names.Listed()
    for gid, rules in said.by_gid.items():
        if _subscribes(rules):
            uids |= listed.members_of(gid)
    if any(topic.everyone and topic.keep_s for topic in topics):
        uids |= names.people()
    users = []
    for uid in sorted(uids - NOBODY):
        name, (gid, gids) = names.name_of(uid), names.groups_of(uid)
        rules = topic_rules(policy, Subject(uid, gids, gid, 0, "", "", foreign=False))
        positions = frozenset(
            index
            for index, topic in enumerate(topics)
            if any(covers(rule, TopicUse("subscribe", topic.name)) for rule in rules)
        )
        if positions:
            users.append(User(uid, name, positions))
    if len(users) > limits.USERS:
        expected = f"at most {limits.USERS} users"
        raise PolicyError([Finding(path, 0, 0, "too many may subscribe to topics", expected, f"{len(users)}")])
    return policy._replace(messages=said._replace(topics=topics, users=tuple(users)))


def _subscribes(rules: Iterable[TopicRule]) -> bool:
    return any(rule.verb == "subscribe" for rule in rules)
