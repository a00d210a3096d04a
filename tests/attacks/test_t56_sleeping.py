"""T56: what sleeps in the kernel holds up others: opening a device, or closing what a user has sent."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import struct
import time
import traceback
from functools import partial

import floods
import fuse
import pytest
from harness import ALICE, BOB, Raw, as_user, ask, descriptors_of, folder, outcome, running, status_of
from lingering import Lingering

from fdbroker.limits import every as limits

LINGER_S = 6
SLOW = 4  # descriptors of each message: closed one after the other, they take longer than the whole test
TIMES = 3  # connections of one way
CONNECTIONS = 8
AT_ONCE = 50  # connections that wait to be accepted: the socket has places for 128
ROUNDS = 100  # of the other user's requests
POLICY = f"""\
version: 1
topics: {{inbox: {{}}, news: {{}}}}
everyone: {{send: ["*"], subscribe: ["*"], devices: [{{path: /dev/null, access: rw, class: mem, device: "1:3"}}]}}
users: {{{ALICE}: {{limits: {{connections: {CONNECTIONS}}}}}}}
"""


# ---- ways to make the inbox close them; each returns what must stay open meanwhile


def with_a_message(sock):
    """Nobody subscribes: the message is forgotten at once, and its descriptors are closed."""
    return [sock, *Lingering(LINGER_S, SLOW).give(sock, floods.SEND)]


def with_what_may_have_none(sock):
    return [sock, *Lingering(LINGER_S, SLOW).give(sock, floods.PING)]


def with_half_a_message(sock):
    others = Lingering(LINGER_S, SLOW).give(sock, b"\0\0\0\xff half")
    time.sleep(0.2)  # the inbox has them
    sock.close()
    return others


def with_what_breaks_the_protocol(sock):
    return [sock, *Lingering(LINGER_S, SLOW).give(sock, struct.pack("!I", 0xFFFFFFFF))]


def unread_behind_a_subscription(sock):
    sock.sendall(floods.SUBSCRIBE)
    time.sleep(0.2)
    return [sock, *Lingering(LINGER_S, SLOW).give(sock, b"x")]


def unread_behind_unread_answers(sock):
    """The inbox does not read on while its answers wait unread; then the connection ends."""
    slow = Lingering(LINGER_S, SLOW)
    sock.setblocking(False)
    quiet_s = time.monotonic()
    while time.monotonic() - quiet_s < 0.3:
        with contextlib.suppress(BlockingIOError):
            sock.send(floods.INFO * 20)
            quiet_s = time.monotonic()
    while True:
        try:
            others = slow.give(sock, floods.INFO)  # the last of all that waits
            break
        except BlockingIOError:
            sock.recv(4096)  # a little, until there is room for one more
            time.sleep(0.02)
    sock.close()
    return others


WAYS = (
    *(with_a_message, with_what_may_have_none, with_half_a_message, with_what_breaks_the_protocol),
    *(unread_behind_a_subscription, unread_behind_unread_answers),
)


def _send_all(address, way):
    return [way(floods.connected(address)) for _ in range(TIMES)]


def _fill(address):
    """As many connections as a user may have."""
    held = [floods.connected(address) for _ in range(CONNECTIONS)]
    for sock in held:
        sock.sendall(floods.PING)
        assert sock.recv(8) == floods.frame(b"PONG")
    return held


def _send_before_accept(address, times=TIMES, slow=SLOW):
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    socks = [floods.connected(address) for _ in range(times)]
    return [(sock, Lingering(LINGER_S, slow).give(sock, floods.SEND)) for sock in socks]


def _all_before_accept(address, times, slow):
    """So many of these, as actions of an attacker."""
    rounds = [min(AT_ONCE, times - done) for done in range(0, times, AT_ONCE)]
    return [partial(_send_before_accept, address, count, slow) for count in rounds]


@contextlib.contextmanager
def _attacker(*actions):
    """A process of ALICE's that does one of these at each call of what this returns, and stays until the end."""
    (go, going), (done, doing) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(ALICE, ALICE, ALICE)
            os.setresuid(ALICE, ALICE, ALICE)
            held = []
            for action in actions:
                os.read(go, 1)
                held.append(action())
                os.write(doing, b"x")
            signal.pause()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(doing)

    def step():
        os.write(going, b"x")
        assert os.read(done, 1) == b"x", "the attack failed"

    try:
        yield step
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for number in (go, going, done):
            os.close(number)


