"""The opener's loop with a scripted inbox and keeper: what these can and cannot make it do once they are taken over."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import socket
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from fakes import came

from fdbroker.errors import LinkViolation, OpenFailed, RateLimited
from fdbroker.kernel.capabilities import Bracket
from fdbroker.kernel.link import Link
from fdbroker.kernel.sealed import sealed_memfd
from fdbroker.limits import every as limits
from fdbroker.opener.ask import Asking
from fdbroker.opener.audit import Audit
from fdbroker.opener.authorize import Connection
from fdbroker.opener.open import Nodes
from fdbroker.opener.service import Opener
from fdbroker.policy.compile import load_policy
from fdbroker.policy.compiled import to_bytes
from fdbroker.terms import Device
from fdbroker.topics import TopicUse
from fdbroker.wire import admin, keeper, link, lists
from fdbroker.wire.audit import Record
from fdbroker.wire.connections import Use
from fdbroker.wire.launcher import DRAINED, STOP

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
        audit = Audit(journal_end, links[2])
        self.opener = Opener(listener, *links, Asking(None), policy, self.nodes, audit)
        self.ends = [launcher_end, inbox_end, journal_end, listener, keeper_end]
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run)
        self.clients: list[socket.socket] = []
        self.others: list[object] = []  # what the keeper has heard, and no test looked at

    def policy(self, text):
        self.file.write_text(text)
        return load_policy(str(self.file), trusted=False).policy

    def _run(self):
        try:
            self.opener.serve()
        except BaseException as error:
            self.error = error

    def knock(self):
        """A client, and its number, once the keeper has heard of it."""
        client = socket.socket(socket.AF_UNIX)
        self.clients.append(client)
        client.settimeout(30)
        client.connect(self.path)
        return client, self.heard_knock().connection

    def connect(self):
        """A client that is let in, and what the inbox hears of it."""
        client, number = self.knock()
        self.keeper.send(keeper.KEEPER_TO_OPENER.encode(keeper.LetIn(number)))
        data, (number,), _, _ = socket.recv_fds(self.inbox, 1000, 2)
        copy = socket.socket(fileno=number)
        self.clients.append(copy)
        return client, link.OPENER_TO_INBOX.decode(data)

    def hear(self):
        said = link.OPENER_TO_INBOX.decode(self.inbox.recv(200000))
        return said._replace(sent_us=0) if isinstance(said, link.Outcome) else said  # how long it took is the machine's

    def heard_knock(self):
        """The next knock; what the keeper hears before it is kept in `others`."""
        while not isinstance(said := self.heard(), keeper.Knock):
            self.others.append(said)
        return said

    def keeper_hears(self):
        """What the keeper hears next, but knocks."""
        while isinstance(said := self.others.pop(0) if self.others else self.heard(), keeper.Knock):
            pass
        return said

    def heard(self):
        return keeper.OPENER_TO_KEEPER.decode(self.keeper.recv(200000))

    def violated(self):
        self.thread.join(30)
        assert isinstance(self.error, LinkViolation), self.error
        return str(self.error)


@contextmanager
def world(tmp_path):
    tmp_path.mkdir(exist_ok=True)
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
        for connection in (*opener._connections.values(), *itertools.chain(*opener._door._lingering.values())):
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


def test_a_reply_that_was_cut_ends_the_connection_and_its_descriptors_have_left(tmp_path):
    """On a machine with tiny buffers: they go with the first part, so the records are true."""
    with world(tmp_path) as one:
        client, connected = one.connect()
        end_s = time.monotonic() + 30
        while connected.connection not in one.opener._connections:  # the inbox hears of it before
            assert time.monotonic() < end_s
        one.opener._connections[connected.connection].sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
        asked = (Device("/dev/null", "rw"),) * limits.RESOURCES_PER_OPEN
        one.inbox.send(link.INBOX_TO_OPENER.encode(link.Open(connected.connection, asked)))
        assert one.hear() == link.Outcome(connected.connection, None)
        data, numbers, _, _ = socket.recv_fds(client, 65536, len(asked))
        for number in numbers:
            os.close(number)
        while part := client.recv(65536):
            data += part
        assert (len(numbers), data[-1:] == b"\0") == (len(asked), False)
        assert b"granted" in one.journal.recv(65536)
        one.journal.setblocking(False)
        with pytest.raises(BlockingIOError):
            one.journal.recv(65536)


def test_nothing_is_done_for_a_client_that_has_hung_up(tmp_path, monkeypatch):
    """All others would wait until the requests of connections that have ended are judged, each with its resources."""
    with world(tmp_path) as one:
        looked: list[object] = []
        some = one.nodes.open_some
        monkeypatch.setattr(one.nodes, "open_some", lambda *given: looked.append(given) or some(*given))
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
            assert (refusal, len(looked)) == (None, 2 * 64 // limits.RESOURCES_AT_ONCE - 1)  # judged, opened
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
        ([STOP], "cut at 1"),
        ([link.PING], "unknown message type 7"),
        ([lists.INBOX_TO_KEEPER.encode(lists.DeniedUse(1, TopicUse("send", "x")))], "unknown message type 6"),
        ([lists.INBOX_TO_KEEPER.encode(lists.Slowed(1))], "unknown message type 7"),
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
        ([DRAINED], "without being told"),
        ([b"x" * 140000], "at most 131072"),
        ([link.INBOX_TO_OPENER.encode(link.Open(1, (Device("/dev/null", "ro"),)))[:-1]], "cut at"),
        ([link.INBOX_TO_OPENER.encode(link.Open(1, (Device("/dev/null", "ro"),))) + b"x"], "too many"),
    ],
    ids=range(20),
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
        policy_fd = sealed_memfd("policy", to_bytes(policy))
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
        one.launcher.send(STOP)
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
        one.launcher.send(STOP)
        assert one.hear() == link.Drain()
        end_s = time.monotonic() + 30
        while not refused(one.path):  # a thread closes the listener
            assert time.monotonic() < end_s
        one.inbox.send(link.INBOX_TO_OPENER.encode(link.Closed(connected.connection, 0)))
        one.inbox.send(DRAINED)
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
            assert said.comm == Path("/proc/self/comm").read_text().strip()
            said = said._replace(foreign=False, label="", owner=os.getuid(), comm="")
            assert said == we_came(connected.connection)
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
        policy_fd = sealed_memfd("policy", to_bytes(one.policy(text)))
        socket.send_fds(one.launcher, [link.LAUNCHER_TO_OPENER.encode(link.Policy(7))], [policy_fd])
        os.close(policy_fd)
        assert one.keeper_hears() == Use(7, 2)
        again = [one.keeper_hears() for _ in range(2)]
        assert [(said.connection, said.gids) for said in again] == [(1, (mine,)), (3, (mine,))]
        assert link.OPENER_TO_LAUNCHER.decode(one.launcher.recv(100)) == link.Applied(7)


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (b"\xff", "unknown message type 255"),
        (b"", "the keeper is gone"),
        (link.INBOX_TO_OPENER.encode(link.Closed(1, 0)), "Waits: 1 bytes too many"),
        (keeper.OPENER_TO_KEEPER.encode(keeper.Ended(1)), "Waits of connection 1, which does not wait"),
        (b"x" * 140000, "at most 131072"),
    ],
    ids=range(5),
)
def test_a_keeper_that_breaks_its_rules_ends_the_service(tmp_path, message, why):
    with world(tmp_path) as one:
        one.connect()
        one.keeper.send(message) if message else one.keeper.shutdown(socket.SHUT_RDWR)
        assert why in one.violated()


def test_while_the_keeper_reads_nothing_nobody_more_is_let_in_and_the_others_are_served(tmp_path):
    """What waits for it stays bounded, and all who come later are let in when it says so."""
    with world(tmp_path) as one:
        client, _ = one.connect()
        one.ends[4].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
        for _ in range(60):
            late = socket.socket(socket.AF_UNIX)
            one.clients.append(late)
            late.connect(one.path)
        one.inbox.send(OPEN)
        assert one.hear() == link.Outcome(1, None)
        assert 1 < one.opener._door.last_number < 61
        for number in range(2, 62):
            assert one.heard_knock().connection == number
            one.keeper.send(keeper.KEEPER_TO_OPENER.encode(keeper.LetIn(number)))
        for number in range(2, 62):
            data, (copy,), _, _ = socket.recv_fds(one.inbox, 1000, 2)
            os.close(copy)
            assert link.OPENER_TO_INBOX.decode(data).connection == number
        _, numbers, _, _ = socket.recv_fds(client, 65536, 2)
        os.close(numbers[0])


def test_what_the_launcher_has_no_room_for_it_is_told_later(tmp_path):
    """It reads nothing while it loads a policy: a stop that an administrator asks for meanwhile would be lost."""
    with world(tmp_path) as one:
        one.ends[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
        for _ in range(60):
            one.launcher.send(link.PING)
            assert one.hear() == link.Ping()
            one.inbox.send(link.PONG)
        client, connected = one.connect()
        one.inbox.send(link.INBOX_TO_OPENER.encode(link.Open(connected.connection, (Device("/dev/null", "rw"),))))
        os.close(socket.recv_fds(client, 65536, 2)[1][0])  # so all pongs were read
        assert one.opener._launcher.waiting
        assert [one.launcher.recv(10) for _ in range(60)] == [link.PONG] * 60


def test_so_many_knock_at_once_and_who_waits_is_none_of_them(tmp_path):
    """Whoever is turned away may be slow to close: only some are accepted before the keeper has said who is."""
    with world(tmp_path) as one:
        most = 32
        late = [socket.socket(socket.AF_UNIX) for _ in range(most + 16)]
        one.clients += late
        for sock in late:
            sock.connect(one.path)
        assert [one.heard_knock().connection for _ in range(most)] == list(range(1, most + 1))
        one.keeper.settimeout(0.3)
        with pytest.raises(TimeoutError):
            one.heard_knock()
        one.keeper.settimeout(30)
        for number in range(1, 17):
            one.keeper.send(keeper.KEEPER_TO_OPENER.encode(keeper.Waits(number)))
            assert one.heard_knock().connection == number + most
        one.keeper.send(keeper.KEEPER_TO_OPENER.encode(keeper.LetIn(9)))
        data, (copy,), _, _ = socket.recv_fds(one.inbox, 1000, 2)
        os.close(copy)
        assert link.OPENER_TO_INBOX.decode(data).connection == 9
        one.keeper.send(keeper.KEEPER_TO_OPENER.encode(keeper.TurnAway(10, 1)))
        assert "TurnAway of connection 10, which does not wait for that" in one.violated()


def test_who_hangs_up_while_it_waits_is_told_of_and_turned_away(tmp_path):
    """At 2 requests a second its connections, and what it had sent, stayed for half a minute after its end."""
    with world(tmp_path) as one:
        client, number = one.knock()
        one.knock()
        for waiting in (number, number + 1):
            one.keeper.send(keeper.KEEPER_TO_OPENER.encode(keeper.Waits(waiting)))
        client.close()
        assert one.keeper_hears() == keeper.HungUp(number)
        for _ in range(2):
            one.keeper.send(keeper.KEEPER_TO_OPENER.encode(keeper.TurnAway(number, 0)))
        assert f"TurnAway of connection {number}, which does not wait for that" in one.violated()


@pytest.mark.parametrize("said", [keeper.LetIn(2), keeper.TurnAway(2, 64)])
def test_the_keeper_lets_in_or_turns_away_who_waits_and_nobody_else(tmp_path, said):
    """Nobody who has not come, nobody who is here, nobody twice: each ends the service."""
    for number in (1, 2, 3):
        with world(tmp_path / str(number)) as one:
            one.connect()
            client, waiting = one.knock()
            assert waiting == 2
            one.keeper.send(keeper.KEEPER_TO_OPENER.encode(said._replace(connection=number)))
            if number != 2:
                assert f"{type(said).__name__} of connection {number}, which does not wait" in one.violated()
                continue
            if isinstance(said, keeper.TurnAway):
                assert json.loads(client.recv(1000)[:-1])["parameters"] == {"limit": "connections", "maximum": 64}
                assert client.recv(10) == b""
                assert [one.keeper_hears() for _ in range(2)][1].kind == "turned-away"
            else:
                data, (copy,), _, _ = socket.recv_fds(one.inbox, 1000, 2)
                os.close(copy)
                assert link.OPENER_TO_INBOX.decode(data).connection == 2
            one.keeper.send(keeper.KEEPER_TO_OPENER.encode(said))
            assert "which does not wait" in one.violated()


@pytest.mark.parametrize(("connections", "let_in"), [(64, True), (65, False)])
def test_whom_the_keeper_lets_in_the_policy_may_still_not(tmp_path, connections, let_in):
    with world(tmp_path) as one:
        for _ in range(connections - 1):
            one.connect()
            one.keeper_hears()
        client, number = one.knock()
        one.keeper.send(keeper.KEEPER_TO_OPENER.encode(keeper.LetIn(number)))
        if let_in:
            assert one.keeper_hears().connection == number
            os.close(socket.recv_fds(one.inbox, 1000, 2)[1][0])
            return
        assert json.loads(client.recv(1000)[:-1])["parameters"] == {"limit": "connections", "maximum": 64}
        assert one.keeper_hears().kind == "turned-away"
        assert one.keeper_hears() == keeper.Ended(number)


def test_the_keeper_hears_who_breaks_the_rules_and_what_lingers(tmp_path):
    with world(tmp_path) as one:
        client, _ = one.connect()
        one.inbox.send(OPEN)
        one.inbox.send(link.INBOX_TO_OPENER.encode(link.Closed(1, 1)))
        assert one.hear() == link.Outcome(1, None)
        assert [one.keeper_hears() for _ in range(4)][2:] == [keeper.Broke(1), keeper.Lingers(1)]
        one.keeper.settimeout(0.3)
        with pytest.raises(TimeoutError):
            one.keeper_hears()
        one.keeper.settimeout(30)
        os.close(socket.recv_fds(client, 65536, 2)[1][0])
        assert one.keeper_hears() == keeper.Ended(1)


def test_what_ended_connections_left_unread_is_looked_at_for_no_knock_but_for_one_too_many(tmp_path, monkeypatch):
    """Each of them would be asked of the kernel again and again, for whoever only connects."""
    with world(tmp_path) as one:
        client, _ = one.connect()
        one.inbox.send(OPEN)
        one.inbox.send(link.INBOX_TO_OPENER.encode(link.Closed(1, 0)))
        assert one.hear() == link.Outcome(1, None)
        assert [one.keeper_hears() for _ in range(2)][1] == keeper.Lingers(1)
        looked, lingers = [], Connection.lingers
        monkeypatch.setattr(Connection, "lingers", lambda self: looked.append(self.number) or lingers(self))
        monkeypatch.setattr(type(one.opener._door), "sweep", lambda *_: None)
        for said in (keeper.TurnAway(2, 64), keeper.Waits(3), keeper.LetIn(4)):
            one.knock()
            one.keeper.send(keeper.KEEPER_TO_OPENER.encode(said))
        os.close(socket.recv_fds(one.inbox, 1000, 2)[1][0])
        assert looked == []
        os.close(socket.recv_fds(client, 65536, 2)[1][0])
        for _ in range(limits.USER_LIMITS["connections"].default - 2):
            one.connect()
        assert looked == []
        one.connect()  # without the first one, whose grant has been read
        assert looked == [1]
        while one.keeper_hears() != keeper.Ended(1):
            pass


def test_the_keeper_hears_that_several_owners_have_work(tmp_path, monkeypatch):
    with world(tmp_path) as one:
        whose = iter([5, 5, 6, 5, 6])
        owners = one.opener._door.views.policy.owners
        monkeypatch.setattr(type(owners), "of", lambda self, uid: next(whose))
        for expected in ([], [], [keeper.Contested()], [], []):
            _, number = one.knock()
            one.keeper.send(keeper.KEEPER_TO_OPENER.encode(keeper.Waits(number)))
            assert one.others == expected
            one.others.clear()


def waits_for_the_keeper(one):
    """Until as much waits in the opener for room in the keeper's link as may."""
    end_s = time.monotonic() + 30
    while one.opener._keeper.waiting <= limits.KEEPER_WAITING:
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_a_flood_of_refusals_that_the_keeper_does_not_read_waits_at_the_inbox_and_none_is_lost(tmp_path):
    """LINK_WAITING would end the service; what waits in the opener is what one message brought."""
    count = 500
    with world(tmp_path) as one:
        _, connected = one.connect()
        one.ends[4].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
        one.inbox.setblocking(False)
        asked, heard, most = 0, 0, 0
        end_s = time.monotonic() + 1
        while time.monotonic() < end_s:  # the inbox asks again when it has an answer, as an inbox does
            with contextlib.suppress(BlockingIOError):
                if asked == heard:
                    device = Device(f"/dev/no{asked}", "ro")
                    one.inbox.send(link.INBOX_TO_OPENER.encode(link.Open(connected.connection, (device,))))
                    asked += 1
                heard += isinstance(one.hear(), link.Outcome)
            most = max(most, one.opener._keeper.waiting)
        assert limits.KEEPER_WAITING < heard < count
        assert asked == heard + 1
        assert most == limits.KEEPER_WAITING + 1
        one.keeper.settimeout(30)
        one.inbox.settimeout(30)
        said = []
        reader = threading.Thread(target=lambda: said.extend(one.keeper_hears() for _ in range(count + 1)))
        reader.start()
        for number in range(heard, count):
            if number > heard:
                device = Device(f"/dev/no{number}", "ro")
                one.inbox.send(link.INBOX_TO_OPENER.encode(link.Open(connected.connection, (device,))))
            assert isinstance(one.hear(), link.Outcome)
        reader.join(30)
        assert [record.resource for record in said[1:]] == [f"/dev/no{number}" for number in range(count)]


