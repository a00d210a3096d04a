"""T7: a client writes who it is, and is believed."""

from __future__ import annotations

import re

import pytest
from harness import ALICE, EVERYONE_NULL, Raw, as_user, outcome, running

from fdbroker.wire import varlink

CLAIMS = ["uid", "gid", "pid", "user", "groups", "credentials", "as", "subject", "pidfd", "label", "euid", "connection"]


@pytest.mark.parametrize("claim", CLAIMS)
def test_no_call_takes_a_field_that_says_who_asks(dev, claim):
    def try_all(address):
        with Raw(address) as client:
            resource = {"device": "/dev/null"}
            got = [
                outcome(client.call("io.fdbroker.Broker.Open", {"resources": [resource], claim: 0})),
                outcome(client.call("io.fdbroker.Broker.Open", {"resources": [{**resource, claim: 0}]})),
                outcome(client.call("io.fdbroker.Broker.List", {claim: 0})),
                outcome(client.call("io.fdbroker.Broker.Open", {"resources": [resource]}, **{claim: 0})),
            ]
            return got

    with running(EVERYONE_NULL) as broker:
        assert as_user(ALICE, [], try_all, broker.socket) == ["InvalidParameter"] * 4


def test_the_interfaces_have_no_such_field():
    for text in varlink.DESCRIPTIONS.values():
        # what the broker says of who sent a message goes to who receives it, and no parameter has it
        text = re.sub(r"^type Message \(.*?^\)", "", text, flags=re.MULTILINE | re.DOTALL)
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        for word in ("uid", "gid", "pid", "user"):
            found = [line for line in lines if f"{word}:" in line.lower()]
            # whose namespace is asked for; whether that process is the caller's, the kernel says (T28)
            assert found in ([], ["  pid: ?int,"] if word == "pid" else [])
