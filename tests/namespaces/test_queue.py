"""Whose question the worker puts next, and how long a request lasts there: no owner holds up another."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import struct
import time

import pytest

from fdbroker.errors import Denied, OpenFailed, RateLimited
from fdbroker.kernel import namespaces as kernel
from fdbroker.kernel.link import Link
from fdbroker.kernel.pinned import state
from fdbroker.limits import every as limits
from fdbroker.namespaces import service
from fdbroker.namespaces.queue import Queue, Request
from fdbroker.namespaces.service import Worker
from fdbroker.terms import Namespace, Socket
from fdbroker.wire import worker
from fdbroker.wire.worker import Ask, Failed, Made, Opened, Wanted

NAMED, NEW, OF = Namespace("net", "a"), Namespace("net"), Namespace("net", pid=5)
MOUNTS, SEVERAL = Namespace("mnt", "a"), Namespace("mnt", "two")
SOCKET = Socket("a", "inet", "stream")
SLOW, STOPPED = Namespace("net", "slow"), Namespace("net", "stopped")


def request(owner, *resources):
    return Request(Ask(1, owner, owner, tuple(map(Wanted, resources))), None, 0.0)


def putting(*requests):
    queue = Queue()
    for one in requests:
        queue.put(one)
    return queue


def put(queue):
    """Whose questions can be put until one is answered."""
    return list(iter(queue.next, None))


def answer(queue, one):
    """One question is answered; it goes on to the next one, if it has one."""
    one.take(Opened(7, 0), ())
    queue.over(one)
    if not one.complete:
        queue.put(one)


# ---- the queue


def test_one_question_of_each_owner_at_a_time_and_who_asks_for_much_goes_behind():
    many, more, other = request(5, NAMED, NAMED, NAMED), request(5, NAMED), request(6, NAMED)
    queue = putting(many, more, other)
    assert put(queue) == [many, other]
    answer(queue, many)
    assert put(queue) == [more]
    answer(queue, more)
    assert put(queue) == [many]


def test_an_owner_that_has_had_its_turn_waits_for_all_others():
    first, again = request(5, NAMED), request(5, NAMED)
    others = [request(owner, NAMED) for owner in range(100, 100 + 2 * limits.NAMESPACE_REQUESTS)]
    queue = putting(first, again, *others)
    begun, order = put(queue), []
    while begun:
        order.append(begun.pop(0))
        answer(queue, order[-1])
        begun += put(queue)
    assert order == [first, *others, again]


def test_many_users_at_once_are_at_most_so_many_and_all_get_their_turn():
    """NAMESPACE_REQUESTS, and the next one for each that ends."""
    requests = [request(owner, NAMED) for owner in range(2 * limits.NAMESPACE_REQUESTS)]
    queue = putting(*requests)
    begun, served = put(queue), []
    assert len(begun) == limits.NAMESPACE_REQUESTS
    while begun:
        served.append(begun.pop(0))
        answer(queue, served[-1])
        begun += put(queue)
    assert served == requests


@pytest.mark.parametrize("quick", [NAMED, OF, SOCKET])
def test_those_that_clients_can_stop_never_take_all_places(quick):
    queue = putting(*(request(owner, NEW) for owner in range(40)))
    assert len(put(queue)) == limits.NAMESPACE_REQUESTS - 4
    others = [request(owner, quick) for owner in range(100, 110)]
    for one in others:
        queue.put(one)
    assert put(queue) == others[:4]


def test_who_goes_while_it_waits_is_not_put_and_its_owners_others_are():
    first, gone, last = (request(5, NAMED) for _ in range(3))
    queue = putting(first, gone, last)
    assert put(queue) == [first]
    queue.remove(gone)
    queue.remove(first)  # it keeps its place until its question is over
    assert put(queue) == []
    queue.over(first)
    assert put(queue) == [last]


def test_what_waits_is_counted_and_what_is_being_answered_is_not():
    first, second = request(5, OF, OF), request(5, NAMED, NAMED)
    queue = putting(first, second)
    queue.next()
    first.take(Opened(7, 0), [0, 0])
    assert [queue.held(5), queue.held(6)] == [0, 0]
    queue.over(first)
    queue.put(first)
    assert queue.held(5) == 2


def test_mount_namespaces_are_given_away_before_the_rest_is_closed():
    one = request(5, NAMED, MOUNTS, SOCKET, MOUNTS)
    for number in range(3):
        assert one.mounts is (number == 1)
        one.take(Opened(7, 0), [number])
    assert one.give_mounts() == [1]
    assert one.descriptors == [0, 2]


# ---- the worker, whose children do what the name that is asked for says


def _answer(ask, *_):
    match ask.wanted[0].resource:
        case Namespace(_, "slow"):
            time.sleep(1)
        case Namespace(_, "stopped"):
            os.kill(os.getpid(), signal.SIGSTOP)
        case Namespace(_, "denied"):
            raise Denied("no")
        case Namespace(_, "two"):
            return Made(ask.request, (Opened(7, 0),)), [null(), null()]
        case Namespace(_, "", pid) if pid:
            return Made(ask.request, (Opened(7, 0),)), [null(), os.pidfd_open(os.getppid())]
        case Namespace(_, ""):
            inode = len(ask.known) + 100
            return Made(ask.request, (Opened(inode, 0),), (*ask.known, inode)), [null()]
    return Made(ask.request, (Opened(7, 0),)), [null()]


def null():
    return os.open("/dev/null", os.O_RDONLY)


class Opener:
    """What the worker sees of the opener."""

    def __init__(self, link):
        self.link = link
        self.last = 0
        self.poll = select.poll()
        self.poll.register(link.fileno(), select.POLLIN)

    def ask(self, owner, *resources, **more):
        self.last += 1
        question = Ask(self.last, owner, owner, tuple(map(Wanted, resources)), **more)
        pidfd = os.pidfd_open(os.getpid())
        while not self.link.send_with_descriptors(worker.TO_WORKER.encode(question), [pidfd]):
            time.sleep(0.01)
        os.close(pidfd)
        return self.last

    def answers(self, count):
        """So many, as (answer, what each descriptor is), in the order in which they come."""
        return [self.answer() for _ in range(count)]

    def answer(self, timeout_s=30.0):
        assert self.poll.poll(timeout_s * 1000), "no answer"
        data, descriptors = self.link.receive_with_descriptors(worker.DESCRIPTORS)
        kinds = [os.readlink(f"/proc/self/fd/{one}") for one in descriptors]
        for one in descriptors:
            os.close(one)
        return worker.FROM_WORKER.decode(data), kinds

    @property
    def silent(self):
        return not self.poll.poll(0)


@pytest.fixture
def start(monkeypatch):
    """Starts a worker, in a process of its own, with other limits than it has by itself."""
    monkeypatch.setattr(service, "answer", _answer)
    with contextlib.ExitStack() as stack:

        def begin(**limited):
            for name, value in limited.items():
                monkeypatch.setattr(service, name, value)
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            process = os.fork()
            if process == 0:
                ours.close()
                with contextlib.suppress(BaseException):
                    Worker(Link(theirs), frozenset()).serve()
                os._exit(0)
            theirs.close()
            link = Link(ours)
            stack.callback(os.waitpid, process, 0)
            stack.callback(os.kill, process, signal.SIGKILL)
            stack.callback(link.close)
            made = Opener(link)
            made.process = process
            return made

        yield begin


def test_one_answer_brings_all_descriptors_and_the_processes_after_them(start):
    opener = start()
    number = opener.ask(5, NAMED, OF, SOCKET, OF)
    answer, kinds = opener.answer()
    assert answer == Made(number, (Opened(7, 0),) * 4)
    assert kinds == ["/dev/null"] * 4 + ["anon_inode:[pidfd]"] * 2
    assert opener.silent


def test_the_most_that_a_request_can_want_comes_in_one_answer(start):
    opener = start()
    opener.ask(5, *[OF] * limits.RESOURCES_PER_OPEN)
    answer, kinds = opener.answer()
    assert len(answer.opened) == limits.RESOURCES_PER_OPEN
    assert len(kinds) == worker.DESCRIPTORS


def test_the_first_that_is_refused_ends_it_and_is_named(start):
    opener = start()
    number = opener.ask(5, NAMED, Namespace("net", "denied"), NAMED)
    (answer, kinds) = opener.answer()
    assert (answer.request, type(answer.refusal), answer.refusal.index, kinds) == (number, Denied, 1, [])
    opener.ask(5, NAMED)
    assert isinstance(opener.answer()[0], Made)


@pytest.mark.parametrize("hard", [SLOW, STOPPED])
def test_many_questions_of_one_owner_that_take_long_hold_up_no_other(start, hard):
    """As many as it may have, each with a child that sleeps, or that stands still."""
    opener = start()
    for _ in range(64):
        opener.ask(5, *[hard] * 4)
    for owner in range(100, 120):
        opener.ask(owner, *[NAMED] * 3)
    answers = [answer for answer, _ in opener.answers(20)]
    assert {type(answer) for answer in answers} == {Made}
    assert {answer.request for answer in answers} == set(range(65, 85))


def test_children_that_stand_still_in_all_places_for_new_ones_leave_some_for_others(start, monkeypatch):
    monkeypatch.setattr(service, "answer", _stop_new)
    opener = start(_CHILD_S=1.0)
    for owner in range(100, 140):
        opener.ask(owner, NEW)
    last = opener.ask(5, NAMED)
    assert opener.answer()[0] == Made(last, (Opened(7, 0),))  # the first of all that is answered
    assert {answer.refusal.number for answer, _ in opener.answers(12)} == {errno.ETIMEDOUT}


def _stop_new(ask, *more):
    if ask.wanted[0].resource == NEW:
        os.kill(os.getpid(), signal.SIGSTOP)
    return _answer(ask, *more)


def test_of_one_owner_the_requests_take_turns(start):
    """A program that asks for one is not held up by another of the same user that asks for many."""
    opener = start()
    many = opener.ask(5, *[NAMED] * 64)
    one = opener.ask(5, NAMED)
    assert [answer.request for answer, _ in opener.answers(2)] == [one, many]


@pytest.mark.parametrize("more", [0, 1])
def test_of_one_user_so_many_may_be_held_by_those_that_wait_and_not_one_more(start, more):
    """NAMESPACE_HELD: by the requests that wait, when the next question of their owner is to be put."""
    held = 4
    assert service._HELD == limits.NAMESPACE_HELD
    opener = start(_HELD=held - more)
    numbers = [opener.ask(5, OF, NAMED) for _ in range(3)]  # at the turn of the third one two hold two each
    answers = [answer for answer, _ in opener.answers(3)]
    refused = [answer for answer in answers if isinstance(answer, Failed)]
    assert [one.request for one in refused] == numbers[-1:] * more
    assert all(isinstance(one.refusal, RateLimited) and one.refusal.cause == "busy" for one in refused)


@pytest.mark.parametrize("wait_s", [0.5, 5.0])
def test_nobody_is_given_up_before_the_limit(start, wait_s):
    """NAMESPACE_WAIT_SECONDS, of all that a request wants together, and of what waits behind another request."""
    assert service._WAIT_S == limits.NAMESPACE_WAIT_SECONDS
    opener = start(_WAIT_S=wait_s)
    numbers = [opener.ask(5, SLOW), opener.ask(5, NAMED)]
    answers = dict.fromkeys(numbers)
    began_s = time.monotonic()
    answers |= {answer.request: answer for answer, _ in opener.answers(2)}
    took_s = time.monotonic() - began_s
    if wait_s < 1:
        assert [answers[number].refusal.number for number in numbers] == [errno.ETIMEDOUT] * 2
        assert wait_s * 0.9 <= took_s < 0.95
        opener.ask(6, NAMED)
        assert isinstance(opener.answer()[0], Made)
    else:
        assert {type(answer) for answer in answers.values()} == {Made}


def test_a_request_whose_time_is_over_leaves_its_owner_one_child(start):
    """Else those of one owner, which the kernel may not let go of, would fill all places: it has one until it ends."""
    opener = start(_WAIT_S=0.2, _CHILD_S=1.0)
    opener.ask(5, STOPPED)
    assert opener.answer()[0].refusal.number == errno.ETIMEDOUT
    opener.ask(5, STOPPED)
    assert opener.answer()[0].refusal.number == errno.ETIMEDOUT
    assert len(_children(opener.process)) == 1
    end_s = time.monotonic() + 10
    while _children(opener.process):
        assert time.monotonic() < end_s
        time.sleep(0.05)


def _children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [one for one in file.read().split() if state(int(one)) != b"Z"]


def test_what_was_made_is_known_the_next_time_also_to_a_request_that_was_asked_before(start):
    """Three at once know as little as the opener does: else two of them could be one too many."""
    opener = start()
    for _ in range(3):
        opener.ask(5, NEW)
    opener.ask(6, NEW)
    known = [answer.known for answer, _ in opener.answers(4) if answer.request != 4]
    assert known == [(100,), (100, 101), (100, 101, 102)]


def test_a_worker_that_was_started_again_learns_of_the_opener_what_there_was(start):
    opener = start()
    opener.ask(5, NEW, known=(41, 42), maximum=8)
    assert opener.answer()[0].known == (41, 42, 102)
    opener.ask(5, NEW, known=(41, 42), maximum=8)  # asked before that answer was read
    assert opener.answer()[0].known == (41, 42, 102, 103)


def test_a_child_that_brings_another_number_of_descriptors_fails_its_request_alone(start):
    opener = start()
    opener.ask(5, NAMED, Namespace("net", "two"))
    other = opener.ask(6, NAMED)
    answers = {answer.request: (answer, kinds) for answer, kinds in opener.answers(2)}
    assert answers[1][0].refusal.number == errno.EIO
    assert answers[1][0].refusal.index == 1
    assert answers[1][1] == []
    assert isinstance(answers[other][0], Made)


def test_a_child_has_nothing_that_is_of_another_request(start, monkeypatch):
    """What others asked for would be in the hands of whoever has taken over the child of one."""

    def tell(ask, caller, *_):
        if ask.owner == 5:
            return _answer(ask)
        listed = [
            os.readlink(f"/proc/self/fd/{one}") for one in os.listdir("/proc/self/fd") if int(one) > 2 and _is(one)
        ]
        return Made(ask.request, (Opened(listed.count("/dev/null") * 10 + listed.count("anon_inode:[pidfd]"), 0),)), [
            null()
        ]

    monkeypatch.setattr(service, "answer", tell)
    held = [one for one in os.listdir("/proc/self/fd") if _is(one) and int(one) > 2]
    before = [os.readlink(f"/proc/self/fd/{one}") for one in held]
    opener = start()
    for _ in range(3):
        opener.ask(5, OF, SLOW)
    time.sleep(0.5)  # the first parts are there
    opener.ask(6, NAMED)
    answers = [answer for answer, _ in opener.answers(4)]
    (told,) = [answer.opened[0].inode for answer in answers if answer.request == 4]
    assert told == before.count("/dev/null") * 10 + before.count("anon_inode:[pidfd]") + 1  # its own caller


def _is(number):
    with contextlib.suppress(FileNotFoundError):
        return bool(os.readlink(f"/proc/self/fd/{number}"))
    return False


def test_an_opener_that_does_not_read_gets_all_answers_later(start):
    """More than a link takes, all at once."""
    opener = start(_WAIT_S=0.5)
    count = 600
    for owner in range(count):
        opener.ask(owner, SLOW)
    time.sleep(1.5)
    assert {opener.answer()[0].request for _ in range(count)} == set(range(1, count + 1))


def test_a_request_number_that_is_in_use_ends_the_worker(start):
    opener = start()
    opener.ask(5, SLOW)
    opener.last = 0
    opener.ask(6, NAMED)
    assert opener.poll.poll(10_000)
    assert opener.link.receive() == b""


def test_what_cannot_be_sent_now_is_refused_and_can_be_asked_again(start, monkeypatch):
    """ETOOMANYREFS: so many descriptors of the worker's user are in flight already."""
    sent = Link.send_with_descriptors

    def send(self, message, descriptors):
        if message[0] == 1 and len(descriptors) > 2:
            raise OSError(errno.ETOOMANYREFS, "too many references")
        return sent(self, message, descriptors)

    monkeypatch.setattr(Link, "send_with_descriptors", send)
    opener = start()
    opener.ask(5, *[NAMED] * 3)
    answer, kinds = opener.answer()
    assert (type(answer.refusal), answer.refusal.cause, kinds) == (RateLimited, "in flight", [])
    opener.ask(5, NAMED)
    assert isinstance(opener.answer()[0], Made)


