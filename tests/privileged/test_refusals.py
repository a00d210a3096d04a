"""Refusals as an admin sees them: each has its record with all fields, none is lost at a stop, and floods slow nobody."""

from __future__ import annotations

import itertools
import os
import time

import floods
import harness
import pytest
from floods import call, connected, felt, flooding, pipelined
from harness import ALICE, BOB, Raw, as_user, outcome, running

from fdbroker.limits import every as limits

POLICY = """
version: 1
topics: {inbox: {deliver: [subscribers]}}
everyone: {devices: [{path: /dev/null, access: rw, class: mem, device: "1:3"}]}
limits: {connections: 2}
deny: [{everyone: true, devices: [/dev/full]}]
"""
# of who is known, without its label, which is there under a security module alone
WHO = {"FDBROKER_UID", "FDBROKER_OWNER", "FDBROKER_GID", "FDBROKER_PID"}
ALWAYS = {"MESSAGE", "MESSAGE_ID", "PRIORITY", "SYSLOG_IDENTIFIER", "FDBROKER_STAGE", "FDBROKER_DECISION"}
ALWAYS |= {"FDBROKER_REASON", "FDBROKER_CONNECTION"}
ASKED = {"FDBROKER_RESOURCE", "FDBROKER_ACCESS"}

# without a queue, which would be the machine's own folder of stored messages
UNSTORED = floods.POLICY.replace('send: ["*"]', "send: [inbox]").replace("deliver: [queue]", "deliver: [subscribers]")


def _refused(address: str) -> int:
    """One refusal of each kind that this client can bring about; returns the process's number."""
    with Raw(address) as client:
        assert outcome(client.open("/dev/zero")) == "Denied"
        assert outcome(client.open("/dev/full")) == "Denied"
        assert outcome(client.call("io.fdbroker.Admin.Reload")) == "Denied"
        assert outcome(client.call("io.fdbroker.Inbox.Send", {"topic": "inbox", "payload": "x"})) == "Denied"
        while outcome(client.call("io.fdbroker.Broker.List")) != "RateLimited":
            pass
        with connected(address), connected(address) as third:
            third.settimeout(30)
            assert b"QuotaExceeded" in third.recv(1000)
        client.sock.sendall(b"{}\0")
        assert client.reply() is None
    return os.getpid()


def test_every_kind_of_refusal_has_its_record_with_all_fields(dev):
    with running(POLICY) as broker:
        pid = as_user(ALICE, [], _refused, broker.socket)
        broker.wait_for("disconnected")
        records = {
            (one["MESSAGE_ID"], one.get("FDBROKER_RESOURCE"), one.get("FDBROKER_CAUSE")): one
            for one in broker.records()
        }
        broker.stop()
        found = {
            (
                one["MESSAGE"].split()[4].rstrip(":"),
                one["FDBROKER_STAGE"],
                one.get("FDBROKER_RESOURCE", ""),
                one.get("FDBROKER_CAUSE"),
            )
            for one in records.values()
        }
        assert found >= {
            ("refused", "authorize", "/dev/zero", "policy"),
            ("refused", "authorize", "/dev/full", "policy"),
            ("refused", "authorize", "", "policy"),
            ("refused", "authorize", "send:inbox", "policy"),
            ("refused", "authorize", "", "rate"),
            ("turned-away", "accept", "", "limit connections"),
            ("disconnected", "decode", "", None),
        }
        for one in records.values():
            wanted = ALWAYS | WHO
            wanted |= ASKED if "FDBROKER_RESOURCE" in one else set()
            wanted |= {"FDBROKER_CAUSE"} if " disconnected" not in one["MESSAGE"] else set()
            wanted |= {"FDBROKER_RULE"} if one.get("FDBROKER_RESOURCE") == "/dev/full" else set()
            assert wanted <= one.keys() <= wanted | {"FDBROKER_LABEL", "FDBROKER_COMM"}
            who = str(ALICE), str(ALICE), str(ALICE), str(pid), "deny"
            assert tuple(one[f"FDBROKER_{name}"] for name in ("UID", "OWNER", "GID", "PID", "DECISION")) == who
            # a client that is turned away is not looked at any further
            assert ("FDBROKER_COMM" in one) == (one["FDBROKER_CONNECTION"] != "0")
            assert (one["FDBROKER_CONNECTION"] == "0") == (" turned-away" in one["MESSAGE"])


def _denied(address: str) -> None:
    """Opens and messages that are all denied, each another one, on many connections."""
    number = itertools.count()
    opens = [call("Broker.Open", resources=[{"device": f"/dev/{next(number)}" + "x" * 200}]) for _ in range(3000)]
    pipelined(b"".join(opens), reads=True)(address)


def _sends(address: str) -> None:
    sends = [call("Inbox.Send", topic=f"no{number}", payload="x") for number in range(3000)]
    pipelined(b"".join(sends), reads=True)(address)


@pytest.mark.timing
@pytest.mark.parametrize("name", ["opens", "sends"])
def test_a_flood_of_refusals_of_one_owner_ends_nothing_and_slows_no_other(dev, monkeypatch, name):
    monkeypatch.setitem(floods.FLOODS, "refused", {"opens": _denied, "sends": _sends}[name])
    with harness.replaced_file("/etc/subuid", floods.SUBUID), harness.folder() as where:
        with running(
            floods.POLICY.replace('send: ["*"]', "send: [inbox, news, mail]"), "--state", str(where / "state")
        ) as broker:
            for _ in range(3):
                found = felt(broker, ["refused"], rounds=1)
                over = {kind: (one.time, one.work) for kind, one in found.items() if min(one.time, one.work) >= 5.0}
                if not over:
                    break
            assert not over
            written = [
                one for one in broker.records() if one["FDBROKER_DECISION"] == "deny" and "FDBROKER_REPEATED" not in one
            ]
            assert written
            assert broker.process.poll() is None


@pytest.mark.parametrize("name", ["opens", "sends"])
def test_what_a_flood_was_refused_is_counted_to_the_end(dev, monkeypatch, name):
    """SIGTERM in the middle of it: an order, and no count is lost that was begun."""
    monkeypatch.setitem(floods.FLOODS, "refused", {"opens": _denied, "sends": _sends}[name])
    with running(UNSTORED) as broker:
        with flooding(broker.socket, "refused"):
            time.sleep(2)
            began_s = time.monotonic()
            assert broker.stop() == 0
            assert time.monotonic() - began_s < limits.STOP_SECONDS
        text = broker.text()
        assert "did not end in time" not in text
        # a refusal that comes after the counts of the stop are written may be the last record
        assert sum(int(one.get("FDBROKER_REPEATED", "0")) for one in broker.records("refused")) > 0


def test_all_refusals_before_a_stop_are_in_records_or_counts(dev):
    def refused():
        with Raw(broker.socket) as client:
            said = [outcome(client.open(f"/dev/{number % 50}")) for number in range(300)]
            said += [
                outcome(client.call("io.fdbroker.Inbox.Send", {"topic": f"t{number % 9}", "payload": "x"}))
                for number in range(99)
            ]
            return said

    with running(UNSTORED) as broker:
        said = as_user(BOB, [], refused)
        assert broker.stop() == 0
        counted = [
            int(one.get("FDBROKER_REPEATED", "1")) for one in broker.records() if one["FDBROKER_DECISION"] == "deny"
        ]
        assert sum(counted) == len(said) == 399
