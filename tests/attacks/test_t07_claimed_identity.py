"""T7: a client writes who it is, and is believed."""

from __future__ import annotations

import re

from harness import ALICE, EVERYONE_NULL, Raw, as_user, outcome, running

from fdbroker.wire import varlink

CLAIMS = ["uid", "gid", "pid", "user", "groups", "credentials", "as", "subject", "pidfd", "label", "euid", "connection"]


VALUES = [0, "0", "root", -1, 4294967296, None, True, [0], {"uid": 0}]


def test_no_call_takes_a_field_that_says_who_asks(dev):
    """In each method that there is, as a parameter, beside the parameters, and in what is asked for; in any form."""
    valid = {
        "Open": {"resources": [{"device": "/dev/null"}]},
        "GetInterfaceDescription": {"interface": "io.fdbroker.Broker"},
        "Send": {"topic": "inbox", "payload": "x"},
        "Subscribe": {"topics": ["inbox"]},
        "Receive": {"maximum": 1},
    }
    methods = [(interface, name) for interface, names in varlink.METHODS.items() for name in names]

    def try_all(address):
        believed = []
        with Raw(address) as client:

            def attempt(*words, **more):
                reply = client.call(*words, **more)
                if outcome(reply) != "InvalidParameter":
                    believed.append([*words, more, reply])

            for claim in CLAIMS:
                for value in VALUES:
                    for interface, name in methods:
                        method, parameters = f"{interface}.{name}", valid.get(name, {})
                        attempt(method, {**parameters, claim: value})
                        attempt(method, parameters, **{claim: value})
                    attempt("io.fdbroker.Broker.Open", {"resources": [{"device": "/dev/null", claim: value}]})
                    namespace = {"namespace": {"type": "net", "name": "x", claim: value}}
                    if claim != "pid":  # whose namespace is asked for: T28
                        attempt("io.fdbroker.Broker.Open", {"resources": [namespace]})
        return believed

    with running(EVERYONE_NULL + "limits: {burst: 1000000}\n") as broker:
        assert as_user(ALICE, [], try_all, broker.socket) == []


def test_the_interfaces_have_no_such_field():
    for text in varlink.DESCRIPTIONS.values():
        # what the broker says of who sent a message goes to who receives it, and no parameter has it
        text = re.sub(r"^type Message \(.*?^\)", "", text, flags=re.MULTILINE | re.DOTALL)
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        for word in ("uid", "gid", "pid", "user"):
            found = [line for line in lines if f"{word}:" in line.lower()]
            # whose namespace is asked for; whether that process is the caller's, the kernel says (T28)
            assert found in ([], ["  pid: ?int,"] if word == "pid" else [])
