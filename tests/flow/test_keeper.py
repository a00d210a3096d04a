"""The keeper's loop with a scripted launcher, opener and inbox: who is heard first, who is waited for, what ends it."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from fakes import came

from fdbroker.keeper import changes, service
from fdbroker.keeper import refusals as refusals_module
from fdbroker.keeper.refusals import Refusals
from fdbroker.keeper.service import Keeper
from fdbroker.kernel.link import Link
from fdbroker.kernel.sealed import sealed_memfd
from fdbroker.limits import every as limits
from fdbroker.nodes.find import Finder
from fdbroker.policy.compile import load_policy
from fdbroker.policy.compiled import to_bytes
from fdbroker.refusals import LinkViolation
from fdbroker.terms import Device, Subject
from fdbroker.topics import TopicUse
from fdbroker.wire import keeper, link, lists
from fdbroker.wire.audit import Record, fields
from fdbroker.wire.connections import Use
from fdbroker.wire.keeper import Ended
from fdbroker.wire.launcher import KEEPER_TO_LAUNCHER, LAUNCHER_TO_KEEPER, STOP, Given
from fdbroker.wire.lists import ListRefused

POLICY = 'version: 1\neveryone: {devices: [{path: "/dev/known*", access: rw}]}\nlimits: {burst: 60, requests_per_second: 1}\n'
OTHER = 'version: 1\neveryone: {devices: [{path: "/dev/other*", access: rw}]}\n'
ALICE = Subject(1000, frozenset(), 1000, 7, "program", "label", foreign=True, owner=1000)
REFUSED = Record("refused", "open", 1, ALICE, "why", "cause", "p.yaml:7", "/dev/x", "rw")
USE = TopicUse("send", "topic")
DENIED = lists.INBOX_TO_KEEPER.encode(lists.DeniedUse(1, USE))
LIST, WATCH = (lists.INBOX_TO_KEEPER.encode(lists.List(1, watch)) for watch in (False, True))


class World:
    """Plays launcher, opener and inbox."""

    def __init__(self, folder: Path):
        pair = lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pairs = [pair(), pair(), pair()]
        self.launcher, self.opener, self.inbox = (ours for ours, _ in pairs)
        for sock in (self.launcher, self.opener, self.inbox):
            sock.settimeout(30)
        self.ends = [theirs for _, theirs in pairs]
        self.links = [Link(end) for end in self.ends]
        self.file = folder / "policy.yaml"
        self.finder = Finder()
        self.journal, self.journal_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.refusals = Refusals(self.journal_end)
        self.keeper = Keeper(*self.links, self.policy(POLICY), self.finder, self.refusals)
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run)

    def policy(self, text):
        self.file.write_text(text)
        return load_policy(str(self.file), trusted=False).policy

    def _run(self):
        try:
            self.keeper.serve()
        except BaseException as error:
            self.error = error

    def say(self, message):
        """What the opener says."""
        self.opener.send(keeper.OPENER_TO_KEEPER.encode(message))

    def came(self, number, owner=1000):
        self.say(came(number, owner, owner, 1, False, "", ()))

    def hand_on(self, number, text):
        """The launcher's policy of that number."""
        descriptor = sealed_memfd("policy", to_bytes(self.policy(text)))
        socket.send_fds(self.launcher, [LAUNCHER_TO_KEEPER.encode(link.Policy(number))], [descriptor])
        os.close(descriptor)

    def ask(self, number, *, watch=False):
        """What the inbox asks."""
        self.inbox.send(lists.INBOX_TO_KEEPER.encode(lists.List(number, watch)))

    def hear(self):
        """The next whole listing, as (number, paths), or refusal, as the inbox hears it."""
        paths = []
        while True:
            said = lists.KEEPER_TO_INBOX.decode(self.inbox.recv(200_000))
            if isinstance(said, ListRefused):
                return said
            paths += [offer.resource.path for offer in said.offers]
            if said.last:
                return said.connection, paths

    def records(self, count=0):
        """What has been written of refusals since the last time, once there are so many records."""
        found = []
        self.journal.settimeout(30)
        with contextlib.suppress(BlockingIOError):
            while True:
                if len(found) == count:
                    self.journal.setblocking(False)
                lines = self.journal.recv(65536).decode().splitlines()
                found.append(dict(line.split("=", 1) for line in lines))
        return found

    def launchers(self):
        """What the launcher hears next."""
        return KEEPER_TO_LAUNCHER.decode(self.launcher.recv(100))

    def pinged(self):
        """Whether it serves; what it has said to the launcher before is heard by then."""
        self.launcher.send(link.PING)
        return self.launchers()

    def is_silent(self):
        """Whether it says nothing to the inbox for a while."""
        self.inbox.settimeout(0.3)
        try:
            return not self.inbox.recv(200_000)
        except TimeoutError:
            return True
        finally:
            self.inbox.settimeout(30)

    def ended(self):
        self.thread.join(30)
        return not self.thread.is_alive()

    def violated(self):
        assert self.ended()
        assert isinstance(self.error, LinkViolation), self.error
        return str(self.error)


