"""The opener's end of the link to the namespaces worker: one question for a request, and never the wrong descriptor."""

from __future__ import annotations

import contextlib
import os
import select
import socket

import pytest

from fdbroker.errors import Denied, LinkViolation, OpenFailed, RateLimited
from fdbroker.kernel import sockets
from fdbroker.kernel.link import Link
from fdbroker.limits import every as limits
from fdbroker.opener import ask
from fdbroker.opener.ask import Asking
from fdbroker.opener.authorize import Account, Connection, Flight
from fdbroker.opener.close import Closing
from fdbroker.opener.request import Opening
from fdbroker.opener.views import Permit
from fdbroker.policy.decide import View
from fdbroker.policy.owners import Owners
from fdbroker.terms import Device, Namespace, NamespaceRule, Socket, SocketRule, Subject, Uplink
from fdbroker.wire import link, worker
from fdbroker.wire.worker import Opened, Wanted

LIMITS = {"namespaces": 3}
RULE = NamespaceRule(("net",), "*", True, True, Uplink("br0", "10.0.0.0/24", isolated=True), "everyone", "f:1")
SOCKETS = SocketRule("*", ("inet",), ("stream",), (), "everyone", "f:2")
NAMED, NEW, OF = Namespace("net", "a"), Namespace("net"), Namespace("net", pid=5)
DEVICE, SOCKET = Device("/dev/null", "ro"), Socket("a", "inet", "stream")


class Machine:
    """Asking, with a worker that says what a test wants, and clients of several users."""

    def __init__(self, stack, monkeypatch):
        ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.asking = Asking(Link(stack.enter_context(ends[0])))
        self.worker = Link(stack.enter_context(ends[1]))
        self.stack = stack
        self.accounts = {}
        self.answered = []
        self.asking.answered = lambda opening, refusal: self.answered.append((opening, refusal))
        self.now_s = 100.0
        monkeypatch.setattr(ask.time, "monotonic", lambda: self.now_s)

    def put(self, uid, *resources):
        ends = socket.socketpair()
        for end in ends:
            self.stack.enter_context(end)
        account = self.accounts.setdefault(
            uid, Account({"burst": 10, "connections": 10, "requests_per_second": 10, "record_burst": 10}, 0.0)
        )
        subject = Subject(uid, frozenset(), uid, 1, "", "", foreign=True, owner=uid)
        view = View((), (RULE, SOCKETS), (), LIMITS, administrator=False)
        made = Opening(Connection(1, ends[0], subject, view, account, Flight(1000)), resources, Closing())
        made.permits = [Permit(one, (SOCKETS if isinstance(one, Socket) else RULE,)) for one in resources]
        self.stack.callback(made.close)
        self.asking.ask(made)
        return made

    def asked(self):
        """All that the worker was asked and has not read yet."""
        found = []
        while (received := self.worker.receive_with_descriptors(1)) is not None:
            found.append(worker.TO_WORKER.decode(received[0]))
            assert [os.readlink(f"/proc/self/fd/{one}") for one in received[1]] == ["anon_inode:[pidfd]"]
            for descriptor in received[1]:
                os.close(descriptor)
        return found

    def say(self, message, *descriptors):
        self.worker.send_with_descriptors(worker.FROM_WORKER.encode(message), descriptors)
        for number in descriptors:
            os.close(number)
        self.asking.read()

    def take(self):
        """What has been answered since the last time."""
        answered, self.answered[:] = list(self.answered), []
        return answered


@pytest.fixture
def machine(monkeypatch):
    with contextlib.ExitStack() as stack:
        yield Machine(stack, monkeypatch)


def null():
    return os.open("/dev/null", os.O_RDONLY)


