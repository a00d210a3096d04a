"""Topics in a policy: who may use them, and why."""

from __future__ import annotations

import pytest

from fdbroker.errors import PolicyError
from fdbroker.inbox.rights import message_rights
from fdbroker.policy.compile import load_policy
from fdbroker.policy.compiled import to_bytes
from fdbroker.policy.explain import explain
from fdbroker.policy.messages import from_bytes, message_view, messages
from fdbroker.policy.tried import failed_tests
from fdbroker.terms import Subject
from fdbroker.topics import Topic, TopicUse

POLICY = """
version: 1
topics:
  inbox: {deliver: [journal, subscribers]}
  news: {maximum_bytes: 1000}
everyone: {send: [inbox], limits: {subscriptions: 3}}
groups: {50: {send: ["n*"], subscribe: ["*"]}}
tests:
  - {as: {user: 5, groups: [50]}, open: "subscribe:news", expect: allow}
  - {as: {user: 5, groups: [6]}, open: "send:inbox", expect: allow}
  - {as: {user: 5, groups: [6]}, open: "send:news", expect: deny}
"""


@pytest.fixture
def loaded(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY)
    return load_policy(str(path), trusted=False)


def subject(*gids):
    return Subject(5, frozenset(gids), 1, 1, "", "", foreign=True)


def test_a_policy_says_which_topics_there_are_and_its_tests_hold(loaded):
    assert messages(loaded.policy).topics == (
        Topic("inbox", ("journal", "subscribers"), 65536),
        Topic("news", ("subscribers",), 1000),
    )
    assert failed_tests(loaded) == []
    assert from_bytes(to_bytes(loaded.policy)) == loaded.policy


def test_rights_are_those_of_everyone_and_of_the_groups(loaded):
    policy = loaded.policy
    rights = message_rights(message_view(policy, subject(6)), messages(policy).topics)
    assert (rights.send, rights.subscribe, rights.subscriptions) == ({"inbox"}, set(), 3)
    rights = message_rights(message_view(policy, subject(50)), messages(policy).topics)
    assert (rights.send, rights.subscribe) == ({"inbox", "news"}, {"inbox", "news"})
    nobody = message_rights(message_view(policy, subject(50)._replace(uid=65534)), messages(policy).topics)
    assert (nobody.send, nobody.subscribe) == (set(), set())


@pytest.mark.parametrize(
    ("use", "gid", "allowed", "words"),
    [
        (TopicUse("send", "inbox"), 6, True, "(everyone) allows it"),
        (TopicUse("send", "news"), 6, False, "usermod -aG 50 u"),
        (TopicUse("subscribe", "inbox"), 6, False, "usermod -aG 50 u"),
        (TopicUse("send", "none"), 50, False, "the policy has no such topic"),
        (TopicUse("send", "nope"), 50, False, "the policy has no such topic"),
    ],
)
def test_explain_says_why(loaded, use, gid, allowed, words):
    said = explain(loaded.policy, subject(gid), use, "u")
    assert said.allowed == allowed
    assert words in said.reason + said.change


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("everyone: {send: [none]}", "unknown topic 'none'; declare it under `topics:`"),
        ("everyone: {send: ['a/b']}", "send, expected a topic"),
        ("everyone: {subscribe: ['[']}", "topic '[': a [ without its ]"),
        ("topics: {x: {maximum_bytes: 268435457}}", "maximum_bytes, expected a number from 1 to 268435456, found"),
        (
            "topics: {x: {deliver: [subscribers, queue], maximum_bytes: 65537}}",
            "maximum_bytes, expected at most 65536 where the journal or the queue has them, found 65537",
        ),
        ("tests: [{as: {user: 5}, open: 'send:none', expect: deny}]", "unknown topic 'none'"),
        ("topics: {" + ", ".join(f"t{number}: {{}}" for number in range(257)) + "}", "over 256 topics"),
        ("topics: {" + "x" * 65 + ": {}}", "expected letters, digits"),
    ],
)
def test_errors_say_what_is_wrong(tmp_path, text, error):
    path = tmp_path / "policy.yaml"
    path.write_text(f"version: 1\n{text}\n")
    with pytest.raises(PolicyError) as caught:
        load_policy(str(path), trusted=False)
    (found,) = caught.value.findings
    assert error in str(found)


def test_a_topic_that_two_files_have_is_an_error(tmp_path):
    (tmp_path / "policy.d").mkdir()
    for name in ("policy.yaml", "policy.d/a.yaml"):
        (tmp_path / name).write_text("version: 1\ntopics: {news: {}}\n")
    with pytest.raises(PolicyError, match="topic 'news' for the second time"):
        load_policy(str(tmp_path / "policy.yaml"), trusted=False)
