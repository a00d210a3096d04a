"""The opener's loop with a scripted inbox and keeper: what these can and cannot make it do once they are taken over."""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from fakes import came

from fdbroker import limits
from fdbroker.errors import LinkViolation, OpenFailed, RateLimited
from fdbroker.kernel import memfd
from fdbroker.kernel.capabilities import Bracket
from fdbroker.kernel.link import Link
from fdbroker.opener.ask import Asking
from fdbroker.opener.audit import Audit
from fdbroker.opener.open import Nodes
from fdbroker.opener.service import Opener
from fdbroker.policy.compile import load_policy
from fdbroker.policy.compiled import to_bytes
from fdbroker.terms import Device
from fdbroker.wire import admin, keeper, link
from fdbroker.wire.connections import Came, Use

POLICY = "version: 1\neveryone: {devices: [{path: /dev/null, access: rw}]}\n"
ADMIN = f"administrators: {{users: [{os.getuid()}]}}\n"
OPEN = link.INBOX_TO_OPENER.encode(link.Open(1, (Device("/dev/null", "ro"),)))


class World:
    """Plays the launcher, the inbox, the keeper and the clients."""

    def __init__(self, folder: Path):
        pair = lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        (self.launcher, launcher_end), (self.inbox, inbox_end), (self.keeper, keeper_end) = pair(), pair(), pair()
        self.launcher.settimeout(30)
        self.inbox.settimeout(30)
        self.keeper.settimeout(30)
        self.journal, journal_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.path = str(folder / "s")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.path)
        listener.listen()
        listener.setblocking(False)
        self.file = folder / "policy.yaml"
        policy = self.policy(POLICY + ADMIN)
        self.nodes = Nodes(Bracket(frozenset()))
        links = [Link(end) for end in (launcher_end, inbox_end, keeper_end)]
        self.opener = Opener(listener, *links, Asking(None), policy, self.nodes, Audit(journal_end))
        self.ends = [launcher_end, inbox_end, journal_end, listener, keeper_end]
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run)
        self.clients: list[socket.socket] = []

    def policy(self, text):
        self.file.write_text(text)
        return load_policy(str(self.file), trusted=False).policy

    def _run(self):
        try:
            self.opener.serve()
        except BaseException as error:
            self.error = error

    def connect(self):
        """A client, its number and uid as the inbox hears them, and the inbox's copy of its socket."""
        client = socket.socket(socket.AF_UNIX)
        self.clients.append(client)
        client.settimeout(30)
        client.connect(self.path)
        data, (number,), _, _ = socket.recv_fds(self.inbox, 1000, 2)
        copy = socket.socket(fileno=number)
        self.clients.append(copy)
        return client, link.OPENER_TO_INBOX.decode(data)

    def hear(self):
        said = link.OPENER_TO_INBOX.decode(self.inbox.recv(200000))
        return said._replace(sent_us=0) if isinstance(said, link.Outcome) else said  # how long it took is the machine's

    def keeper_hears(self):
        return keeper.OPENER_TO_KEEPER.decode(self.keeper.recv(200000))

    def violated(self):
        self.thread.join(30)
        assert isinstance(self.error, LinkViolation), self.error
        return str(self.error)


@contextmanager
def world(tmp_path):
    one = World(tmp_path)
    one.thread.start()
    assert one.launcher.recv(10) == link.READY
    try:
        yield one
    finally:
        one.launcher.close()
        one.thread.join(30)
        assert not one.thread.is_alive()
        for sock in (one.inbox, one.keeper, one.journal, *one.ends, *one.clients):
            sock.close()
        opener = one.opener
        for connection in opener._connections.values():
            connection.sock.close()
        opener._door.close()
        opener._epoll.close()
        for number in (
            opener._spare,
            opener._woken,
            opener._door.identifier._proc,
        ):
            os.close(number)
        one.nodes.close()


def test_a_grant_goes_to_the_client_and_its_outcome_to_the_inbox(tmp_path):
    with world(tmp_path) as one:
        client, connected = one.connect()
        assert connected.uid == os.getuid()
        one.inbox.send(link.INBOX_TO_OPENER.encode(link.Open(connected.connection, (Device("/dev/null", "rw"),))))
        data, (number,), _, _ = socket.recv_fds(client, 65536, 2)
        assert json.loads(data[:-1])["parameters"]["grants"][0]["rdev"] == "1:3"
        os.close(number)
        assert one.hear() == link.Outcome(connected.connection, None)
        assert b"granted rw /dev/null" in one.journal.recv(65536)


