"""The opener's end of the link to the namespaces worker: in turn, in time, and never the wrong descriptor."""

from __future__ import annotations

import contextlib
import os
import socket
import time

import pytest

from fdbroker import limits
from fdbroker.errors import Denied, LinkViolation, OpenFailed
from fdbroker.kernel.link import Link
from fdbroker.opener import ask
from fdbroker.opener.ask import Asking
from fdbroker.opener.authorize import Account, Connection, Flight
from fdbroker.opener.close import Closing
from fdbroker.opener.request import Opening
from fdbroker.policy.decide import View
from fdbroker.policy.owners import Owners
from fdbroker.terms import Device, Namespace, NamespaceRule, Socket, SocketRule, Subject, Uplink
from fdbroker.wire import link, worker

LIMITS = {"namespaces": 3}
RULE = NamespaceRule(("net",), "*", True, True, Uplink("br0", "10.0.0.0/24", isolated=True), "everyone", "f:1")
SOCKETS = SocketRule("*", ("inet",), ("stream",), (), "everyone", "f:2")
NAMED, NEW, OF = Namespace("net", "a"), Namespace("net"), Namespace("net", pid=5)


class Machine:
    """Asking, with a worker that says what a test wants, and clients of several users."""

    def __init__(self, stack):
        ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.asking = Asking(Link(stack.enter_context(ends[0])))
        self.worker = Link(stack.enter_context(ends[1]))
        self.stack = stack
        self.accounts = {}

    def opening(self, uid, *resources):
        ends = socket.socketpair()
        for end in ends:
            self.stack.enter_context(end)
        account = self.accounts.setdefault(
            uid, Account({"burst": 10, "connections": 10, "requests_per_second": 10, "record_burst": 10}, 0.0)
        )
        subject = Subject(uid, frozenset(), uid, 1, "", "", foreign=True, owner=uid)
        view = View((), (RULE, SOCKETS), (), (), LIMITS, administrator=False)
        made = Opening(Connection(1, ends[0], subject, view, account, Flight(1000)), resources, Closing())
        made.allowed = [(SOCKETS if isinstance(one, Socket) else RULE,) for one in resources]
        self.stack.callback(made.close)
        return made

    def put(self, uid, *resources):
        opening = self.opening(uid, *resources)
        self.asking.ask(opening)
        return opening

    def asked(self):
        """All that the worker was asked and has not read yet."""
        found = []
        while (received := self.worker.receive_with_descriptors(1)) is not None:
            found.append(worker.TO_WORKER.decode(received[0]))
            for descriptor in received[1]:
                os.close(descriptor)
        return found

    def answer(self, ask, *descriptors, inode=7, unusable=0, living=None):
        made = worker.Made(ask.request, inode, unusable, living or (True,) * len(ask.known))
        numbers = descriptors or [os.open("/dev/null", os.O_RDONLY)]
        self.worker.send_with_descriptors(worker.FROM_WORKER.encode(made), numbers)
        for number in numbers:
            os.close(number)
        self.asking.read()
        return self.asking.ready()


@pytest.fixture
def machine():
    with contextlib.ExitStack() as stack:
        yield Machine(stack)


def null():
    return os.open("/dev/null", os.O_RDONLY)


def test_what_is_missing_is_asked_one_by_one_and_devices_are_not(machine):
    resources = [Device("/dev/null", "ro"), NAMED, Socket("a", "inet", "stream")]
    opening = machine.put(5, *resources)
    (first,) = machine.asked()
    assert (first.uid, first.resource, first.known, first.maximum, first.uplink) == (5, NAMED, (), 3, RULE.uplink)
    assert machine.answer(first, unusable=2) == []
    (second,) = machine.asked()
    assert (second.resource, second.maximum, second.uplink) == (resources[2], 0, None)
    assert machine.answer(second, inode=0, unusable=worker.UNKNOWN) == [(opening, None)]
    assert [opening.grants[1].inode, opening.grants[1].unusable] == ["net:[7]", worker.UNUSABLE[2]]
    assert [opening.grants[2].inode, opening.grants[2].unusable] == ["", None]
    assert sorted(opening.descriptors) == [1, 2]
    assert machine.asking.timeout_s == -1


def test_one_question_of_each_user_at_a_time_and_who_asks_for_much_goes_behind(machine):
    for _ in range(3):
        machine.put(5, NAMED, NAMED)
    machine.put(6, NAMED)
    first, other = machine.asked()
    assert (first.uid, other.uid) == (5, 6)
    order = []
    while True:
        for ready in machine.answer(first):
            order.append(ready.opening)
        again = machine.asked()
        if not again:
            break
        (first,) = again
    # 5's three Opens take turns with their parts, so that all end one after the other
    assert len(order) == 3