def test_all_that_the_worker_has_to_open_is_asked_at_once_and_devices_are_not(machine):
    machine.accounts.clear()
    opening = machine.put(5, DEVICE, NAMED, OF, SOCKET)
    (asked,) = machine.asked()
    assert (asked.uid, asked.owner, asked.known, asked.maximum) == (5, 5, (), 3)
    assert asked.wanted == (Wanted(NAMED, RULE.uplink), Wanted(OF, RULE.uplink), Wanted(SOCKET))
    zero = os.open("/dev/zero", os.O_RDONLY)
    opened = (Opened(7, 2), Opened(8, 0), Opened(0, worker.UNKNOWN))
    machine.say(worker.Made(asked.request, opened), null(), zero, null(), os.pidfd_open(os.getpid()))
    assert machine.take() == [(opening, None)]
    grants = [(opening.grants[index].inode, opening.grants[index].unusable) for index in (1, 2, 3)]
    assert grants == [("net:[7]", worker.UNUSABLE[2]), ("net:[8]", ""), ("", None)]
    found = {index: os.readlink(f"/proc/self/fd/{one}") for index, one in opening.descriptors.items()}
    assert found == {1: "/dev/null", 2: "/dev/zero", 3: "/dev/null"}
    assert [os.readlink(f"/proc/self/fd/{one}") for one in opening.owners.values()] == ["anon_inode:[pidfd]"]
    assert list(opening.owners) == [2]
    assert machine.asking.timeout_s == -1


def test_what_was_made_is_told_the_next_time(machine):
    machine.put(5, NEW)
    (asked,) = machine.asked()
    machine.say(worker.Made(asked.request, (Opened(10, 0),), (9, 10)), null())
    machine.put(5, NEW)
    machine.put(6, NEW)
    assert [one.known for one in machine.asked()] == [(9, 10), ()]


def test_a_refusal_ends_it_and_names_the_resource(machine):
    opening = machine.put(5, NAMED, DEVICE, OF)
    (asked,) = machine.asked()
    machine.say(worker.Failed(asked.request, Denied("it is process 1", index=1)))
    ((ended, refusal),) = machine.take()
    assert (ended, type(refusal), refusal.index, str(refusal)) == (opening, Denied, 2, "it is process 1")


@pytest.mark.parametrize(
    ("resources", "opened", "count"),
    [
        ([NAMED], 1, 0),
        ([NAMED], 1, 2),
        ([OF], 1, 1),
        ([OF], 1, 3),
        ([NAMED, NAMED], 1, 2),
        ([NAMED], 2, 1),
        ([NAMED, OF], 2, 2),
        ([NAMED], 1, worker.DESCRIPTORS + 1),
    ],
)
def test_an_answer_to_more_or_less_than_was_asked_is_a_violation(machine, resources, opened, count):
    machine.put(5, *resources)
    (asked,) = machine.asked()
    with pytest.raises(LinkViolation):
        machine.say(worker.Made(asked.request, (Opened(7, 0),) * opened), *[null() for _ in range(count)])
    assert machine.take() == []


@pytest.mark.parametrize(("index", "count"), [(1, 0), (0, 1)])
def test_a_refusal_of_what_was_not_asked_or_with_a_descriptor_is_a_violation(machine, index, count):
    machine.put(5, DEVICE, NAMED)
    (asked,) = machine.asked()
    with pytest.raises(LinkViolation):
        machine.say(worker.Failed(asked.request, OpenFailed(5, index=index)), *[null() for _ in range(count)])


def test_another_tables_message_is_a_violation(machine):
    machine.put(5, NAMED)
    machine.worker.send(link.OPENER_TO_INBOX.encode(link.Outcome(1, None)))
    with pytest.raises(LinkViolation):
        machine.asking.read()


def test_an_answer_that_nobody_waits_for_is_closed(machine):
    machine.put(5, NAMED)
    (asked,) = machine.asked()
    made = worker.Made(asked.request, (Opened(7, 0),))
    machine.say(made, null())
    machine.take()
    machine.say(made, null())  # once more
    machine.say(made._replace(request=99), null(), null(), null())
    assert machine.take() == []


def test_an_answer_whose_descriptors_find_no_room_is_a_refusal(machine, monkeypatch):
    opening = machine.put(5, NAMED)
    (asked,) = machine.asked()
    data = worker.FROM_WORKER.encode(worker.Made(asked.request, (Opened(7, 0),)))
    come = [(data, None), None]
    monkeypatch.setattr(Link, "receive_whole", lambda *_: come.pop(0))
    machine.asking.read()
    ((ended, refusal),) = machine.take()
    assert (ended, refusal.number, refusal.index) == (opening, 24, 0)


def test_a_lost_worker_fails_what_it_was_asked_and_its_successor_is_asked(machine):
    opening = machine.put(5, NAMED)
    machine.asked()
    machine.say(worker.Lost())
    ((ended, refusal),) = machine.take()
    assert (ended, type(refusal), refusal.number) == (opening, OpenFailed, 104)
    machine.put(5, NAMED)
    assert len(machine.asked()) == 1