@contextmanager
def world(tmp_path):
    """With two nodes, one for each policy, and what makes modes no matter."""
    for name in ("known", "other"):
        os.mknod(f"/dev/{name}", 0o20600, os.makedev(1, 3))
    one = World(tmp_path)
    one.launcher.send(LAUNCHER_TO_KEEPER.encode(Given(True, True, ())))
    one.thread.start()
    assert one.launchers() == link.Ready()
    try:
        yield one
    finally:
        one.launcher.close()
        one.thread.join(30)
        assert not one.thread.is_alive()
        for sock in (one.opener, one.inbox, one.journal, one.journal_end, *one.ends):
            sock.close()
        one.keeper._epoll.close()
        os.close(one.keeper._changes.descriptor)
        one.finder.close()


def test_a_list_is_what_the_policy_says_of_who_came(dev, tmp_path):
    with world(tmp_path) as one:
        one.came(1)
        one.ask(1)
        said = lists.KEEPER_TO_INBOX.decode(one.inbox.recv(10_000))
        assert (said.connection, said.last) == (1, True)
        ((resource, rule, generation),) = said.offers
        assert resource == Device("/dev/known", "rw")
        assert rule.endswith("policy.yaml:2")
        assert generation > 0


def test_who_is_in_a_group_that_the_policy_names_has_its_rights(dev, tmp_path):
    with world(tmp_path) as one:
        one.hand_on(1, OTHER + "groups: {50001: {devices: [{path: /dev/known}]}}\n")
        one.say(Use(1, 0))
        assert one.launchers() == link.Applied(1)
        one.say(came(1, 1000, 1000, 1, False, "", (50001,)))
        one.say(came(2, 1000, 1000, 1, False, "", ()))
        for number, paths in ((1, ["/dev/known", "/dev/other"]), (2, ["/dev/other"])):
            one.ask(number)
            assert one.hear() == (number, paths)


def test_what_the_opener_has_said_is_heard_before_what_the_inbox_says_after_it(dev, tmp_path):
    """Both come while the inbox is read already: it hears of a connection after the keeper was told."""
    with world(tmp_path) as one:
        one.came(1)
        inbox, late = one.links[2], [2]
        receive = inbox.receive

        def receive_and_more():
            if late:
                number = late.pop()
                one.came(number)
                one.ask(number)
            return receive()

        inbox.receive = receive_and_more
        one.ask(1)
        assert [one.hear() for _ in range(2)] == [(1, ["/dev/known"]), (2, ["/dev/known"])]
        assert late == []
        assert one.pinged() == link.Pong()


# ---- whose end is whose


def test_without_an_inbox_it_goes_on_until_the_opener_has_ended(dev, tmp_path):
    """The opener may have things to say until it has ended, too."""
    with world(tmp_path) as one:
        one.came(1)
        one.ask(1, watch=True)
        assert one.hear() == (1, ["/dev/known"])
        one.inbox.close()
        one.came(2)
        one.say(Ended(1))
        assert one.pinged() == link.Pong()
        one.hand_on(1, OTHER)
        one.say(Use(1, 1))
        one.came(2)
        assert one.launchers() == link.Applied(1)
        one.opener.close()
        assert one.ended()
        assert one.error is None


def test_an_inbox_that_ends_with_answers_unread_ends_nothing(dev, tmp_path):
    with world(tmp_path) as one:
        fill(one)
        one.inbox.close()
        assert one.pinged() == link.Pong()
        assert one.pinged() == link.Pong()
        one.opener.close()
        assert one.ended()
        assert one.error is None