def test_nothing_is_done_for_a_client_that_has_hung_up(tmp_path, monkeypatch):
    """All others would wait until the requests of connections that have ended are judged, each with its resources."""
    with world(tmp_path) as one:
        looked: list[object] = []
        judge = one.nodes.judge_some
        monkeypatch.setattr(one.nodes, "judge_some", lambda *given: looked.append(given) or judge(*given))
        for gone in (True, False):
            client, connected = one.connect()
            if gone:
                client.close()
            one.inbox.send(
                link.INBOX_TO_OPENER.encode(link.Open(connected.connection, (Device("/dev/null", "rw"),) * 64))
            )
            refusal = one.hear().refusal
            if gone:
                assert (type(refusal), refusal.number, looked) == (OpenFailed, errno.EPIPE, [])
                continue
            assert (refusal, len(looked)) == (None, 64 // limits.LOOKED_AT_ONCE)
            for number in socket.recv_fds(client, 65536, 64)[1]:
                os.close(number)


def test_the_record_is_written_before_the_descriptor_leaves_or_nothing_leaves(tmp_path):
    with world(tmp_path) as one:
        client, connected = one.connect()
        one.ends[2].setblocking(False)
        try:
            while True:
                one.ends[2].send(b"x" * 1000)
        except BlockingIOError:
            pass
        one.inbox.send(link.INBOX_TO_OPENER.encode(link.Open(connected.connection, (Device("/dev/null", "rw"),))))
        outcome = one.hear()
        assert type(outcome.refusal).__name__ == "RateLimited"
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.recv(1)


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([b"\xff"], "unknown message type"),
        ([b""], "the inbox is gone"),
        ([link.STOP], "cut at 1"),
        ([link.PING], "cut at 1"),
        ([link.PONG], "a Pong without a Ping"),
        ([link.INBOX_TO_OPENER.encode(link.Open(99, (Device("/dev/null", "ro"),)))], "does not exist"),
        ([link.INBOX_TO_OPENER.encode(link.Shutdown(99))], "does not exist"),
        ([b"\2" + link.INBOX_TO_OPENER.encode(link.Shutdown(1))[1:] + b"\1"], "unknown message type"),  # the keeper's
        ([link.INBOX_TO_OPENER.encode(link.Closed(99, 0))], "does not exist"),
        (
            [link.INBOX_TO_OPENER.encode(link.Closed(1, 0)), link.INBOX_TO_OPENER.encode(link.Closed(1, 0))],
            "does not exist",
        ),
        (
            [
                link.INBOX_TO_OPENER.encode(link.Closed(1, 0)),
                link.INBOX_TO_OPENER.encode(link.Open(1, (Device("/dev/null", "ro"),))),
            ],
            "does not exist",
        ),
        (
            [link.INBOX_TO_OPENER.encode(admin.Reload(1)), link.INBOX_TO_OPENER.encode(admin.Reload(1))],
            "which is reloading",
        ),
        (
            [link.INBOX_TO_OPENER.encode(link.Shutdown(1)), OPEN],
            "which is stopping",
        ),
        (
            [
                link.INBOX_TO_OPENER.encode(link.Open(1, (Device("/dev/null", "rw"),))),
                link.INBOX_TO_OPENER.encode(link.Closed(1, link.NOT_TAKEN)),
            ],
            "said never to have come",
        ),
        ([link.DRAINED], "without being told"),
        ([b"x" * 140000], "at most 131072"),
        ([link.INBOX_TO_OPENER.encode(link.Open(1, (Device("/dev/null", "ro"),)))[:-1]], "cut at"),
        ([link.INBOX_TO_OPENER.encode(link.Open(1, (Device("/dev/null", "ro"),))) + b"x"], "too many"),
    ],
    ids=range(18),
)
def test_an_inbox_that_breaks_its_rules_ends_the_service(tmp_path, messages, why):
    with world(tmp_path) as one:
        one.connect()
        for message in messages:
            one.inbox.send(message) if message else one.inbox.shutdown(socket.SHUT_RDWR)
        assert why in one.violated()


def test_an_inbox_gets_no_descriptor_and_no_other_identity(tmp_path):
    """It may ask in the name of a client that is connected; then that client gets the answer, and it the outcome."""
    with world(tmp_path) as one:
        _, first = one.connect()
        other, second = one.connect()
        one.inbox.send(
            link.INBOX_TO_OPENER.encode(
                link.Open(second.connection, (Device("/dev/null", "ro"), Device("/dev/zero", "ro")))
            )
        )
        assert type(one.hear().refusal).__name__ == "Denied"
        one.inbox.send(link.INBOX_TO_OPENER.encode(link.Open(second.connection, (Device("/dev/null", "ro"),))))
        data, numbers, _, _ = socket.recv_fds(one.inbox, 1000, 5)
        assert not numbers
        assert link.OPENER_TO_INBOX.decode(data)._replace(sent_us=0) == link.Outcome(second.connection, None)
        _, numbers, _, _ = socket.recv_fds(other, 65536, 5)
        assert len(numbers) == 1
        os.close(numbers[0])
        assert first.connection != second.connection