def test_many_users_at_once_are_at_most_so_many_and_all_get_their_turn(machine):
    uids = list(range(1, 2 * limits.NAMESPACE_REQUESTS + 1))
    for uid in uids:
        machine.put(uid, NAMED)
    waiting = machine.asked()
    assert len(waiting) == limits.NAMESPACE_REQUESTS
    served = []
    while waiting:
        served.append(waiting[0].uid)
        machine.answer(waiting.pop(0))
        waiting += machine.asked()
    assert served == uids


def test_those_that_clients_can_stop_never_take_all_places(machine):
    for uid in range(1, 40):
        machine.put(uid, NEW)
    assert len(machine.asked()) == limits.NAMESPACE_REQUESTS - ask._FOR_OTHERS
    for uid in range(100, 110):
        machine.put(uid, NAMED)
    assert [one.uid for one in machine.asked()] == list(range(100, 100 + ask._FOR_OTHERS))


def test_what_one_users_requests_hold_while_they_wait_is_bounded(machine):
    openings = [machine.put(5, *[OF] * 64) for _ in range(64)]
    most, refused, finished = 0, 0, 0
    while waiting := machine.asked():
        for asked in waiting:
            ready = machine.answer(asked, null(), os.pidfd_open(os.getpid()))
            for opening, refusal in ready:
                refused += refusal is not None
                finished += refusal is None
                opening.close()
            most = max(most, sum(len(one.descriptors) + len(one.owners) for one in openings))
    assert most <= 2 * limits.NAMESPACE_HELD
    assert refused + finished == 64
    assert finished >= 1


@pytest.mark.parametrize("more", [0, 1])
def test_of_one_user_so_many_may_be_held_by_those_that_wait_and_not_one_more(machine, more):
    """NAMESPACE_HELD descriptors; with one more the next question is refused."""
    machine.put(5, NAMED, NAMED)  # its second part will wait, with the first one held
    asking, waiting = machine.put(5, NAMED), machine.put(5, NAMED)
    waiting.descriptors.update((-index, null()) for index in range(1, limits.NAMESPACE_HELD + more))
    (asked,) = machine.asked()
    ready = machine.answer(asked)
    assert [(one.opening, getattr(one.refusal, "retry_after_ms", 0)) for one in ready] == (
        [(asking, limits.BUSY_RETRY_MS)] if more else []
    )


def test_what_was_made_is_known_the_next_time_and_what_died_is_not(machine):
    machine.put(5, NEW)
    (asked,) = machine.asked()
    machine.answer(asked, inode=10)
    machine.put(5, NEW)
    (asked,) = machine.asked()
    assert asked.known == (10,)
    machine.answer(asked, inode=11)
    machine.put(5, NEW)
    (asked,) = machine.asked()
    assert asked.known == (10, 11)
    machine.answer(asked, inode=12, living=(False, True))
    assert machine.accounts[5].namespaces == (11, 12)
    machine.put(5, NEW)
    (asked,) = machine.asked()
    machine.answer(asked, inode=11)  # the kernel gave the number again: so the old one was gone
    assert machine.accounts[5].namespaces == (12, 11)


def test_a_refusal_ends_it_and_names_the_resource(machine):
    opening = machine.put(5, NAMED, OF)
    machine.answer(machine.asked()[0])
    (asked,) = machine.asked()
    machine.worker.send(worker.FROM_WORKER.encode(worker.Failed(asked.request, Denied("it is process 1"))))
    machine.asking.read()
    ((ended, refusal),) = machine.asking.ready()
    assert (ended, type(refusal), refusal.index, str(refusal)) == (opening, Denied, 1, "it is process 1")


def test_a_process_comes_with_its_pidfd(machine):
    opening = machine.put(5, OF)
    (asked,) = machine.asked()
    machine.answer(asked, null(), os.pidfd_open(os.getpid()))
    assert os.readlink(f"/proc/self/fd/{opening.owners[0]}") == "anon_inode:[pidfd]"
    assert os.readlink(f"/proc/self/fd/{opening.descriptors[0]}") == "/dev/null"


@pytest.mark.parametrize(("resource", "count"), [(NAMED, 2), (OF, 1), (OF, 3)])
def test_the_wrong_number_of_descriptors_is_a_violation(machine, resource, count):
    machine.put(5, resource)
    (asked,) = machine.asked()
    with pytest.raises(LinkViolation):
        machine.answer(asked, *[null() for _ in range(count)])