def test_a_worker_that_says_nothing_is_ended_once_and_nobody_waits_for_it_longer(machine):
    """It has NAMESPACE_WAIT_SECONDS to say so itself, and one second more."""
    opening = machine.put(5, NAMED)
    machine.now_s += limits.NAMESPACE_WAIT_SECONDS
    later = machine.put(6, NAMED)
    assert machine.asking.timeout_s == pytest.approx(1.0)
    assert machine.asking.expire() is False
    machine.now_s += 1.1
    assert machine.asking.timeout_s == 0
    assert machine.asking.expire() is True
    assert [(one, refusal.number) for one, refusal in machine.take()] == [(opening, 110)]
    machine.now_s += limits.NAMESPACE_WAIT_SECONDS
    assert machine.asking.expire() is False  # it has been said
    assert [(one, refusal.number) for one, refusal in machine.take()] == [(later, 110)]
    assert machine.asking.timeout_s == -1
    machine.say(worker.Lost())
    machine.put(5, NAMED)
    machine.now_s += limits.NAMESPACE_WAIT_SECONDS + 1.1
    assert machine.asking.expire() is True


def test_when_the_service_stops_whoever_waits_has_two_seconds_and_the_worker_is_not_ended(machine):
    openings = [machine.put(5, NAMED)]
    machine.asking.hurry()
    openings.append(machine.put(6, NAMED))
    assert machine.asking.timeout_s == pytest.approx(2.0)
    machine.now_s += 2.1
    assert machine.asking.expire() is False
    assert [one for one, _ in machine.take()] == openings


def test_questions_that_find_no_room_in_the_link_are_put_later_in_order(machine):
    """One owner that asks faster than the worker reads does not keep the next one from being asked."""
    openings = [machine.put(5, NAMED) for _ in range(1000)]
    assert machine.take() == []
    numbers = []
    while some := machine.asked():
        numbers += [one.request for one in some]
        assert machine.asking.timeout_s > 0
        machine.asking.read()
    assert numbers == list(range(1, len(openings) + 1))


def test_what_waited_too_long_for_room_is_not_asked_any_more(machine):
    first = [machine.put(5, NAMED) for _ in range(1000)]
    machine.now_s += limits.NAMESPACE_WAIT_SECONDS + 2
    machine.asking.expire()
    assert len(machine.take()) == len(first)
    machine.asked()
    machine.asking.read()
    assert machine.asked() == []
    machine.put(6, NAMED)
    assert [one.uid for one in machine.asked()] == [6]


def test_without_a_descriptor_for_who_asks_it_is_refused(machine, monkeypatch):
    def fail(_):
        raise OSError(24, "no descriptor is left")

    monkeypatch.setattr(sockets, "peer_pidfd", fail)
    opening = machine.put(5, DEVICE, NAMED)
    ((ended, refusal),) = machine.take()
    assert (ended, type(refusal), refusal.cause, refusal.index) == (opening, RateLimited, "busy", 1)
    assert machine.asked() == []


def test_the_end_of_the_link_is_the_end_of_the_service(machine):
    machine.worker.close()
    with pytest.raises(LinkViolation, match="is gone"):
        machine.asking.read()


def test_without_a_worker_there_is_nothing_to_wait_for():
    assert (Asking(None).fileno(), Asking(None).timeout_s) == (-1, -1)
    Asking(None).read()


def test_an_owner_with_more_ranges_than_a_question_has_is_not_cut_short(machine):
    """What one of its later uids holds would count as gone: eight of them were all that a question had."""
    ranges = tuple((first, first + 9, 5) for first in range(10_000, 110_000, 100))
    machine.asking.owners = Owners(frozenset(), ranges)
    machine.put(5, NEW)
    (asked,) = machine.asked()
    assert asked.uids == ((5, 5), (5, 5), *((first, last) for first, last, _ in ranges))
    assert len(asked.uids) < worker.RANGES


def test_a_question_that_was_given_up_does_not_wait_for_room(machine):
    """It did, and with nothing asked the loop looked for room again and again, for good."""
    while not machine.asking._unsent:
        machine.put(5, NEW)
    machine.now_s += limits.NAMESPACE_WAIT_SECONDS + 2
    machine.asking.expire()
    with contextlib.closing(select.epoll()) as epoll:
        machine.asked()
        machine.asking.poll(epoll)
        assert not epoll.poll(0)