def test_descriptors_that_the_inbox_sends_are_not_taken(tmp_path):
    with world(tmp_path) as one:
        _, connected = one.connect()
        before = len(os.listdir("/proc/self/fd"))
        message = link.INBOX_TO_OPENER.encode(link.Open(connected.connection, (Device("/dev/zero", "ro"),)))
        for _ in range(20):
            socket.send_fds(one.inbox, [message], [one.journal.fileno()] * 5)
            assert type(one.hear().refusal).__name__ == "Denied"
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_new_policy_holds_from_the_next_request_on(tmp_path):
    with world(tmp_path) as one:
        _, connected = one.connect()
        policy = one.policy("version: 1\n")
        policy_fd = memfd.sealed("policy", to_bytes(policy))
        socket.send_fds(one.launcher, [link.LAUNCHER_TO_OPENER.encode(link.Policy(2))], [policy_fd])
        os.close(policy_fd)
        assert link.OPENER_TO_LAUNCHER.decode(one.launcher.recv(100)) == link.Applied(2)
        # what the inbox is told comes before the answer to anything that it asks afterwards
        assert one.hear() == Use(2, 1)
        assert one.hear() == connected._replace(gids=())
        one.inbox.send(link.INBOX_TO_OPENER.encode(link.Open(connected.connection, (Device("/dev/null", "ro"),))))
        assert type(one.hear().refusal).__name__ == "Denied"


def test_a_request_of_a_client_that_has_left_while_draining_is_no_fault(tmp_path):
    """The inbox is gone by then: it had closed that client, and nothing else was left to wait for."""
    with world(tmp_path) as one:
        one.connect()
        one.launcher.send(link.STOP)
        assert one.hear() == link.Drain()
        one.inbox.send(OPEN)
        one.inbox.send(link.INBOX_TO_OPENER.encode(link.Closed(1, 0)))
        one.inbox.close()
        one.thread.join(30)
        assert not one.thread.is_alive()
        assert one.error is None


def refused(path):
    with socket.socket(socket.AF_UNIX) as late:
        late.settimeout(1)
        return late.connect_ex(path) == errno.ECONNREFUSED


def test_stop_drains_the_inbox_and_ends_in_order(tmp_path):
    with world(tmp_path) as one:
        _, connected = one.connect()
        one.launcher.send(link.STOP)
        assert one.hear() == link.Drain()
        end_s = time.monotonic() + 30
        while not refused(one.path):  # a thread closes the listener
            assert time.monotonic() < end_s
        one.inbox.send(link.INBOX_TO_OPENER.encode(link.Closed(connected.connection, 0)))
        one.inbox.send(link.DRAINED)
        one.inbox.close()
        one.thread.join(30)
        assert not one.thread.is_alive()
        assert one.error is None


def test_one_ping_speaks_for_both(tmp_path):
    with world(tmp_path) as one:
        one.launcher.send(link.PING)
        assert one.hear() == link.Ping()
        one.inbox.send(link.PONG)
        assert one.launcher.recv(10) == link.PONG


def test_without_a_descriptor_for_an_administrators_process_it_is_told_to_come_again(tmp_path, monkeypatch):
    """EMFILE ended the service."""
    with world(tmp_path) as one:
        _, connected = one.connect()
        end_s = time.monotonic() + 5
        while not one.opener._connections:  # the inbox hears of it first
            assert time.monotonic() < end_s
        (connection,) = one.opener._connections.values()
        connection.view = connection.view._replace(administrator=True)

        def process(*_):
            raise OSError(errno.EMFILE, "")

        monkeypatch.setattr(one.opener._door.identifier, "process", process)
        one.inbox.send(link.INBOX_TO_OPENER.encode(admin.Reload(connected.connection)))
        said = one.hear()
        assert isinstance(said.refusal, RateLimited)
        assert one.thread.is_alive()


# ---- the keeper


def we_came(number, gids=()):
    return came(number, os.getuid(), None, os.getpid(), gids=gids, gid=os.getgid())