def test_an_answer_without_a_descriptor_and_a_success_without_one_are_violations(machine):
    machine.put(5, NAMED)
    (asked,) = machine.asked()
    machine.worker.send(worker.FROM_WORKER.encode(worker.Made(asked.request, 1, 0, ())))
    with pytest.raises(LinkViolation):
        machine.asking.read()
    machine.worker.send(link.OPENER_TO_INBOX.encode(link.Outcome(asked.request, None)))
    with pytest.raises(LinkViolation):
        machine.asking.read()


def test_an_answer_that_nobody_waits_for_is_closed(machine):
    opening = machine.put(5, NAMED)
    (asked,) = machine.asked()
    machine.asking.drop(opening.connection)
    assert machine.answer(asked) == []
    assert machine.answer(asked) == []  # once more, of a worker that was started again
    assert not opening.descriptors
    assert machine.asking.timeout_s == -1


def test_who_goes_while_it_waits_is_not_asked_for(machine):
    machine.put(5, NAMED)
    second = machine.put(5, NAMED)
    machine.asking.drop(second.connection)
    (asked,) = machine.asked()
    machine.answer(asked)
    assert machine.asked() == []


def test_a_lost_worker_fails_what_it_was_asked_and_nothing_else(machine):
    opening = machine.put(5, NAMED)
    waiting = machine.put(5, NAMED)
    machine.asked()
    machine.worker.send(worker.LOST)
    machine.asking.read()
    ((ended, refusal),) = machine.asking.ready()
    assert (ended, type(refusal), refusal.number) == (opening, OpenFailed, 104)
    (asked,) = machine.asked()
    assert [one.opening for one in machine.answer(asked)] == [waiting]


def test_nobody_waits_longer_than_the_limit_and_a_worker_that_says_nothing_is_ended_once(machine, monkeypatch):
    monkeypatch.setattr(ask, "_WAIT_S", 0.05)
    opening, waiting = machine.put(5, NAMED), machine.put(5, NAMED)
    assert machine.asking.expire() is False
    assert 0 < machine.asking.timeout_s <= 0.05
    time.sleep(0.06)
    assert machine.asking.timeout_s == 0
    assert machine.asking.expire() is True
    ended = machine.asking.ready()
    assert {one.opening for one in ended} == {opening, waiting}
    assert {one.refusal.number for one in ended} == {110}
    assert machine.asking.expire() is False
    assert machine.asking.timeout_s == -1  # until the worker says something, there is nothing to wait for
    late = machine.put(6, NAMED)
    machine.asked()
    machine.worker.send(worker.LOST)
    machine.asking.read()
    assert [one.opening for one in machine.asking.ready()] == [late]


def test_nobody_is_given_up_before_the_limit(machine, monkeypatch):
    """NAMESPACE_WAIT_SECONDS, by a clock of our own."""
    now = [100.0]
    monkeypatch.setattr(ask.time, "monotonic", lambda: now[0])
    opening = machine.put(5, NAMED)
    now[0] += limits.NAMESPACE_WAIT_SECONDS - 0.5
    assert machine.asking.expire() is False
    assert machine.asking.ready() == []
    now[0] += 1
    assert machine.asking.expire() is True
    assert [(one.opening, one.refusal.number) for one in machine.asking.ready()] == [(opening, 110)]


def test_who_waits_longest_is_refused_in_time_also_behind_one_who_came_later(machine, monkeypatch):
    monkeypatch.setattr(ask, "_WAIT_S", 0.05)
    first = machine.put(5, NAMED, NAMED)
    monkeypatch.setattr(ask, "_WAIT_S", 5.0)
    machine.put(5, NAMED)
    (asked,) = machine.asked()
    machine.answer(asked)  # its second part now waits behind the other
    machine.asked()
    time.sleep(0.06)
    machine.asking.expire()
    assert [one.opening for one in machine.asking.ready()] == [first]
    assert machine.asking.timeout_s > 1


def test_the_end_of_the_link_is_the_end_of_the_service(machine):
    machine.worker.close()
    with pytest.raises(LinkViolation, match="is gone"):
        machine.asking.read()


def test_without_a_worker_there_is_nothing_to_wait_for():
    assert (Asking(None).fileno(), Asking(None).timeout_s, Asking(None).ready()) == (-1, -1, [])
    Asking(None).read()


def test_an_owner_with_more_ranges_than_a_question_has_is_not_cut_short(machine):
    """What one of its later uids holds would count as gone: eight of them were all that a question had."""
    ranges = tuple((first, first + 9, 5) for first in range(10_000, 110_000, 100))
    machine.asking.owners = Owners(frozenset(), ranges)
    machine.put(5, NEW)
    (asked,) = machine.asked()
    assert asked.uids == ((5, 5), (5, 5), *((first, last) for first, last, _ in ranges))
    assert len(asked.uids) < worker.RANGES