@pytest.mark.parametrize("who", ["opener", "launcher"])
def test_without_opener_or_launcher_it_ends(dev, tmp_path, who):
    with world(tmp_path) as one:
        one.came(1)
        one.ask(1, watch=True)
        assert one.hear() == (1, ["/dev/known"])
        getattr(one, who).close()
        assert one.ended()
        assert one.error is None


# ---- what ends the service


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([b"\xff"], "unknown message type"),
        ([keeper.OPENER_TO_KEEPER.encode(Ended(1))], "unknown message type"),
        ([keeper.OPENER_TO_KEEPER.encode(REFUSED)], "unknown message type 4"),
        ([lists.INBOX_TO_KEEPER.encode(lists.List(3, watch=False))], "connection 3, which does not exist"),
        ([lists.INBOX_TO_KEEPER.encode(lists.List(2**64 - 1, watch=True))], "does not exist"),
        ([LIST, LIST], "which is listing"),
        ([LIST, WATCH], "which is listing"),
        ([WATCH, WATCH], "which is watching"),
        ([WATCH, LIST], "which is watching"),
        ([LIST[:-1]], "cut at"),
        ([LIST + b"x"], "1 bytes too many"),
        ([b"x" * 140_000], "at most 131072"),
        ([DENIED[:-1]], "cut at"),
        ([lists.INBOX_TO_KEEPER.encode(lists.DeniedUse(3, USE))], "connection 3, which does not exist"),
        ([lists.INBOX_TO_KEEPER.encode(lists.Slowed(3))], "connection 3, which does not exist"),
        ([LIST, DENIED], "which is listing"),
        ([WATCH, DENIED], "which is watching"),
        ([b"\4" + DENIED[1:]], "unknown message type 4"),
    ],
    ids=range(18),
)
def test_an_inbox_that_breaks_its_rules_ends_the_service(dev, tmp_path, messages, why):
    with world(tmp_path) as one:
        one.came(1)
        one.came(2)
        one.say(Ended(2))
        one.hand_on(1, POLICY)
        one.say(Use(1, 1))
        assert one.pinged() == link.Pong()  # and the inbox is not read yet: all come at once
        for message in messages:
            one.inbox.send(message)
        one.came(1)
        assert why in one.violated()


@pytest.mark.parametrize("number", [0, 1, 3], ids=["the first one", "used", "never came"])
def test_a_policy_that_did_not_come_cannot_be_used(dev, tmp_path, number):
    """Nor one that is in force, or was."""
    with world(tmp_path) as one:
        for before in (1, 2):
            one.hand_on(before, OTHER)
        one.say(Use(2, 0))
        assert one.launchers() == link.Applied(2)
        one.say(Use(number, 0))
        assert f"policy {number} is to be used, which did not come" in one.violated()


@pytest.mark.parametrize("data", [b"\xff", b"\4\4", b"\2\0\0\0\1", DENIED])
def test_what_the_opener_may_not_say_is_a_violation(dev, tmp_path, data):
    with world(tmp_path) as one:
        one.opener.send(data)
        assert one.violated()


def test_descriptors_that_the_inbox_sends_are_not_taken(dev, tmp_path):
    with world(tmp_path) as one:
        one.came(1)
        one.ask(1)
        one.hear()  # now the device's folder is kept
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(15):
            socket.send_fds(one.inbox, [LIST], [one.opener.fileno()] * 5)
            assert one.hear() == (1, ["/dev/known"])
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_list_for_who_has_ended_is_no_fault_and_has_no_answer(dev, tmp_path):
    """The inbox asked before it heard of the end."""
    with world(tmp_path) as one:
        for number in (1, 2, 3):
            one.came(number)
        one.say(Ended(2))
        one.say(Ended(2))  # nobody knows it any more
        one.ask(2)
        one.ask(2, watch=True)
        one.ask(3)
        assert one.hear() == (3, ["/dev/known"])
        assert one.is_silent()
        assert one.pinged() == link.Pong()


# ---- another policy