def test_a_new_namespace_is_one_that_has_neither_a_name_nor_a_process():
    assert [request(5, one).makes for one in (NEW, NAMED, OF, SOCKET)] == [True, False, False, False]
    assert [request(5, one).of_process for one in (NEW, NAMED, OF, SOCKET)] == [False, False, True, False]
    assert set(kernel.CLONE) >= {"net"}


def test_the_errors_of_a_fork_that_fails_are_those_of_its_request(start, monkeypatch):
    """No process is left for the worker: one refusal, and the next request is served."""
    fork, failures = os.fork, []

    def failing():
        if not failures and os.getpid() != main:
            failures.append(1)
            raise OSError(errno.EAGAIN, "no process")
        return fork()

    main = os.getpid()
    monkeypatch.setattr(os, "fork", failing)
    opener = start()
    opener.ask(5, NAMED)
    (answer, _) = opener.answer()
    assert isinstance(answer.refusal, OpenFailed)
    assert answer.refusal.number == errno.EAGAIN
    opener.ask(5, NAMED)
    assert isinstance(opener.answer()[0], Made)


# ---- what takes long to close

_LINGER_S = 2


@pytest.fixture
def lingering(monkeypatch):
    """Mount namespaces are sockets whose last close waits for so long, unless it is a process' end that closes them."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:

        def lingers(ask, *more):
            if ask.wanted[0].resource not in (MOUNTS, SEVERAL, Namespace("mnt", "slow")):
                return _answer(ask, *more)
            sock = socket.create_connection(server.getsockname())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, _LINGER_S))
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    sock.send(bytes(65536))
            if ask.wanted[0].resource.name == "slow":
                time.sleep(1)
            several = [os.dup(sock.fileno())] if ask.wanted[0].resource == SEVERAL else []
            return Made(ask.request, (Opened(7, 0),)), [sock.detach(), *several]

        def answered_late(worker, child):  # its process has ended by then
            time.sleep(0.1)
            answered(worker, child)

        answered = Worker._answered
        monkeypatch.setattr(service, "answer", lingers)
        monkeypatch.setattr(Worker, "_answered", answered_late)
        yield


DENIED = Namespace("net", "denied")


@pytest.mark.parametrize(
    ("wanted", "limited"),
    [
        ((MOUNTS, DENIED), {}),  # its request fails
        ((SEVERAL,), {}),  # it is not what was asked for
        ((Namespace("mnt", "slow"),), {"_WAIT_S": 0.5}),  # its request has ended
    ],
)
def test_a_mount_namespace_that_takes_long_to_end_holds_up_nobody(start, lingering, wanted, limited):
    """It went with the worker's own descriptor: a tmpfs with a million files had all users wait for seconds."""
    opener = start(**limited)
    opener.ask(5, *wanted)
    answers, end_s = [], time.monotonic() + 2
    while time.monotonic() < end_s:
        began_s = time.monotonic()
        number = opener.ask(6, NAMED)
        while not answers or answers[-1].request != number:
            answers.append(opener.answer()[0])
        assert time.monotonic() - began_s < _LINGER_S / 2
    assert [answer.request for answer in answers if isinstance(answer, Failed)] == [1]
    end_s = time.monotonic() + 2 * _LINGER_S
    while _children(opener.process):
        assert time.monotonic() < end_s
        time.sleep(0.05)


def test_of_one_owner_one_process_closes_and_what_waits_for_that_is_counted(start, lingering):
    opener = start(_HELD=2)
    for _ in range(4):  # one that is being closed, and three that wait
        opener.ask(5, MOUNTS, DENIED)
        assert isinstance(opener.answer()[0].refusal, Denied)
    time.sleep(0.3)  # those that have answered end
    assert len(_children(opener.process)) == 1
    opener.ask(5, NAMED)
    assert isinstance(opener.answer()[0].refusal, RateLimited)
    opener.ask(6, MOUNTS, DENIED)
    assert isinstance(opener.answer()[0].refusal, Denied)
    end_s = time.monotonic() + 30
    while _children(opener.process):
        assert time.monotonic() < end_s
        time.sleep(0.05)
    opener.ask(5, NAMED)
    assert isinstance(opener.answer()[0], Made)
