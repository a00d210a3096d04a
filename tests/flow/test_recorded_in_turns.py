"""A request for many devices: between RESOURCES_AT_ONCE of its records others are served, and then it may be over."""

from __future__ import annotations

import json
import os
import socket
from collections import Counter

import pytest
from flow.test_opener import world
from flow.test_refusals import records
from harness import MEM, node

from fdbroker.kernel.sealed import sealed_memfd
from fdbroker.limits import every as limits
from fdbroker.opener.audit import Audit
from fdbroker.policy.compiled import to_bytes
from fdbroker.refusals import Denied
from fdbroker.terms import Device
from fdbroker.wire import link
from fdbroker.wire.audit import KINDS

COUNT = 3 * limits.RESOURCES_AT_ONCE
POLICY = 'version: 1\neveryone: {{devices: [{{path: "/dev/{}*", access: rw, class: mem}}]}}\n'
ASKED = tuple(Device(f"/dev/lab{number}", "rw") for number in range(COUNT))


def policy_message(one, name, before=""):
    """What the launcher sends for a policy of these names, and its descriptor."""
    policy = one.policy(before + POLICY.format(name))
    return link.LAUNCHER_TO_OPENER.encode(link.Policy(2)), sealed_memfd("policy", to_bytes(policy))


@pytest.fixture
def asked(dev, tmp_path, monkeypatch):
    """`asked(then)` asks for all nodes, and calls `then(world, connection)` when the first few are recorded."""
    for resource in ASKED:
        node(resource.path, MEM["zero"], 0o666)
    with world(tmp_path) as one:
        message, descriptor = policy_message(one, "lab")
        socket.send_fds(one.launcher, [message], [descriptor])
        os.close(descriptor)
        assert link.OPENER_TO_LAUNCHER.decode(one.launcher.recv(100)) == link.Applied(2)
        one.hear()
        first, second = one.connect(), one.connect()
        grant, calls = Audit.grant, []

        def granting(*given):
            grant(*given)
            calls.append(given)
            if len(calls) == limits.RESOURCES_AT_ONCE:
                then(one, first[1].connection, second[1].connection)

        def ask(action):
            nonlocal then
            then = action
            one.inbox.send(link.INBOX_TO_OPENER.encode(link.Open(first[1].connection, ASKED)))
            return one, first[0]

        then = None
        monkeypatch.setattr(Audit, "grant", granting)
        yield ask


def kinds(found):
    """How many records there are of each kind."""
    names = {number: kind for kind, (number, _) in KINDS.items()}
    return Counter(names[record["MESSAGE_ID"]] for record in found)


def counted(one):
    """How many records of each kind have been written."""
    return kinds(records(one))


def test_others_are_served_in_between(asked):
    def ask(one, _, other):
        one.inbox.send(link.INBOX_TO_OPENER.encode(link.Open(other, ASKED[:1])))

    one, _ = asked(ask)
    outcomes = [one.hear(), one.hear()]
    assert [outcome.refusal for outcome in outcomes] == [None, None]
    assert outcomes[0].connection > outcomes[1].connection


def test_what_was_recorded_for_a_client_that_has_left_is_undone(asked):
    def leave(one, number, other):
        one.inbox.send(link.INBOX_TO_OPENER.encode(link.Closed(number, 0)))
        one.inbox.send(link.INBOX_TO_OPENER.encode(link.Open(other, ASKED[:1])))

    one, _ = asked(leave)
    assert one.hear() == link.Outcome(2, None)  # the first one has none
    found = counted(one)
    assert limits.RESOURCES_AT_ONCE <= found["undone"] < COUNT
    assert found["granted"] == found["undone"] + 1


def test_what_was_recorded_before_a_policy_that_denies_it_is_undone(asked):
    def deny(one, *_):
        message, descriptor = policy_message(one, "other")
        socket.send_fds(one.launcher, [message], [descriptor])
        os.close(descriptor)

    one, client = asked(deny)
    heard = [one.hear()]
    while not isinstance(heard[-1], link.Outcome):
        heard.append(one.hear())
    assert isinstance(heard[-1].refusal, Denied)
    found = counted(one)
    assert limits.RESOURCES_AT_ONCE <= found["undone"] == found["granted"] < COUNT
    client.setblocking(False)
    with pytest.raises(BlockingIOError):
        client.recv(1)


def test_after_a_reload_records_and_reply_name_the_rules_as_they_stand_now(asked):
    def reload(one, *_):
        message, descriptor = policy_message(one, "lab", before="# one line more\n")
        socket.send_fds(one.launcher, [message], [descriptor])
        os.close(descriptor)

    one, client = asked(reload)
    while not isinstance(heard := one.hear(), link.Outcome):
        pass
    assert heard.refusal is None
    rules = [record["FDBROKER_RULE"].rpartition(":")[2] for record in records(one)]
    assert set(rules[: limits.RESOURCES_AT_ONCE]) == {"2"}
    assert rules[-1] == "3"
    data, numbers, _, _ = socket.recv_fds(client, 65536, COUNT)
    assert {grant["rule"].rpartition(":")[2] for grant in json.loads(data[:-1])["parameters"]["grants"]} == {"3"}
    for number in numbers:
        os.close(number)


def test_what_was_recorded_when_the_launcher_goes_is_undone(asked):
    one, _ = asked(lambda one, *_: one.launcher.close())
    one.thread.join(30)
    for opening in one.opener._later:  # what the end of its process closes
        opening.close()
    found = counted(one)
    assert limits.RESOURCES_AT_ONCE <= found["undone"] == found["granted"] < COUNT