def test_another_policy_is_in_force_once_all_have_come_again(dev, tmp_path):
    with world(tmp_path) as one:
        for number in (1, 2, 3):
            one.came(number)
        one.hand_on(1, OTHER)
        one.say(Use(1, 3))
        for number in (1, 2):
            one.came(number)
            assert one.pinged() == link.Pong()  # and not Applied
        one.came(3)
        assert one.launchers() == link.Applied(1)
        for number in (1, 2, 3):
            one.ask(number)
            assert one.hear() == (number, ["/dev/other"])


def test_nobody_is_answered_while_connections_come_again(dev, tmp_path):
    """What was asked before, and what is asked meanwhile, is answered by the new policy, and watches are told."""
    with world(tmp_path) as one:
        for number in (1, 2):
            one.came(number)
        one.ask(1, watch=True)
        assert one.hear() == (1, ["/dev/known"])
        one.hand_on(1, OTHER)
        one.say(Use(1, 2))
        one.came(1)
        assert one.pinged() == link.Pong()
        one.ask(2)
        os.mknod("/dev/other2", 0o20600, os.makedev(1, 3))  # a change, which is told only afterwards, too
        assert one.is_silent()
        one.came(2)
        assert one.launchers() == link.Applied(1)
        assert sorted(one.hear() for _ in range(2)) == [
            (1, ["/dev/other", "/dev/other2"]),
            (2, ["/dev/other", "/dev/other2"]),
        ]


def test_nobody_is_refused_for_its_rate_by_a_policy_that_is_no_more(dev, tmp_path):
    with world(tmp_path) as one:
        one.came(1)
        for _ in range(10_000):  # on a slow machine some of its rate comes meanwhile
            one.ask(1)
            last = one.hear()
            if isinstance(last, ListRefused):
                break
        assert isinstance(last, ListRefused)
        one.hand_on(1, OTHER + "limits: {burst: 1000, requests_per_second: 1000}\n")
        assert one.pinged() == link.Pong()
        one.say(Use(1, 1))
        assert one.pinged() == link.Pong()
        one.ask(1)
        assert one.is_silent()
        one.came(1)
        assert one.launchers() == link.Applied(1)
        assert one.hear() == (1, ["/dev/other"])


def test_a_policy_that_comes_while_the_opener_is_read_is_found(dev, tmp_path):
    """The launcher gives it to the keeper first; the opener may use it before the keeper has looked."""
    with world(tmp_path) as one:
        opener, late = one.links[1], [7]
        receive = opener.receive

        def receive_and_more():
            if late:
                one.hand_on(late.pop(), OTHER)
                one.say(Use(7, 0))
            return receive()

        opener.receive = receive_and_more
        one.came(1)
        assert one.launchers() == link.Applied(7)
        assert late == []


def test_policies_that_the_opener_never_used_are_forgotten(dev, tmp_path):
    with world(tmp_path) as one:
        for number in (1, 2, 3):
            one.hand_on(number, OTHER)
        one.say(Use(2, 0))
        assert one.launchers() == link.Applied(2)
        assert list(one.keeper._renewal._policies) == [3]
        one.say(Use(3, 0))
        assert one.launchers() == link.Applied(3)
        assert one.keeper._renewal._policies == {}


# ---- rates


def test_who_asks_too_often_is_refused_and_that_is_recorded(dev, tmp_path):
    with world(tmp_path) as one:
        one.came(1)
        one.came(2, owner=2000)
        answers = []
        while not answers or not isinstance(answers[-1], ListRefused):
            assert len(answers) < 60
            one.ask(1)
            answers.append(one.hear())
        assert len(answers) == 60 // 3 + 1  # the List, the folder and the node
        wait_ms = answers[-1].wait_ms
        assert 0 < wait_ms <= limits.WAIT_LIMIT_MS
        (record,) = one.records(1)
        why = f"too many requests, try again in {wait_ms} ms"
        assert record == fields(Record("refused", "authorize", 1, came(1, 1000).subject, why, "rate"))
        one.ask(2)
        assert one.hear() == (2, ["/dev/known"])


def test_all_uids_of_an_owner_have_one_rate(dev, tmp_path):
    """One user can be each of its subordinate uids, and connect as often as it may."""
    with world(tmp_path) as one:
        for number, uid in enumerate((1000, 100_001, 100_002), 1):
            one.say(came(number, uid, 1000, 1, True, "", ()))
        answers = []
        for number in (1, 2, 3) * 7:
            one.ask(number)
            answers.append(one.hear())
        assert [isinstance(said, ListRefused) for said in answers] == [False] * 20 + [True]


