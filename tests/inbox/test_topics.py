"""Messages: whose word counts, what waits for whom, and what is lost."""

from __future__ import annotations

import json

import pytest

from fdbroker import limits
from fdbroker.errors import MessageTooLong, QuotaExceeded, RateLimited, TopicDenied
from fdbroker.inbox import topics as module
from fdbroker.inbox.topics import Member, Topics
from fdbroker.kernel.records import NotRecorded
from fdbroker.terms import Topic
from fdbroker.wire.rights import Rights, Sender

TOPICS = (Topic("inbox", ("journal", "subscribers"), 100), Topic("news", ("subscribers",), 65536))
ALL = Rights(frozenset({0, 1}), frozenset({0, 1}), 1000, 1000, 2)


class Journal:
    def __init__(self):
        self.records = []
        self.full = False

    def write(self, values):
        if self.full:
            raise NotRecorded("EAGAIN")
        self.records.append(values)


@pytest.fixture
def journal():
    return Journal()


@pytest.fixture
def topics(journal):
    made = Topics(journal)
    made.use(TOPICS)
    return made


def member(topics, uid=5, rights=ALL, session=""):
    made = Member(Sender(uid, uid + 1, uid + 2, session))
    topics.allow(made, rights)
    return made


def send(topics, sender, text="hello", topic="news"):
    topics.publish(sender, topic, text.encode(), text=text, encoding="text")


def taken(one):
    return [json.loads(data)["parameters"]["message"] for data in one.take().split(b"\0")[:-1]]


def test_a_message_says_who_sent_it_and_goes_to_who_subscribed(topics):
    sender, one, other, third = (member(topics, uid) for uid in (5, 6, 7, 8))
    topics.subscribe(one, ["news"], 0)
    topics.subscribe(other, ["news", "inbox"], 0)
    send(topics, sender)
    assert list(topics.fresh) == [one, other]
    (message,) = taken(one)
    assert [message] == taken(other)
    assert taken(third) == []
    assert {key: message[key] for key in ("topic", "uid", "gid", "pid", "payload", "encoding")} == {
        "topic": "news",
        "uid": 5,
        "gid": 6,
        "pid": 7,
        "payload": "hello",
        "encoding": "text",
    }
    assert "session" not in message
    assert "lost" not in message


def test_numbers_increase_and_the_session_is_there_where_there_is_one(topics):
    sender, one = member(topics, session="c7"), member(topics)
    topics.subscribe(one, ["news"], 0)
    for _ in range(3):
        send(topics, sender)
    messages = taken(one)
    first = messages[0]["number"]
    assert [message["number"] - first for message in messages] == [0, 1, 2]
    assert {message["session"] for message in messages} == {"c7"}
    assert first < 2**53


def test_who_may_not_is_denied_whether_the_topic_exists_or_not(topics):
    nobody = member(topics, rights=ALL._replace(send=frozenset(), subscribe=frozenset()))
    for name in ("news", "none", ""):
        for attempt in (
            lambda name=name: send(topics, nobody, topic=name),
            lambda name=name: topics.subscribe(nobody, [name], 0),
        ):
            with pytest.raises(TopicDenied) as caught:
                attempt()
            assert caught.value.topic == name
    with pytest.raises(TopicDenied):
        topics.subscribe(member(topics, rights=ALL._replace(subscribe=frozenset({1}))), ["news", "inbox"], 0)


def test_a_message_of_the_topics_maximum_passes_and_one_byte_more_does_not(topics):
    sender = member(topics)
    send(topics, sender, "x" * 100, "inbox")
    with pytest.raises(MessageTooLong) as caught:
        send(topics, sender, "x" * 101, "inbox")
    assert caught.value.maximum == 100


def test_the_journal_gets_the_payload_as_one_field_or_nobody_gets_the_message(topics, journal):
    sender, one = member(topics), member(topics)
    topics.subscribe(one, ["inbox"], 0)
    send(topics, sender, "a\nFDBROKER_UID=0", "inbox")
    (record,) = journal.records
    assert record["FDBROKER_PAYLOAD"] == "a\nFDBROKER_UID=0"
    assert (record["FDBROKER_UID"], record["FDBROKER_TOPIC"]) == ("5", "inbox")
    assert len(taken(one)) == 1
    journal.full = True
    with pytest.raises(RateLimited):
        send(topics, sender, "b", "inbox")
    assert taken(one) == []
    send(topics, sender, "c")  # another topic does without the journal


def test_who_is_too_slow_loses_the_oldest_and_is_told_how_many(topics):
    sender, slow, quick = (member(topics, uid, ALL._replace(burst=10_000)) for uid in (5, 6, 7))
    topics.subscribe(slow, ["news"], 0)
    topics.subscribe(quick, ["news"], 0)
    most = limits.SUBSCRIBER_MESSAGES
    for number in range(most + 3):
        send(topics, sender, str(number))
        quick.take()
    messages = taken(slow)
    assert len(messages) == most
    assert (messages[0]["payload"], messages[0]["lost"]) == ("3", 3)
    assert all("lost" not in message for message in messages[1:])
    send(topics, sender, "again")
    assert "lost" not in taken(slow)[0]
    for _ in range(20):
        send(topics, sender, "x" * 65000)
    messages = taken(slow)
    assert messages[0]["lost"] == 20 - len(messages)
    assert sum(len(message["payload"]) for message in messages) <= limits.SUBSCRIBER_BYTES


def test_so_many_subscriptions_of_a_user_and_not_one_more(topics):
    topics.subscribe(member(topics), ["news"], 1)
    with pytest.raises(QuotaExceeded) as caught:
        topics.subscribe(member(topics), ["news"], 2)
    assert (caught.value.limit, caught.value.maximum) == ("subscriptions", 2)


def test_a_user_sends_so_many_at_once_over_all_its_connections(topics, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    few = ALL._replace(messages_per_second=10, burst=3)
    first, second, other = member(topics, 5, few), member(topics, 5, few), member(topics, 6, few)
    for sender in (first, second, first):
        send(topics, sender)
    with pytest.raises(RateLimited) as caught:
        send(topics, second)
    assert caught.value.retry_after_ms == 100
    send(topics, other)
    now[0] += 0.101
    send(topics, second)
    with pytest.raises(RateLimited):
        topics.subscribe(first, ["news"], 0)


def test_another_policy_holds_from_the_next_message_on(topics):
    sender, one = member(topics), member(topics)
    topics.subscribe(one, ["news", "inbox"], 0)
    topics.use((Topic("other", ("subscribers",), 5), TOPICS[0]))
    send(topics, sender, topic="inbox")  # rights stay by name until the new ones are told
    with pytest.raises(TopicDenied):
        send(topics, sender, topic="news")
    with pytest.raises(TopicDenied):
        send(topics, sender, topic="other")
    with pytest.raises(TopicDenied):
        topics.allow(one, Rights(frozenset({0}), frozenset({0}), 1, 1, 1))
    assert one.subscribed == frozenset()
    one.take()
    send(topics, sender, topic="inbox")
    assert taken(one) == []


def test_nothing_is_kept_for_who_is_gone(topics):
    sender, one = member(topics), member(topics)
    topics.subscribe(one, ["news"], 0)
    send(topics, sender)
    topics.forget(one)
    assert not topics.fresh
    send(topics, sender)
    assert not topics.fresh
