"""T11: a verb without any check."""

from __future__ import annotations

import struct

from harness import ALICE, BOB, GROUP, MEM, Raw, as_user, node, outcome, running

from fdbroker.wire import varlink

# What a stranger may have of every method that exists: a new method fails this test until it is thought of here.
STRANGERS = {
    "org.varlink.service.GetInfo": "granted",
    "org.varlink.service.GetInterfaceDescription": "granted",
    "io.fdbroker.Broker.Open": "Denied",
    "io.fdbroker.Broker.List": "granted",
    "io.fdbroker.Broker.About": "granted",
    "io.fdbroker.Admin.Reload": "Denied",
    "io.fdbroker.Inbox.Send": "Denied",
    "io.fdbroker.Inbox.Subscribe": "Denied",
    "io.fdbroker.Inbox.Receive": "granted",
}
PARAMETERS = {
    "org.varlink.service.GetInterfaceDescription": {"interface": "io.fdbroker.Broker"},
    "io.fdbroker.Broker.Open": {"resources": [{"device": "/dev/x"}]},
    "io.fdbroker.Inbox.Send": {"topic": "inbox", "payload": "x"},
    "io.fdbroker.Inbox.Subscribe": {"topics": ["inbox"]},
    "io.fdbroker.Inbox.Receive": {"maximum": 10, "acknowledge": [1]},
}

MEMBERS = {"io.fdbroker.Inbox.Subscribe": {"more": True}}


def test_with_an_empty_policy_nobody_gets_anything_by_any_method(dev):
    node("/dev/x", MEM["zero"], 0o666)
    methods = [f"{interface}.{method}" for interface, names in varlink.METHODS.items() for method in names]
    assert sorted(methods) == sorted(STRANGERS)

    def try_all(address):
        with Raw(address) as client:
            got = {}
            for method in methods:
                reply = client.call(method, PARAMETERS.get(method, {}), **MEMBERS.get(method, {}))
                got[method] = outcome(reply)
                assert not client.descriptors
                if method.endswith("List"):
                    assert reply["parameters"]["resources"] == []
                if method.endswith("Receive"):
                    assert reply["parameters"]["messages"] == []
                if method.endswith("About"):
                    assert set(reply["parameters"]) == {"version", "generation", "digest", "loadedAt"}
            return got

    with running("version: 1\n") as broker:
        for uid in (ALICE, 65534):
            assert as_user(uid, [], try_all, broker.socket) == STRANGERS
        assert as_user(0, [], try_all, broker.socket) == STRANGERS | {"io.fdbroker.Admin.Reload": "granted"}


def test_every_frame_but_ping_is_refused(dev):
    def frames(address):
        got = []
        for payload in (b"PING", b"hello", b"", b"SHUTDOWN", b"PONG", b"ping", b"PING "):
            with Raw(address) as client:
                client.sock.sendall(struct.pack("!I", len(payload)) + payload)
                got.append(client.sock.recv(100).hex())
        return got

    with running("version: 1\n") as broker:
        eperm, eacces = "00000001", "0000000d"
        expected = ["00000004" + b"PONG".hex(), eacces, eperm, eacces, eacces, eacces, eacces]
        assert as_user(ALICE, [], frames, broker.socket) == expected


def test_shutdown_is_for_administrators(dev):
    def shutdown(address):
        with Raw(address) as client:
            client.sock.sendall(b"\0\0\0\0")
            return client.sock.recv(100).hex()

    eperm = "00000001"
    policy = f"version: 1\nadministrators: {{users: [{BOB}], groups: [{GROUP}]}}\n"
    for uid, groups in ((0, []), (BOB, []), (ALICE, [GROUP])):
        with running(policy) as broker:
            assert as_user(ALICE, [], shutdown, broker.socket) == eperm
            assert as_user(65534, [GROUP], shutdown, broker.socket) == eperm
            assert as_user(uid, groups, shutdown, broker.socket) == ""
            assert broker.process.wait(60) == 0
            assert broker.records("stopping")[0]["FDBROKER_UID"] == str(uid)
            assert len(broker.records("refused")) == 2


def test_reload_is_for_administrators(dev):
    """As many times as the policy is in force anew, and each other caller is told the same, whatever the files say."""

    def ask_reload(address):
        with Raw(address) as client:
            generation = client.call("io.fdbroker.Broker.About")["parameters"]["generation"]
            reply = client.call("io.fdbroker.Admin.Reload")
            return [reply, client.call("io.fdbroker.Broker.About")["parameters"]["generation"] - generation]

    policy = f"version: 1\nadministrators: {{users: [{BOB}], groups: [{GROUP}]}}\n"
    with running(policy) as broker:
        for uid, groups in ((0, []), (BOB, []), (ALICE, [GROUP])):
            reply, reloads = as_user(uid, groups, ask_reload, broker.socket)
            assert (outcome(reply), reply["parameters"]["applied"], reloads) == ("granted", True, 1)
        broker.policy.write_text("secret: here\n")
        for uid, groups in ((ALICE, []), (65534, [GROUP])):
            reply, reloads = as_user(uid, groups, ask_reload, broker.socket)
            assert (outcome(reply), reloads) == ("Denied", 0)
            assert "secret" not in str(reply)
        assert "secret" not in broker.text()
        assert len(broker.records("refused")) == 2