def test_a_number_that_another_client_gets_is_that_ones_owners(dev, tmp_path):
    """The first one of that number was turned away after all, and the inbox never heard of it."""
    with world(tmp_path) as one:
        one.came(1)
        for _ in range(30):
            one.ask(1)
            last = one.hear()
        assert isinstance(last, ListRefused)
        one.came(2)
        one.came(2, owner=2000)
        one.ask(2)
        assert one.hear() == (2, ["/dev/known"])


# ---- what was refused


def test_what_the_opener_refuses_is_recorded_as_it_says(dev, tmp_path):
    with world(tmp_path) as one:
        for record in (REFUSED, Record("turned-away", "identify", 0, None, "why", "limit connections")):
            one.say(record)
            assert one.records(1) == [fields(record)]


def test_what_the_inbox_refuses_is_recorded_of_whom_the_opener_names(dev, tmp_path):
    with world(tmp_path) as one:
        who = came(1, 1000, 1001, 7, True, "label", ())._replace(comm="program")
        one.say(who)
        one.inbox.send(DENIED)
        one.inbox.send(lists.INBOX_TO_KEEPER.encode(lists.Slowed(1)))
        denied, slowed = one.records(2)
        why = "no rule allows it"
        assert denied == fields(Record("refused", "authorize", 1, who.subject, why, "policy", "", "send:topic", "wo"))
        assert (denied["FDBROKER_COMM"], denied["FDBROKER_LABEL"]) == ("program", "label")
        why = "it is read more slowly than it sends"
        assert slowed == fields(Record("slowed", "decode", 1, who.subject, why))


def test_what_the_inbox_said_before_a_connection_ended_is_recorded_though_it_is_read_afterwards(dev, tmp_path):
    """The end comes by another link. Whoever ended long ago is forgotten, and no fault."""
    with world(tmp_path) as one:
        for number in range(1, service._ENDED_KEPT + 3):
            one.came(number)
            one.say(Ended(number))
            if number % 50 == 0:
                assert one.pinged() == link.Pong()
        for number in (1, 2, 3, 4):
            one.inbox.send(lists.INBOX_TO_KEEPER.encode(lists.DeniedUse(number, TopicUse("send", f"t{number}"))))
        assert [record["FDBROKER_CONNECTION"] for record in one.records(2)] == ["3", "4"]
        assert len(one.keeper._ended) == service._ENDED_KEPT
        one.inbox.send(lists.INBOX_TO_KEEPER.encode(lists.DeniedUse(5000, USE)))
        assert "connection 5000, which does not exist" in one.violated()


def test_a_count_is_written_when_its_time_is_over_though_nothing_comes(dev, tmp_path, monkeypatch):
    monkeypatch.setattr(refusals_module, "_REPEAT_S", 0.3)
    with world(tmp_path) as one:
        for _ in range(3):
            one.say(REFUSED)
        end_s = time.monotonic() + 5
        found = []
        while len(found) < 2:
            assert time.monotonic() < end_s
            found += one.records()
            time.sleep(0.02)
        assert [record.get("FDBROKER_REPEATED") for record in found] == [None, "2"]


@pytest.mark.parametrize("why", ["stop", "opener ends", "launcher ends", "inbox breaks a rule"])
def test_all_counts_are_written_at_the_end_with_what_was_said_up_to_then(dev, tmp_path, why):
    """Told to stop, it goes on, but the counts are written: for whoever does not end in time has all killed."""
    with world(tmp_path) as one:
        one.came(1)
        for _ in range(3):
            one.say(REFUSED)
            one.inbox.send(DENIED)
        if why == "stop":
            one.launcher.send(STOP)
            assert sorted(record.get("FDBROKER_REPEATED", "") for record in one.records(4)) == ["", "", "2", "2"]
            for _ in range(2):
                one.say(REFUSED)
                one.inbox.send(DENIED)
            one.opener.close()
        elif why == "opener ends":
            one.opener.close()
        elif why == "launcher ends":
            one.launcher.close()
        else:
            one.inbox.send(b"\xff")
        assert one.ended()
        counts = sorted(record.get("FDBROKER_REPEATED", "") for record in one.records())
        assert counts == (["", "", "1", "1"] if why == "stop" else ["", "", "2", "2"])
        assert isinstance(one.error, LinkViolation if why == "inbox breaks a rule" else type(None))


