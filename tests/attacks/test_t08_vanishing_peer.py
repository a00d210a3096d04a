"""T8: the peer vanishes at some moment, and what is missing is read as root."""

from __future__ import annotations

import socket

import pytest
from harness import ALICE, EVERYONE_NULL, MEM, Raw, as_user, ask, node, running

from fdbroker.policy.compile import load_policy
from fdbroker.policy.decide import decide, view
from fdbroker.terms import INVALID_ID, UNMAPPED_ID, Device, Subject

CALL = b'{"method":"io.fdbroker.Broker.Open","parameters":{"resources":[{"device":"/dev/null"}]}}\0'


def test_clients_that_vanish_anywhere_leave_nothing_behind(dev):
    def vanish(address):
        for cut in range(0, len(CALL) + 1, 3):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(address)
                sock.sendall(CALL[:cut])
        for _ in range(200):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(address)
                sock.sendall(CALL * 3)
                sock.shutdown(socket.SHUT_RDWR)
        return True

    policy = EVERYONE_NULL + "limits: {connections: 1000, requests_per_second: 100000, burst: 100000}\n"
    with running(policy) as broker:
        assert ask(broker.socket, "/dev/null") == "granted"
        assert as_user(ALICE, [], vanish, broker.socket)
        broker.wait_idle()
        assert ask(broker.socket, "/dev/null") == "granted"
        assert {record["FDBROKER_UID"] for record in broker.records("granted")} <= {str(ALICE), "0"}


@pytest.mark.parametrize("uid", [UNMAPPED_ID, INVALID_ID])
def test_an_unset_or_unmapped_identity_matches_nothing(tmp_path, uid):
    path = tmp_path / "policy.yaml"
    path.write_text(EVERYONE_NULL)
    policy = load_policy(str(path), trusted=False).policy
    nobody = Subject(uid, frozenset({uid}), uid, 0, "", "", foreign=True)
    assert not decide(view(policy, nobody), Device("/dev/null", "ro")).rules
    assert decide(view(policy, nobody._replace(uid=1000)), Device("/dev/null", "ro")).rules


def test_uid_65534_gets_nothing_not_even_everyones(dev):
    node("/dev/x", MEM["zero"])
    with running(EVERYONE_NULL) as broker:
        assert as_user(65534, [65534], ask, broker.socket, "/dev/null") == "Denied"
        assert as_user(ALICE, [65534], ask, broker.socket, "/dev/null") == "granted"


def test_a_client_that_only_sends_still_gets_its_answer(dev):
    with running(EVERYONE_NULL) as broker, Raw(broker.socket) as client:
        client.sock.sendall(CALL * 2)
        client.sock.shutdown(socket.SHUT_WR)
        assert client.reply()["parameters"]["grants"]
        assert client.reply()["parameters"]["grants"]
        assert client.reply() is None
