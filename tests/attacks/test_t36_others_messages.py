"""T36: somebody gets, or removes, a message that is stored for another."""

from __future__ import annotations

import contextlib

import harness
import pytest
from harness import ALICE, BOB, CAROL, as_user, running

import fdbroker

POLICY = f"""
version: 1
topics: {{mail: {{deliver: [queue]}}, brief: {{deliver: [queue]}}}}
users:
  {ALICE}: {{send: ["*"]}}
  {BOB}: {{subscribe: ["*"]}}
  {CAROL}: {{subscribe: [mail]}}
  0: {{subscribe: ["*"]}}
"""


@pytest.fixture
def state(dev):
    """Where messages are stored, in a folder that is root's alone."""
    with harness.folder() as where:
        yield str(where / "state")


@contextlib.contextmanager
def serving(state, policy=POLICY):
    with running(policy, "--state", state) as made:
        yield made


def send(address, topic, payload, to=None):
    with fdbroker.connect(address) as client:
        client.send(topic, payload, to=to)


def receive(address, acknowledge=(), maximum=100):
    with fdbroker.connect(address) as client:
        return [(message.number, message.payload.decode()) for message in client.receive(maximum, acknowledge)]


def test_nobody_gets_or_removes_what_waits_for_another(state):
    with serving(state) as broker:
        as_user(ALICE, [], send, broker.socket, "mail", "for bob", BOB)
        ((number, _),) = as_user(BOB, [], receive, broker.socket)
        for uid in (ALICE, CAROL, 0, 65534):
            assert as_user(uid, [], receive, broker.socket, [number, 0, 2**63 - 1]) == []
        assert as_user(BOB, [], receive, broker.socket) == [[number, "for bob"]]


def test_a_new_policy_withholds_what_one_may_not_have_any_more(state):
    with serving(state) as broker:
        as_user(ALICE, [], send, broker.socket, "mail", "x", CAROL)
        broker.reload(POLICY.replace("subscribe: [mail]", "subscribe: [brief]"))
        assert as_user(CAROL, [], receive, broker.socket) == []
        broker.reload(POLICY)
        assert [text for _, text in as_user(CAROL, [], receive, broker.socket)] == ["x"]


def test_who_acknowledges_what_all_have_got_removes_its_own_alone(state):
    with serving(state) as broker:
        for text in ("one", "two"):
            as_user(ALICE, [], send, broker.socket, "mail", text)
        bobs = as_user(BOB, [], receive, broker.socket)
        assert [text for _, text in bobs] == ["one", "two"]
        assert as_user(BOB, [], receive, broker.socket, [number for number, _ in bobs]) == []
        assert as_user(CAROL, [], receive, broker.socket) == bobs
