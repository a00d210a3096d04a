"""Messages: whose word counts, what waits for whom, and what is lost."""

from __future__ import annotations

import json

import pytest

from fdbroker.errors import MessageTooLong, NoSuchRecipient, QueueFull, QuotaExceeded, RateLimited, TopicDenied
from fdbroker.inbox import topics as module
from fdbroker.inbox.dispatch import Publish
from fdbroker.inbox.member import Member
from fdbroker.inbox.rights import Rights, Sender
from fdbroker.inbox.store import Store, Stored
from fdbroker.inbox.topics import Topics
from fdbroker.kernel.records import NotRecorded
from fdbroker.limits import every as limits
from fdbroker.topics import Topic, User

TOPICS = (Topic("inbox", ("journal", "subscribers"), 100), Topic("news", ("subscribers",), 65536))
ALL = Rights(frozenset({"inbox", "news"}), frozenset({"inbox", "news"}), 1000, 1000, 2, 0, 0, 1000, 1000)


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
    made = Member(Sender(uid, uid + 1, uid + 2, session, uid))
    topics.allow(made, rights)
    return made


def send(topics, sender, text="hello", topic="news"):
    return topics.publish(sender, Publish(topic, text.encode(), text, "text"))


def taken(one, *turns):
    """What waits in its queue; what a turn has brought for all comes there when it ends, where nobody is sent it."""
    for topics in turns:
        assert list(topics.take_shared(lambda _: False)) == []
    data = b"".join(part for part, _ in one.take(lambda _: True))
    return [json.loads(message)["parameters"]["message"] for message in data.split(b"\0")[:-1]]


def test_a_message_says_who_sent_it_and_goes_to_who_subscribed(topics):
    sender, one, other, third = (member(topics, uid) for uid in (5, 6, 7, 8))
    topics.subscribe(one, ["news"], None, 0)
    topics.subscribe(other, ["news", "inbox"], None, 0)
    send(topics, sender)
    assert not topics.fresh
    (message,) = taken(one, topics)
    assert list(topics.fresh) == [one, other]
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
    topics.subscribe(one, ["news"], None, 0)
    for _ in range(3):
        send(topics, sender)
    messages = taken(one, topics)
    first = messages[0]["number"]
    assert [message["number"] - first for message in messages] == [0, 1, 2]
    assert {message["session"] for message in messages} == {"c7"}
    assert first < 2**53


def test_who_may_not_is_denied_whether_the_topic_exists_or_not(topics):
    nobody = member(topics, rights=ALL._replace(send=frozenset(), subscribe=frozenset()))
    for name in ("news", "none", ""):
        for attempt in (
            lambda name=name: send(topics, nobody, topic=name),
            lambda name=name: topics.subscribe(nobody, [name], None, 0),
        ):
            with pytest.raises(TopicDenied) as caught:
                attempt()
            assert caught.value.topic == name
    with pytest.raises(TopicDenied):
        topics.subscribe(member(topics, rights=ALL._replace(subscribe=frozenset({"news"}))), ["news", "inbox"], None, 0)


def test_a_message_of_the_topics_maximum_passes_and_one_byte_more_does_not(topics):
    sender = member(topics)
    send(topics, sender, "x" * 100, "inbox")
    with pytest.raises(MessageTooLong) as caught:
        send(topics, sender, "x" * 101, "inbox")
    assert caught.value.maximum == 100


def test_the_journal_gets_the_payload_as_one_field_or_nobody_gets_the_message(topics, journal):
    sender, one = member(topics), member(topics)
    topics.subscribe(one, ["inbox"], None, 0)
    send(topics, sender, "a\nFDBROKER_UID=0", "inbox")
    (record,) = journal.records
    assert record["FDBROKER_PAYLOAD"] == "a\nFDBROKER_UID=0"
    assert (record["FDBROKER_UID"], record["FDBROKER_TOPIC"]) == ("5", "inbox")
    assert len(taken(one, topics)) == 1
    journal.full = True
    with pytest.raises(RateLimited):
        send(topics, sender, "b", "inbox")
    assert taken(one, topics) == []
    send(topics, sender, "c")  # another topic does without the journal