def test_while_it_waits_for_the_keeper_the_opener_does_not_spin(tmp_path):
    with world(tmp_path) as one:
        _, connected = one.connect()
        one.ends[4].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
        message = link.INBOX_TO_OPENER.encode(link.Open(connected.connection, (Device("/dev/no", "ro"),)))
        for _ in range(100):
            one.inbox.send(message)
        waits_for_the_keeper(one)
        turns, arm = [], one.opener._arm
        one.opener._arm = lambda: (turns.append(1), arm())
        time.sleep(0.5)
        assert len(turns) < 5


def test_the_last_refusals_are_said_before_the_end(tmp_path):
    """The inbox is gone with all that it had to say, and there is no room in the keeper's link, which ends after us."""
    count = 20
    with world(tmp_path) as one:
        for _ in range(count):
            one.connect()
            one.keeper_hears()
        one.ends[4].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
        one.launcher.send(STOP)
        assert one.hear() == link.Drain()
        for number in range(1, count + 1):
            one.inbox.send(link.INBOX_TO_OPENER.encode(link.Closed(number, 1)))
        one.inbox.send(DRAINED)
        one.inbox.close()
        time.sleep(0.3)
        said = [one.keeper_hears() for _ in range(3 * count)]
        assert [record.connection for record in said if isinstance(record, Record)] == list(range(1, count + 1))
        assert {record.kind for record in said if isinstance(record, Record)} == {"disconnected"}
        one.thread.join(30)
        assert not one.thread.is_alive()
        assert one.error is None
