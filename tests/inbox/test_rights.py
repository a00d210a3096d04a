"""What a policy says about a subject, made once for many: tests/property/test_invariants.py compares it with each alone."""

from __future__ import annotations

import time

from hypothesis import given
from hypothesis import strategies as st

from fdbroker.inbox.rights import message_rights
from fdbroker.limits import every as limits
from fdbroker.policy.messages import MessageView, covers
from fdbroker.topics import Topic, TopicRule, TopicUse

MAXIMA = {name: limit.default for name, limit in limits.USER_LIMITS.items()}
NAMES = st.sampled_from(["a", "ab", "abc", "b", "a\\b"])
PATTERNS = NAMES.map(lambda name: name.replace("\\", "\\\\")) | st.sampled_from(["*", "a*", "?", "[ab]*", "*b"])
RULES = st.lists(st.builds(TopicRule, st.sampled_from(["send", "subscribe"]), PATTERNS, st.just("x"), st.just("f:1")))


def seen(rules):
    return MessageView(tuple(rules), MAXIMA)


@given(RULES, st.lists(NAMES, unique=True))
def test_rights_are_what_would_be_decided_for_each_topic(rules, names):
    view, topics = seen(rules), [Topic(name, ("subscribers",), 100) for name in names]
    rights = message_rights(view, topics)
    for verb in ("send", "subscribe"):
        allowed = {name for name in names if any(covers(rule, TopicUse(verb, name)) for rule in rules)}
        assert getattr(rights, verb) == allowed


def test_rights_for_many_topics_that_are_named_one_by_one_are_soon_there():
    """Each connection took a fifth of a second, with TOPICS of them, and was charged as one."""
    names = [f"topic{number}" for number in range(limits.TOPICS)]
    rules = [TopicRule(verb, name, "x", "f:1") for name in names for verb in ("send", "subscribe")]
    view, topics = seen(rules), [Topic(name, ("subscribers",), 100) for name in names]
    message_rights(view, topics)  # compiles the globs
    began_s = time.thread_time()
    assert len(message_rights(view, topics).send) == limits.TOPICS
    assert time.thread_time() - began_s < 0.03