def test_who_is_too_slow_loses_the_oldest_and_is_told_how_many(topics):
    sender, slow, quick = (member(topics, uid, ALL._replace(burst=10_000)) for uid in (5, 6, 7))
    topics.subscribe(slow, ["news"], None, 0)
    topics.subscribe(quick, ["news"], None, 0)
    most = limits.SUBSCRIBER_MESSAGES
    for number in range(most + 3):
        send(topics, sender, str(number))
        taken(quick, topics)
    messages = taken(slow)
    assert len(messages) == most
    assert (messages[0]["payload"], messages[0]["lost"]) == ("3", 3)
    assert all("lost" not in message for message in messages[1:])
    send(topics, sender, "again")
    assert "lost" not in taken(slow, topics)[0]
    for _ in range(20):
        send(topics, sender, "x" * 65000)
    messages = taken(slow, topics)
    assert messages[0]["lost"] == 20 - len(messages)
    assert sum(len(message["payload"]) for message in messages) <= limits.SUBSCRIBER_BYTES


def test_so_many_subscriptions_of_a_user_and_not_one_more(topics):
    topics.subscribe(member(topics), ["news"], None, 1)
    with pytest.raises(QuotaExceeded) as caught:
        topics.subscribe(member(topics), ["news"], None, 2)
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
        topics.subscribe(first, ["news"], None, 0)


def test_another_policy_holds_from_the_next_message_on(topics):
    sender, one = member(topics), member(topics)
    topics.subscribe(one, ["news", "inbox"], None, 0)
    topics.use((Topic("other", ("subscribers",), 5), TOPICS[0]))
    send(topics, sender, topic="inbox")  # rights stay by name until the new ones are told
    with pytest.raises(TopicDenied):
        send(topics, sender, topic="news")
    with pytest.raises(TopicDenied):
        send(topics, sender, topic="other")
    with pytest.raises(TopicDenied):
        topics.allow(one, Rights(frozenset({"other"}), frozenset({"other"}), 1, 1, 1, 0, 0, 9, 9))
    assert one.subscribed == frozenset()
    taken(one)
    send(topics, sender, topic="inbox")
    assert taken(one) == []


def test_nothing_is_kept_for_who_is_gone(topics):
    sender, one = member(topics), member(topics)
    topics.subscribe(one, ["news"], None, 0)
    send(topics, sender)
    topics.forget(one)
    assert not topics.fresh
    send(topics, sender)
    assert not topics.fresh


# ---- stored

STORED = (
    Topic("mail", ("queue",), 65536, 60),
    Topic("open", ("journal", "subscribers", "queue"), 65536, 60, everyone=True),
)
QUEUE = Rights(frozenset({"mail", "open"}), frozenset({"mail", "open"}), 1000, 1000, 2, 3, 10_000, 1000, 1000)


class Held:
    """A database in memory needs no reserve."""

    held = True

    def take(self):
        """It is there."""


@pytest.fixture
def stored(journal):
    store = Store(":memory:", Held())
    made = Topics(journal, store)
    made.use(STORED, [User(7, "bob", frozenset({0})), User(8, "carol", frozenset({0, 1}))])
    yield made
    store.close()


def post(topics, sender, to="", topic="mail", text="hello"):
    return topics.publish(sender, Publish(topic, text.encode(), text, "text", to))


def received(topics, one, most=100):
    return [json.loads(data)["payload"] for data in topics.receive(one, most)]


def test_a_stored_message_is_for_those_that_may_subscribe_and_there_after_the_commit(stored):
    sender, bob, carol = (member(stored, uid, QUEUE) for uid in (5, 7, 8))
    nobody = member(stored, 9, QUEUE._replace(subscribe=frozenset()))
    assert post(stored, sender) is True
    assert received(stored, bob) == []
    assert stored.commit() == (None, None)
    assert received(stored, bob) == received(stored, carol) == ["hello"]
    assert received(stored, sender) == ["hello"]  # it is here, and may subscribe
    assert received(stored, nobody) == []


