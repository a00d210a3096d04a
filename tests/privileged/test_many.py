"""Ten thousand connections that say nothing: they hold, cost no CPU, and others are served beside them."""

from __future__ import annotations

import multiprocessing
import os
import resource
import select
import socket
import time

from harness import ALICE, BOB, EVERYONE_NULL, Raw, as_user, ask, cannot, outcome, running

import fdbroker.client.sync

IDLE, SUBSCRIBERS = 9_000, 1_000
POLICY = EVERYONE_NULL.replace("everyone: {", "everyone: {send: [news], subscribe: [news], ") + (
    "topics: {news: {}}\n"
    "limits: {connections: 20000, subscriptions: 1024, requests_per_second: 100000, burst: 100000}\n"
)
SUBSCRIBE = b'{"method":"io.fdbroker.Inbox.Subscribe","parameters":{"topics":["news"]},"more":true}\0'


def cpu_s(pids):
    """What these processes have used so far."""
    ticks = 0
    for pid in pids:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def connected(address, count):
    made = []
    while len(made) < count:
        sock = socket.socket(socket.AF_UNIX)
        made.append(sock)
        sock.connect(address)  # waits while the backlog is full
    return made


def hold(address, ready, go):
    """All of them in one process of ALICE's; says when they are there, and how many subscribers got a message."""
    os.setresuid(ALICE, ALICE, ALICE)
    idle, subscribers = connected(address, IDLE), connected(address, SUBSCRIBERS)
    for sock in subscribers:
        sock.sendall(SUBSCRIBE)
    ready.send(True)
    poll = select.poll()
    for sock in subscribers:
        poll.register(sock, select.POLLIN)
    got, end = set(), time.monotonic() + 30
    while len(got) < len(subscribers) and time.monotonic() < end:
        for number, _ in poll.poll(1000):
            got.add(number)
            poll.unregister(number)
    go.wait(30)
    others = select.poll()
    for sock in idle:
        others.register(sock, select.POLLIN)
    ready.send([len(got), len(others.poll(0))])  # an idle one that can be read has ended


def test_they_hold_and_others_are_served(dev):
    needed = IDLE + SUBSCRIBERS + 1000  # a process of the broker keeps some for other things
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, max(hard, needed)))
    except (ValueError, OSError):
        cannot(f"this machine allows no process {needed} descriptors")
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    go = fork.Event()
    try:
        with running(POLICY) as broker:
            holder = fork.Process(target=hold, args=(broker.socket, theirs, go), daemon=True)
            holder.start()
            try:
                assert ours.poll(60), "they could not connect"
                ours.recv()
                end = time.monotonic() + 30
                while broker.counts()["inbox"] < IDLE + SUBSCRIBERS:  # those that wait to be accepted
                    assert time.monotonic() < end, broker.counts()
                    time.sleep(0.1)
                time.sleep(1)  # until the last of them has subscribed
                pids = broker.pids.values()
                before = cpu_s(pids)
                time.sleep(2)
                assert cpu_s(pids) - before <= 0.04  # of two seconds, in ticks of a hundredth
                assert as_user(BOB, [], ask, broker.socket, "/dev/null") == "granted"
                assert fdbroker.client.sync.ping(broker.socket) < 5
                with Raw(broker.socket) as client:
                    sent = client.call("io.fdbroker.Inbox.Send", {"topic": "news", "payload": "x"})
                    assert outcome(sent) == "granted"
                go.set()
                assert ours.poll(60)
                assert ours.recv() == [SUBSCRIBERS, 0]
            finally:
                holder.kill()
                holder.join()
            broker.wait_idle()
    finally:
        ours.close()
        theirs.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
