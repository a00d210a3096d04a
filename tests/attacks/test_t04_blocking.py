"""T4: opening blocks or has side effects, and others wait meanwhile."""

from __future__ import annotations

import os
import socket
import time

from harness import ALICE, BOB, MEM, Raw, as_user, ask, node, outcome, running

POLICY = 'version: 1\neveryone: {devices: [{path: "/dev/pool/*", access: rw}]}\n'


def test_a_fifo_or_socket_in_the_place_of_a_node_is_refused_at_once(dev):
    node("/dev/pool/good", MEM["zero"])
    os.mkfifo("/dev/pool/fifo", 0o666)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind("/dev/pool/socket")
    with running(POLICY) as broker:
        for name, kind in (("fifo", "FIFO"), ("socket", "socket")):
            began = time.monotonic()
            with Raw(broker.socket) as client:
                reply = client.open(f"/dev/pool/{name}", access="rw")
            assert outcome(reply) == "NotWhatItWas"
            assert kind in reply["parameters"]["reason"]
            assert time.monotonic() - began < 5
        assert ask(broker.socket, "/dev/pool/good") == "granted"


def test_a_client_that_is_stopped_in_the_middle_delays_nobody(dev):
    node("/dev/pool/good", MEM["zero"])

    def hold(address):
        with Raw(address) as client:
            client.sock.sendall(b'{"method":"io.fdbroker.Broker.Open","parameters":{"resources":[{"dev')
            return as_other(address)

    def as_other(address):
        return [ask(address, "/dev/pool/good") for _ in range(20)]

    with running(POLICY) as broker:
        assert as_user(ALICE, [], hold, broker.socket) == ["granted"] * 20
        assert as_user(BOB, [], ask, broker.socket, "/dev/pool/good") == "granted"