@pytest.mark.parametrize(
    ("to", "topic", "who"),
    [
        ("bob", "mail", 7),
        ("7", "mail", 7),
        ("6", "mail", 6),  # not by the policy's names, but it is here and may
        ("77", "open", 77),  # everyone may
        ("carol", "open", 8),
        ("bob", "open", 7),
        ("77", "mail", None),
        ("dave", "mail", None),
        ("dave", "open", None),
        ("65534", "open", None),
        (str(2**32 - 1), "open", None),
        ("-1", "open", None),
        ("\u0667", "open", None),
        ("1" * 400, "open", None),
    ],
)
def test_to_names_one_user_that_may_have_it(stored, to, topic, who):
    sender, here = member(stored, 5, QUEUE), member(stored, 6, QUEUE)
    assert here.subscribe
    if who is None:
        with pytest.raises(NoSuchRecipient) as caught:
            post(stored, sender, to, topic)
        assert caught.value.to == to
        return
    post(stored, sender, to, topic)
    stored.commit()
    for uid in (5, 6, 7, 8, 77):
        assert received(stored, member(stored, uid, QUEUE)) == (["hello"] if uid == who else [])


def test_a_message_to_one_goes_to_that_users_subscribers_alone(stored):
    sender, bob, carol = (member(stored, uid, QUEUE) for uid in (5, 7, 8))
    stored.subscribe(bob, ["open"], None, 0)
    stored.subscribe(carol, ["open"], None, 0)
    post(stored, sender, "bob", "open")
    assert not stored.fresh
    stored.commit()
    assert list(stored.fresh) == [bob]
    assert [message["payload"] for message in taken(bob)] == ["hello"]


def test_a_full_share_is_refused_before_any_handler_has_it(stored, journal):
    sender, bob = member(stored, 5, QUEUE), member(stored, 7, QUEUE)
    stored.subscribe(bob, ["open"], None, 0)
    for _ in range(3):
        post(stored, sender, topic="open")
    with pytest.raises(QueueFull, match="stored_messages"):
        post(stored, sender, topic="open")
    assert len(journal.records) == 3
    post(stored, member(stored, 6, QUEUE), topic="open")  # another user's share is its own
    stored.commit()
    assert len(taken(bob, stored)) == 4


def test_a_full_journal_or_disk_stores_nothing_and_says_so(stored, journal):
    sender, bob = member(stored, 5, QUEUE), member(stored, 7, QUEUE)
    stored.subscribe(bob, ["open"], None, 0)
    journal.full = True
    with pytest.raises(RateLimited):
        post(stored, sender, topic="open")
    journal.full = False
    assert stored.commit() == (None, None)
    post(stored, sender, topic="open")
    stored._store._database.execute("PRAGMA query_only = ON")
    refusal, _ = stored.commit()
    assert isinstance(refusal, QueueFull)
    assert refusal.limit == "store_bytes"
    assert journal.records[-1]["MESSAGE"].startswith("messages cannot be stored: attempt to write")
    assert (journal.records[-1]["MESSAGE_ID"], journal.records[-1]["PRIORITY"]) == (module.STORE_MESSAGE_ID, "2")
    assert taken(bob) == received(stored, bob) == []
    post(stored, sender)
    assert stored.commit() != (None, None)
    assert len([one for one in journal.records if one["PRIORITY"] == "2"]) == 1  # not with every message


def test_one_has_only_what_it_may_have_now(stored):
    sender, carol = member(stored, 5, QUEUE), member(stored, 8, QUEUE)
    post(stored, sender, "carol", "mail", "a")
    post(stored, sender, "carol", "open", "b")
    stored.commit()
    stored.allow(carol, QUEUE._replace(subscribe=frozenset({"open"})))
    assert received(stored, carol) == ["b"]
    stored.allow(carol, QUEUE)
    assert received(stored, carol) == ["a", "b"]
    assert received(stored, carol, 1) == ["a"]


