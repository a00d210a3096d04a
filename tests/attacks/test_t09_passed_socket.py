"""T9: a socket that root opened is inherited by, or passed to, another user."""

from __future__ import annotations

import os

from harness import ALICE, BOB, MEM, Raw, node, outcome, running

POLICY = f"version: 1\nusers: {{0: {{devices: [{{path: /dev/roots}}]}}, {BOB}: {{devices: [{{path: /dev/roots}}]}}}}\n"


def _in_child(uid, client):
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        reply = client.open("/dev/roots")
        os._exit({"disconnected": 3, "granted": 4, "Denied": 5}.get(outcome(reply), 6))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_another_users_message_on_roots_connection_ends_it(dev):
    node("/dev/roots", MEM["zero"])
    with running(POLICY) as broker:
        with Raw(broker.socket) as client:
            assert outcome(client.open("/dev/roots")) == "granted"
            assert _in_child(0, client) == 4
            assert _in_child(ALICE, client) == 3
            assert client.open("/dev/roots") is None
        broker.wait_for("another uid than the connection")
        record = broker.records("disconnected:")[0] if broker.records("disconnected:") else broker.records()[-1]
        assert record["FDBROKER_STAGE"] == "decode"
        assert record["FDBROKER_UID"] == "0"


def test_half_a_message_of_root_is_not_finished_by_another(dev):
    node("/dev/roots", MEM["zero"])
    with running(POLICY) as broker, Raw(broker.socket) as client:
        client.sock.sendall(b'{"method":"io.fdbroker.Broker.Open","parameters":{"resources":[{"device":"/dev/nu')
        child = os.fork()
        if child == 0:
            os.setgroups([])
            os.setresuid(ALICE, ALICE, ALICE)
            client.sock.sendall(
                b'll"}]}}\0{"method":"io.fdbroker.Broker.Open","parameters":{"resources":[{"device":"/dev/roots"}]}}\0'
            )
            os._exit(0)
        os.waitpid(child, 0)
        assert client.reply() is None
        assert not client.descriptors
