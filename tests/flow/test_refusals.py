"""The records of what the opener refuses, each with the stage where it ended and its own cause, and what was opened by then."""

from __future__ import annotations

import os
import socket
import time
from types import SimpleNamespace

import pytest
from flow.test_opener import world

from fdbroker.kernel.sealed import sealed_memfd
from fdbroker.limits import every as limits
from fdbroker.opener import open as module
from fdbroker.policy.compiled import to_bytes
from fdbroker.refusals import ClientNotReading, Denied, NoSuchResource, NotWhatItWas, RateLimited
from fdbroker.terms import Device
from fdbroker.wire import link
from fdbroker.wire.audit import Record, fields
from fdbroker.wire.connections import Use

NULL = Device("/dev/null", "rw")
POLICY = """
version: 1
everyone:
  devices:
    - {path: /dev/null, access: rw}
    - {path: /dev/missing, access: rw}
    - {path: /dev/zero, access: rw, class: sound}
"""


def ask(one, connected, *resources):
    """The outcome of one Open, as the inbox hears it."""
    one.inbox.send(link.INBOX_TO_OPENER.encode(link.Open(connected.connection, resources)))
    return one.hear().refusal


def use(one, text):
    """Another policy is in force from now on."""
    descriptor = sealed_memfd("policy", to_bytes(one.policy(text)))
    socket.send_fds(one.launcher, [link.LAUNCHER_TO_OPENER.encode(link.Policy(2))], [descriptor])
    os.close(descriptor)
    while not isinstance(one.hear(), Use):
        pass
    assert link.OPENER_TO_LAUNCHER.decode(one.launcher.recv(100)) == link.Applied(2)


def records(one):
    """What has been written so far, a dictionary of fields for each record."""
    found = []
    one.journal.setblocking(False)
    while True:
        try:
            data = one.journal.recv(65536)
        except BlockingIOError:
            return found
        found.append(dict(line.split("=", 1) for line in data.decode().splitlines() if "=" in line))


def refusals(one):
    """What the keeper has been told to record so far."""
    found = []
    one.keeper.setblocking(False)
    while True:
        try:
            said = one.keeper_hears()
        except BlockingIOError:
            return found
        if isinstance(said, Record):
            found.append(fields(said))


@pytest.mark.parametrize(
    ("last", "refusal"),
    [
        (Device("/dev/missing", "rw"), NoSuchResource),
        (Device("/dev/zero", "rw"), NotWhatItWas),
        (Device("/dev/full", "rw"), Denied),
    ],
    ids=["missing", "wrong-class", "no-rule"],
)
@pytest.mark.parametrize("count", [1, limits.RESOURCES_AT_ONCE, limits.RESOURCES_PER_OPEN - 1])
def test_nothing_is_opened_before_all_is_judged(tmp_path, monkeypatch, last, refusal, count):
    """What is opened sleeps, and is closed again: 63 nodes and one that is missing cost others 63 openings."""
    opened = []
    reopen = module.reopen
    monkeypatch.setattr(module, "reopen", lambda *given: opened.append(given) or reopen(*given))
    with world(tmp_path) as one:
        client, connected = one.connect()
        use(one, POLICY)
        one.hear()
        assert isinstance(ask(one, connected, *[NULL] * count, last), refusal)
        assert opened == []
        assert ask(one, connected, *[NULL] * count) is None
        assert len(opened) == count
        for number in socket.recv_fds(client, 65536, 64)[1]:
            os.close(number)


def full_journal(one, connection):
    """Nothing is taken any more, until somebody reads."""
    one.ends[2].setblocking(False)
    with pytest.raises(BlockingIOError):
        while True:
            one.ends[2].send(b"x" * 1000)


def gone(one, connection):
    one.clients[0].close()


def deaf(one, connection):
    """The client's queue has no room, and no descriptor of ours in it."""
    with pytest.raises(BlockingIOError):
        while True:
            one.clients[1].send(bytes(4096), socket.MSG_DONTWAIT)


def never_reads(one, connection):
    connection.view = connection.view._replace(limits={**connection.view.limits, "unread_grants": 1})
    ask(one, SimpleNamespace(connection=connection.number), NULL)
    records(one)


def spent(bucket):
    """An action after which that bucket of the owner's is empty."""

    def action(one, connection):
        getattr(connection.account, bucket).charge(1, 1, time.monotonic(), 10_000)

    return action


def closing(one, connection):
    connection.account.closing += limits.CLOSING_HELD


def opening(one, connection):
    connection.view = connection.view._replace(limits={**connection.view.limits, "unread_grants": 1000})
    connection.account.opening += limits.OPENING_HELD


def in_flight(one, connection):
    connection.flight.count += connection.flight.most


@pytest.mark.parametrize(
    ("action", "refusal", "stage", "cause"),
    [
        (spent("bucket"), RateLimited, "authorize", "rate"),
        (spent("records"), RateLimited, "authorize", "records"),
        (closing, RateLimited, "authorize", "busy"),
        (opening, RateLimited, "authorize", "busy"),
        (in_flight, RateLimited, "authorize", "in flight"),
        (never_reads, ClientNotReading, "authorize", "unread grants"),
        (full_journal, RateLimited, "audit", "journal"),
        (deaf, ClientNotReading, "send", "unread grants"),
        (gone, None, "send", "kernel"),
    ],
    ids=["rate", "records", "closing", "opening", "in-flight", "never-reads", "journal", "deaf", "gone"],
)
def test_a_record_has_the_stage_where_it_ended_and_its_own_cause(tmp_path, action, refusal, stage, cause):
    with world(tmp_path) as one:
        _, connected = one.connect()
        end_s = time.monotonic() + 30
        while not one.opener._connections:  # the inbox hears of it first
            assert time.monotonic() < end_s
        (connection,) = one.opener._connections.values()
        action(one, connection)
        said = ask(one, connected, NULL)
        if refusal is not None:
            assert type(said) is refusal
        records(one) if action is full_journal else None
        one.launcher.close()
        one.thread.join(30)
        said = refusals(one) + [record for record in records(one) if record["FDBROKER_DECISION"] == "deny"]
        (last,) = said
        assert (last["FDBROKER_STAGE"], last["FDBROKER_CAUSE"]) == (stage, cause)