def test_a_subscriber_that_says_where_it_was_gets_what_is_stored_first_and_nothing_twice(stored):
    sender, bob = member(stored, 5, QUEUE._replace(stored_messages=100)), member(stored, 7, QUEUE)
    for text in "abc":
        post(stored, sender, "bob", "open", text)
    stored.commit()
    numbers = [json.loads(data)["number"] for data in stored.receive(bob, 10)]
    stored.subscribe(bob, ["open"], numbers[0], 0)
    post(stored, sender, "bob", "open", "d")
    stored.commit()
    assert not stored.fresh  # it comes with what is stored
    replayed = stored.replay(bob)
    assert [json.loads(one)["parameters"]["message"]["payload"] for one in replayed.split(b"\0")[:-1]] == [
        "b",
        "c",
        "d",
    ]
    assert stored.replay(bob) == b""
    post(stored, sender, "bob", "open", "e")
    stored.commit()
    assert [message["payload"] for message in taken(bob)] == ["e"]


def test_who_is_gone_is_no_recipient_any_more(stored):
    sender, here = member(stored, 5, QUEUE._replace(subscribe=frozenset())), member(stored, 6, QUEUE)
    stored.forget(here)
    post(stored, sender)
    stored.commit()
    assert received(stored, member(stored, 6, QUEUE)) == []
    assert received(stored, member(stored, 7, QUEUE)) == ["hello"]


def test_numbers_go_on_above_those_that_are_stored(journal):
    store = Store(":memory:", Held())
    far = 1 << 61
    store.put(Stored(far, 5, "mail", 1 << 62, b"{}"), frozenset({7}))
    store.commit()
    topics = Topics(journal, store)
    topics.use(STORED, [User(7, "bob", frozenset({0}))])
    post(topics, member(topics, 5, QUEUE))
    topics.commit()
    assert store.last_number == far + 1
    store.close()