def test_the_keeper_hears_of_a_connection_before_the_inbox_and_of_its_end(tmp_path):
    with world(tmp_path) as one:
        for number in (1, 2):
            _, connected = one.connect()
            one.keeper.setblocking(False)
            said = one.keeper_hears()
            assert said._replace(foreign=False, label="", owner=os.getuid()) == we_came(connected.connection)
            assert connected.connection == number
        one.keeper.settimeout(30)
        one.inbox.send(link.INBOX_TO_OPENER.encode(link.Closed(1, 0)))
        assert one.keeper_hears() == keeper.Ended(1)


def test_all_come_again_for_another_policy_with_the_groups_that_it_names(tmp_path):
    with world(tmp_path) as one:
        for _ in range(3):
            one.connect()
            one.keeper_hears()
        one.inbox.send(link.INBOX_TO_OPENER.encode(link.Closed(2, 0)))
        assert one.keeper_hears() == keeper.Ended(2)
        mine = os.getgid()
        text = f"version: 1\ngroups: {{{mine}: {{devices: [{{path: /dev/null}}]}}, 50001: {{limits: {{burst: 9}}}}}}\n"
        policy_fd = memfd.sealed("policy", to_bytes(one.policy(text)))
        socket.send_fds(one.launcher, [link.LAUNCHER_TO_OPENER.encode(link.Policy(7))], [policy_fd])
        os.close(policy_fd)
        assert one.keeper_hears() == Use(7, 2)
        again = [one.keeper_hears() for _ in range(2)]
        assert [(said.connection, said.gids) for said in again] == [(1, (mine,)), (3, (mine,))]
        assert link.OPENER_TO_LAUNCHER.decode(one.launcher.recv(100)) == link.Applied(7)


def test_a_list_that_the_keeper_has_refused_is_recorded(tmp_path):
    """As far as its client is there; the refusal itself is between keeper and inbox."""
    with world(tmp_path) as one:
        for number in (1, 2):
            assert one.connect()[1].connection == number
        one.inbox.send(link.INBOX_TO_OPENER.encode(link.Closed(1, 0)))
        assert [type(one.keeper_hears()) for _ in range(3)] == [Came, Came, keeper.Ended]
        for number in (1, 2):
            one.keeper.send(keeper.KEEPER_TO_OPENER.encode(keeper.ListRefused(number, 250)))
        text = one.journal.recv(65536).decode()
        assert "refused" in text
        assert "FDBROKER_CAUSE=rate\n" in text
        assert "250" in text
        one.journal.setblocking(False)
        with pytest.raises(BlockingIOError):
            one.journal.recv(65536)
        one.inbox.settimeout(0.2)
        with pytest.raises(TimeoutError):
            one.inbox.recv(100)


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (b"\xff", "unknown message type"),
        (b"", "the keeper is gone"),
        (keeper.KEEPER_TO_OPENER.encode(keeper.ListRefused(2, 1)), "connection 2, which does not exist"),
        (keeper.KEEPER_TO_OPENER.encode(keeper.ListRefused(1, 1))[:-1], "cut at"),
        (keeper.KEEPER_TO_OPENER.encode(keeper.ListRefused(1, 1)) + b"x", "1 bytes too many"),
        (b"x" * 140000, "at most 131072"),
    ],
    ids=range(6),
)
def test_a_keeper_that_breaks_its_rules_ends_the_service(tmp_path, message, why):
    with world(tmp_path) as one:
        one.connect()
        one.keeper.send(message) if message else one.keeper.shutdown(socket.SHUT_RDWR)
        assert why in one.violated()


def test_while_the_keeper_reads_nothing_nobody_more_is_let_in_and_the_others_are_served(tmp_path):
    """What waits for it stays bounded, and whoever comes later is told of first to the keeper, as everybody."""
    with world(tmp_path) as one:
        one.ends[4].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
        one.inbox.settimeout(0.5)
        count = 0
        with pytest.raises(TimeoutError):
            while count < 60:
                one.connect()
                count += 1
        assert 1 <= count < 60
        late = socket.socket(socket.AF_UNIX)
        one.clients.append(late)
        late.connect(one.path)
        one.inbox.settimeout(30)
        one.inbox.send(OPEN)
        assert one.hear() == link.Outcome(1, None)
        numbers = []
        while count + 2 not in numbers:
            numbers.append(one.keeper_hears().connection)
        assert sorted(set(numbers)) == list(range(1, count + 3))
        for number in (count + 1, count + 2):
            data, (copy,), _, _ = socket.recv_fds(one.inbox, 1000, 2)
            os.close(copy)
            assert link.OPENER_TO_INBOX.decode(data).connection == number
        _, numbers, _, _ = socket.recv_fds(one.clients[0], 65536, 2)
        os.close(numbers[0])