def _longest_s(address):
    """The longest time that another user waits for PONG, and then for a connection and a device."""
    longest_s = 0.0
    with floods.connected(address) as framed:
        framed.settimeout(60)
        for _ in range(ROUNDS):
            began_s = time.monotonic()
            framed.sendall(floods.PING)
            assert framed.recv(8) == floods.frame(b"PONG")
            assert ask(address, "/dev/null") == "granted"
            longest_s = max(longest_s, time.monotonic() - began_s)
    return longest_s


def _judge(broker, process):
    """Another user is served at once, while a thread of that process waits for what was sent."""
    longest_s = as_user(BOB, [], _longest_s, broker.socket)
    assert longest_s < LINGER_S / 2
    assert int(status_of(broker.pids[process])["Threads"]) > 1, "nothing was slow"


def _capabilities(pid):
    """What is effective in each thread of a process."""
    return {int(name): int(status_of(f"{pid}/task/{name}")["CapEff"], 16) for name in os.listdir(f"/proc/{pid}/task")}


def test_while_an_opening_sleeps_its_thread_alone_has_the_capability_and_all_others_are_served(dev):
    """A thread raises it for itself: the loop, which reads what the others say meanwhile, has none in force."""
    rules = """
  - {path: /dev/null, access: rw, class: mem, device: "1:3"}
  - {path: /dev/slow/node, access: rw, class: misc, device: "10:229"}
  - {path: /dev/missing, access: rw}
"""
    with folder() as where, fuse.held(where, "/dev/slow") as node:
        with running(f"version: 1\neveryone:\n  devices:{rules}") as broker, Raw(broker.socket) as client:
            opener = broker.pids["opener"]
            for _ in range(3):
                node.hold()
                client.send_call("io.fdbroker.Broker.Open", {"resources": [{"device": node.path, "access": "rw"}]})
                thread = node.by()
                assert thread not in (0, opener)
                for _ in range(10):
                    found = _capabilities(opener)
                    assert found.pop(thread) == 1 << 1  # CAP_DAC_OVERRIDE
                    assert opener in found
                    assert not any(found.values())
                    assert ask(broker.socket, "/dev/null", access="rw") == "granted"
                node.go_on()
                assert outcome(client.reply()) == "granted"
                assert not any(_capabilities(opener).values())
            node.hold()  # where something else is missing, it is looked at and not opened
            assert outcome(client.open(node.path, "/dev/missing", access="rw")) == "NoSuchResource"


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_others_are_served_while_what_a_user_sent_is_closed(dev, way):
    with running(POLICY) as broker:
        with _attacker(partial(_send_all, broker.socket, way)) as step:
            step()
            _judge(broker, "inbox")
        broker.wait_idle()


def _end_again_and_again(address):
    held = []
    for _ in range(CONNECTIONS * 4):
        slow, sock = Lingering(LINGER_S, 1), floods.connected(address)
        held += [slow, sock]  # this process would wait itself, if it closed them
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it was not let in
            sock.sendall(floods.SUBSCRIBE)
            time.sleep(0.1)
            held += slow.give(sock, b"x")
    return held


def test_a_connection_counts_until_all_that_waits_in_it_is_closed(dev):
    """Its owner could fill the inbox's table of descriptors with ended ones: each has a thread wait for seconds."""
    with running(POLICY) as broker:
        idle = broker.counts()["inbox"]
        with _attacker(partial(_end_again_and_again, broker.socket)) as step:
            step()
            broker.wait_for("limit connections")
            assert (
                broker.counts()["inbox"] - idle <= CONNECTIONS + 3
            )  # one is being read, and a pair has the kernel collect
            _judge(broker, "inbox")