def test_a_message_to_very_many_counts_like_several(stored, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    per = limits.ROWS_PER_MESSAGE
    stored.use(STORED, [User(uid, f"u{uid}", frozenset({0})) for uid in (7, *range(1000, 1000 + 5 * per))])
    sender = member(
        stored, 5, QUEUE._replace(subscribe=frozenset(), messages_per_second=1, burst=10, stored_messages=9)
    )
    post(stored, sender)  # one and five
    post(stored, sender, "7")
    with pytest.raises(RateLimited) as caught:
        post(stored, sender)
    assert caught.value.retry_after_ms == 3000
    now[0] += 3
    post(stored, sender)  # what was taken before it was refused was given back
    stored.commit()
    assert received(stored, member(stored, 1000 + 5 * per - 1, QUEUE)) == ["hello", "hello"]


def test_a_message_to_more_than_the_burst_allows_is_sent_and_owed(stored, monkeypatch):
    """It was refused for ever: it took one token, and then wanted all that the bucket can hold."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    many = range(1000, 1000 + 5 * limits.ROWS_PER_MESSAGE)
    stored.use(STORED, [User(uid, f"u{uid}", frozenset({0})) for uid in many])
    rights = QUEUE._replace(subscribe=frozenset(), messages_per_second=1, burst=1, stored_messages=9)
    sender = member(stored, 5, rights)
    for _ in range(2):
        post(stored, sender)
        with pytest.raises(RateLimited) as caught:
            post(stored, sender)
        assert caught.value.retry_after_ms == 6000
        now[0] += 6


def test_messages_of_one_turn_keep_their_order_stored_or_not(journal):
    store = Store(":memory:", Held())
    topics = Topics(journal, store)
    topics.use((*STORED, Topic("plain", ("subscribers",), 100)))
    three = QUEUE._replace(send=frozenset({"mail", "open", "plain"}), subscribe=frozenset({"mail", "open", "plain"}))
    sender, one = member(topics, 5, three), member(topics, 7, three)
    topics.subscribe(one, ["open", "plain"], None, 0)
    for name in ("plain", "open", "plain"):
        post(topics, sender, topic=name)
    assert [message["topic"] for message in taken(one, topics)] == ["plain"]
    topics.commit()
    messages = taken(one, topics)
    assert [message["topic"] for message in messages] == ["open", "plain"]
    assert messages[0]["number"] < messages[1]["number"]
    post(topics, sender, topic="open")
    post(topics, sender, topic="plain")
    store._database.execute("PRAGMA query_only = ON")
    assert topics.commit() is not None
    assert [message["topic"] for message in taken(one, topics)] == [
        "plain"
    ]  # what is not stored is not lost with the others
    store.close()


def test_of_one_owner_so_many_who_are_here_and_not_one_more(topics):
    """RECIPIENTS_OF_OWNER: who sends to all pays for each of them; its own uid is always one."""
    here = [Member(Sender(uid, uid, uid, "", 7)) for uid in range(100_000, 100_000 + limits.RECIPIENTS_OF_OWNER)]
    for one in (*here, Member(Sender(9, 9, 9, "", 9))):
        topics.allow(one, ALL)
    assert topics._recipients(TOPICS[1]) == {9, *range(100_000, 100_000 + limits.RECIPIENTS_OF_OWNER)}
    topics.allow(Member(Sender(7, 7, 7, "", 7)), ALL)
    found = topics._recipients(TOPICS[1])
    assert {7, 9} < found
    assert len(found) == 1 + limits.RECIPIENTS_OF_OWNER


def test_what_a_turn_brings_is_joined_once_for_all_that_subscribed_to_the_same(topics):
    """In order, and only for who has nothing waiting, has lost nothing, and can be sent it now."""
    sender, *readers = (member(topics, uid, ALL._replace(burst=10_000)) for uid in range(5, 11))
    one, same, other, behind, busy = readers
    for reader in readers:
        topics.subscribe(reader, ["news"] if reader is other else ["news", "inbox"], None, 0)
    behind.lost = 7
    for text, topic in (("a", "news"), ("b", "inbox"), ("c", "news")):
        send(topics, sender, text, topic)
    sent = dict(topics.take_shared(lambda reader: reader is not busy))
    assert set(sent) == {one, same, other}
    assert sent[one] is sent[same]
    said = {
        reader: [json.loads(part)["parameters"]["message"] for part in sent[reader].split(b"\0")[:-1]]
        for reader in sent
    }
    assert [message["payload"] for message in said[one]] == ["a", "b", "c"]
    assert [message["payload"] for message in said[other]] == ["a", "c"]
    assert list(topics.fresh) == [behind, busy]
    waiting = taken(behind)
    assert ([message["payload"] for message in waiting], waiting[0]["lost"]) == (["a", "b", "c"], 7)
    assert [message["payload"] for message in taken(busy)] == ["a", "b", "c"]
    assert list(topics.take_shared(lambda _: True)) == []


def test_more_than_a_queue_holds_in_one_turn_loses_the_oldest(topics):
    sender, one = (member(topics, uid, ALL._replace(burst=10_000)) for uid in (5, 6))
    topics.subscribe(one, ["news"], None, 0)
    for number in range(limits.SUBSCRIBER_MESSAGES + 1):
        send(topics, sender, str(number))
    assert list(topics.take_shared(lambda _: True)) == []
    assert taken(one)[0]["lost"] == 1


def test_who_subscribes_in_the_middle_of_a_turn_gets_what_comes_from_then_on(topics):
    sender, one, late = (member(topics, uid) for uid in (5, 6, 7))
    topics.subscribe(one, ["news"], None, 0)
    send(topics, sender, "before")
    topics.subscribe(late, ["news"], None, 0)
    send(topics, sender, "after")
    assert [message["payload"] for message in taken(late, topics)] == ["after"]
    assert [message["payload"] for message in taken(one)] == ["before", "after"]
    send(topics, sender, "gone")
    topics.unsubscribe(one)
    assert taken(late)[0]["payload"] == "gone"
