"""T16: a client that never reads its grants."""

from __future__ import annotations

import contextlib
import os
import socket
import time

from harness import ALICE, BOB, EVERYONE_NULL, NO_RATES, Raw, as_user, ask, outcome, running

from fdbroker.limits import every as limits

UNREAD = limits.USER_LIMITS["unread_grants"].default
CALL = b'{"method":"io.fdbroker.Broker.Open","parameters":{"resources":[{"device":"/dev/null"}]}}\0'


def _flood(address, count):
    """Ask without reading, then read what came: the outcomes in order."""
    with Raw(address) as client:
        for _ in range(count):
            with contextlib.suppress(OSError):
                client.sock.sendall(CALL)
        time.sleep(0.5)
        got = []
        while (reply := client.reply()) is not None:
            got.append(outcome(reply))
            if len(got) == count:
                break
        return got


def _ask_20(address):
    return [ask(address, "/dev/null") for _ in range(20)]


def test_it_gets_so_many_and_is_closed_and_others_get_theirs(dev):
    with running(EVERYONE_NULL) as broker:
        assert as_user(ALICE, [], _flood, broker.socket, UNREAD) == ["granted"] * UNREAD
        got = as_user(ALICE, [], _flood, broker.socket, UNREAD * 2)
        assert got[:UNREAD] == ["granted"] * UNREAD
        assert got[UNREAD:] in ([], ["ClientNotReading"])
        broker.wait_for("too many grants wait unread")
        with Raw(broker.socket) as silent:
            for _ in range(UNREAD * 2):
                with contextlib.suppress(OSError):
                    silent.sock.sendall(CALL)
            assert as_user(BOB, [], _ask_20, broker.socket) == ["granted"] * 20
        broker.wait_idle()


def test_what_waits_on_one_connection_counts_for_the_users_others(dev):
    with running(EVERYONE_NULL + "limits: {unread_grants: 2}\n") as broker:
        with Raw(broker.socket) as silent, Raw(broker.socket) as other:
            silent.sock.sendall(CALL * 2)
            broker.wait_for("granted")
            time.sleep(0.1)
            reply = other.open("/dev/null")
            assert outcome(reply) == "QuotaExceeded"
            assert reply["parameters"] == {"limit": "unread_grants", "maximum": 2}
            assert outcome(silent.reply()) == "granted"
            assert outcome(silent.reply()) == "granted"
            assert outcome(other.open("/dev/null")) == "granted"


def test_a_client_that_reads_may_pipeline_without_end(dev):
    def pipeline(address):
        with Raw(address) as client:
            client.sock.sendall(CALL * 8)
            for _ in range(400):
                assert outcome(client.reply()) == "granted"
                os.close(client.take())
                client.sock.sendall(CALL)
            return True

    with running(EVERYONE_NULL) as broker:
        assert as_user(ALICE, [], pipeline, broker.socket)


def test_ended_connections_whose_grants_wait_unread_still_count(dev):
    """Else one user takes, connection by connection, every descriptor that may be in flight, from everybody."""
    batch = b'{"method":"io.fdbroker.Broker.Open","parameters":{"resources":[%s]}}\0' % b",".join(
        [b'{"device":"/dev/null"}'] * UNREAD
    )

    def hoard(address):
        held, said = [], []
        for _ in range(40):
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(address)
            with contextlib.suppress(OSError):
                sock.sendall(batch)
                sock.shutdown(socket.SHUT_WR)
            held.append(sock)
            time.sleep(0.05)  # until the broker has ended it, before the next one asks
        time.sleep(1)
        granted = 0
        for sock in held:
            data, numbers, _, _ = socket.recv_fds(sock, 65536, 253)
            granted += len(numbers)
            said.append(data[:50].decode(errors="replace"))
            for number in numbers:
                os.close(number)
            sock.close()
        return [granted, sorted({one.partition("Broker.")[2][:8] for one in said if "error" in one})]

    with running(EVERYONE_NULL + NO_RATES) as broker:
        assert as_user(ALICE, [], hoard, broker.socket) == [UNREAD, ["QuotaExc"]]
        assert as_user(BOB, [], ask, broker.socket, "/dev/null") == "granted"
        assert as_user(ALICE, [], ask, broker.socket, "/dev/null") == "granted"
        broker.wait_idle()


def test_descriptors_in_flight_are_freed_when_it_goes(dev):
    with running(EVERYONE_NULL + "limits: {unread_grants: 1024}\n") as broker:
        for _ in range(5):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(broker.socket)
                sock.sendall(CALL * 100)
        broker.wait_idle()
        assert ask(broker.socket, "/dev/null") == "granted"