def _send_to_be_refused(broker, step, rounds=1):
    """What is in the connections before these are accepted, for the opener stands still meanwhile."""
    step()
    for _ in range(rounds):
        os.kill(broker.pids["opener"], signal.SIGSTOP)
        try:
            step()
        finally:
            os.kill(broker.pids["opener"], signal.SIGCONT)
        time.sleep(0.2)


@pytest.mark.parametrize(("times", "slow"), [(TIMES, SLOW), (300, 1)])
def test_others_are_served_while_what_refused_clients_sent_is_closed(dev, times, slow):
    with running(POLICY) as broker:
        sending = _all_before_accept(broker.socket, times, slow)
        with _attacker(partial(_fill, broker.socket), *sending) as step:
            _send_to_be_refused(broker, step, len(sending))
            broker.wait_for("limit connections")
            _judge(broker, "opener")
        broker.wait_idle()


def _ask_and_leave(address, urgent):
    for _ in range(300):
        with floods.connected(address) as sock, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(b"x")  # if it was not refused before
            if urgent:
                sock.send(b"y", socket.MSG_OOB)


@pytest.mark.parametrize("urgent", [False, True], ids=["plain", "urgent"])
def test_refused_clients_that_sent_bytes_alone_do_not_wait_behind_one_that_is_slow(dev, urgent):
    """One descriptor that waits for an hour was enough to fill the opener's table, and nobody was let in any more."""
    with running(POLICY) as broker:
        actions = partial(_fill, broker.socket), partial(_send_before_accept, broker.socket, 1, 1)
        with _attacker(*actions, partial(_ask_and_leave, broker.socket, urgent)) as step:
            idle = broker.counts()["opener"]
            _send_to_be_refused(broker, step)
            broker.wait_for("limit connections")
            step()
            assert as_user(BOB, [], ask, broker.socket, "/dev/null") == "granted"
            assert broker.counts()["opener"] - idle <= CONNECTIONS + 3
        broker.wait_idle()


def test_refused_clients_hold_a_part_of_the_descriptors_alone(dev):
    """Then nobody is let in until some are closed, and whoever is in already is served."""
    most = 200
    with running(POLICY, descriptors=limits.DESCRIPTORS_RESERVED + most) as broker:
        sending = _all_before_accept(broker.socket, most // 2, 1)
        attacker = _attacker(partial(_fill, broker.socket), *sending)
        with attacker as step, floods.connected(broker.socket) as framed:
            framed.settimeout(LINGER_S / 2)
            _send_to_be_refused(broker, step, len(sending))
            broker.wait_for("too many connections wait to be closed")
            for _ in range(20):
                framed.sendall(floods.PING)
                assert framed.recv(8) == floods.frame(b"PONG")
                held = len(descriptors_of(broker.pids["opener"])) - broker.idle["opener"]
                assert most // 4 <= held <= most // 4 + CONNECTIONS + 2 + 32  # those of which the keeper has not said
                time.sleep(0.05)
        assert as_user(BOB, [], ask, broker.socket, "/dev/null") == "granted"
        broker.wait_idle()


@pytest.mark.parametrize("way", [*WAYS, None], ids=lambda way: way.__name__ if way else "refused")
def test_the_service_stops_while_what_was_sent_is_closed(dev, way):
    with running(POLICY) as broker:
        actions = [partial(_fill, broker.socket), partial(_send_before_accept, broker.socket)]
        with _attacker(*([partial(_send_all, broker.socket, way)] if way else actions)) as step:
            if way:
                step()
            else:
                _send_to_be_refused(broker, step)
            broker.process.terminate()
            assert broker.process.wait(LINGER_S - 1) == 0