def test_with_a_full_journal_lists_are_made_and_it_ends_as_ever(dev, tmp_path):
    with world(tmp_path) as one:
        with contextlib.suppress(BlockingIOError):
            while True:
                one.journal_end.send(b"MESSAGE=x", socket.MSG_DONTWAIT)
        one.came(1)
        for number in range(100):
            one.say(REFUSED._replace(resource=f"/dev/{number}"))
        one.ask(1)
        assert one.hear() == (1, ["/dev/known"])
        one.opener.close()
        assert one.ended()
        assert one.error is None


# ---- who does not read


def fill(one):
    """A listing for which there is no room in the inbox's link."""
    for number in range(300):
        os.mknod(f"/dev/known{number}", 0o20600, os.makedev(1, 3))
    one.ends[2].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
    one.came(1)
    one.ask(1)
    end_s = time.monotonic() + 30
    while not one.links[2].waiting:
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_while_its_answers_are_not_taken_an_inboxs_next_questions_wait(dev, tmp_path):
    """What waits for it stays bounded; launcher and opener are heard all the same."""
    with world(tmp_path) as one:
        fill(one)
        one.ask(99)  # there is none
        one.came(2)
        for _ in range(3):
            assert one.pinged() == link.Pong()
        time.sleep(0.2)
        assert one.thread.is_alive()
        number, paths = one.hear()
        assert (number, len(paths)) == (1, 301)
        assert "does not exist" in one.violated()


# ---- changes


def test_a_watch_is_told_of_what_comes_and_goes_and_a_list_is_not(dev, tmp_path):
    with world(tmp_path) as one:
        for number in (1, 2):
            one.came(number)
        one.ask(1, watch=True)
        one.ask(2)
        assert sorted(one.hear() for _ in range(2)) == [(1, ["/dev/known"]), (2, ["/dev/known"])]
        for name in ("known1", "known2", "known3"):
            os.mknod(f"/dev/{name}", 0o20600, os.makedev(1, 3))
        assert one.hear() == (
            1,
            ["/dev/known", "/dev/known1", "/dev/known2", "/dev/known3"],
        )  # one list for all of them
        os.unlink("/dev/known1")
        assert one.hear() == (1, ["/dev/known", "/dev/known2", "/dev/known3"])


def test_a_watch_that_has_ended_is_told_nothing(dev, tmp_path, monkeypatch):
    monkeypatch.setattr(changes, "_MOUNT_S", 0.1)
    with world(tmp_path) as one:
        for number in (1, 2):
            one.came(number)
            one.ask(number, watch=True)
            assert one.hear() == (number, ["/dev/known"])
        one.say(Ended(1))
        assert one.pinged() == link.Pong()
        os.mknod("/dev/known1", 0o20600, os.makedev(1, 3))
        assert one.hear() == (2, ["/dev/known", "/dev/known1"])
        assert one.is_silent()


def test_what_the_opener_can_open_is_the_launchers_word(dev, tmp_path):
    with world(tmp_path) as one:
        one.came(1)
        for given, paths in ((Given(False, False, ()), []), (Given(True, True, ()), ["/dev/known"])):
            one.launcher.send(LAUNCHER_TO_KEEPER.encode(given))
            assert one.pinged() == link.Pong()
            one.ask(1)
            assert one.hear() == (1, paths)


def test_who_knocks_is_let_in_and_who_is_in_debt_when_its_time_has_come(tmp_path, dev):
    """By the clock, without any message more."""
    with world(tmp_path) as one:
        heard = lambda: keeper.KEEPER_TO_OPENER.decode(one.opener.recv(1000))
        for number in range(1, 66):
            one.say(keeper.Knock(number, 1000, 1000, 1, 5))
            assert heard() == keeper.LetIn(number)
            one.say(keeper.Ended(number) if number > 1 else keeper.Lingers(number))
        one.say(keeper.Contested())
        one.say(keeper.Knock(66, 1000, 1000, 1, 5))
        one.say(keeper.Knock(67, 1002, 1000, 1, 7))
        assert heard() == keeper.Waits(66)
        assert heard() == keeper.LetIn(67)
        assert heard() == keeper.LetIn(66)
