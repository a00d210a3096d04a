"""T34: a message says that somebody else sent it, or goes to who may not have it."""

from __future__ import annotations

import json

import pytest
from harness import ALICE, BOB, CAROL, GROUP, Raw, as_user, outcome, running
from messaging import SEND, SUBSCRIBE, Subscriber

POLICY = f"""
version: 1
topics: {{inbox: {{deliver: [journal, subscribers]}}, news: {{}}, secret: {{}}}}
everyone: {{send: [inbox, news], subscribe: [news]}}
users:
  0: {{send: ["*"], subscribe: ["*"]}}
  {BOB}: {{send: ["*"], subscribe: [secret]}}
  {CAROL}: {{send: ["*"], subscribe: [secret]}}
groups: {{{GROUP}: {{send: ["*"], subscribe: ["*"]}}}}
"""


@pytest.fixture
def broker(dev):
    with running(POLICY) as made:
        yield made
        made.wait_idle()


def send(address, topic, payload, to=None):
    with Raw(address) as client:
        asked = {"topic": topic, "payload": payload}
        return outcome(client.call(SEND, asked if to is None else {**asked, "to": to}))


FORGED = {
    "uid": 0,
    "gid": 0,
    "pid": 1,
    "session": "1",
    "sender": "root",
    "from": 0,
    "user": "root",
    "credentials": {},
    "number": 1,
    "time": 0,
    "lost": 5,
    "message": {},
    "connection": 1,
    "as": 0,
}


def test_no_field_says_who_sends_and_what_a_payload_says_is_payload(broker):
    def forge(address):
        with Raw(address) as client:
            asked = {"topic": "news", "payload": "x"}
            return [outcome(client.call(SEND, {**asked, name: value})) for name, value in FORGED.items()]

    imitation = (
        json.dumps({"parameters": {"message": {"uid": 0, "topic": "secret", "payload": "x"}}}) + '","uid":0,"x":"'
    )
    with Subscriber(broker.socket, "news", "inbox") as subscriber:
        assert as_user(ALICE, [], forge, broker.socket) == ["InvalidParameter"] * len(FORGED)
        for topic in ("news", "inbox"):
            assert as_user(ALICE, [], send, broker.socket, topic, imitation) == "granted"
            message = subscriber.message()
            assert (message["uid"], message["gid"], message["topic"]) == (ALICE, ALICE, topic)
            assert message["payload"] == imitation
    (record,) = [one for one in broker.records() if one.get("FDBROKER_PAYLOAD") == imitation.replace("\\", "\\\\")]
    assert record["FDBROKER_UID"] == str(ALICE)


def test_who_may_not_is_denied_and_that_is_recorded(broker):
    assert as_user(ALICE, [], send, broker.socket, "secret", "x") == "Denied"
    assert as_user(ALICE, [], send, broker.socket, "none", "x") == "Denied"
    assert as_user(ALICE, [GROUP], send, broker.socket, "secret", "x") == "granted"

    def subscribe(address, topic):
        with Raw(address) as client:
            return outcome(client.call(SUBSCRIBE, {"topics": [topic]}, more=True))

    assert as_user(BOB, [], subscribe, broker.socket, "inbox") == "Denied"
    broker.wait_for("subscribe:inbox")
    resources = [record["FDBROKER_RESOURCE"] for record in broker.records("refused")]
    assert resources == ["send:secret", "send:none", "subscribe:inbox"]


def test_a_message_to_one_user_comes_to_no_other(broker):
    def listen(address, topic):
        with Subscriber(address, topic) as subscriber:
            assert send(address, topic, "for bob", str(BOB)) == "granted"
            assert send(address, topic, "for all") == "granted"
            return subscriber.message()["payload"]

    assert as_user(CAROL, [], listen, broker.socket, "secret") == "for all"
    assert as_user(BOB, [], listen, broker.socket, "secret") == "for bob"


def test_a_reload_takes_a_subscription_away_and_says_so_and_gives_another(broker):
    root = '0: {send: ["*"], subscribe: ["*"]}'
    with Subscriber(broker.socket, "news") as subscriber, Subscriber(broker.socket, "inbox") as other:
        broker.reload(
            POLICY.replace(root, root.replace('subscribe: ["*"]', "subscribe: [inbox]")).replace("[news]", "[inbox]")
        )
        assert send(broker.socket, "news", "not this one") == "granted"
        reply = subscriber.reply()
        assert (outcome(reply), reply["parameters"]) == ("Denied", {"topic": "news"})
        assert outcome(subscriber.call("org.varlink.service.GetInfo")) == "granted"  # and the connection goes on
        assert send(broker.socket, "inbox", "this") == "granted"
        assert other.message()["payload"] == "this"
