"""The stored queue on a real file against a dictionary: over crashes, full disks, quotas, and time."""

from __future__ import annotations

import os
import shutil
import tempfile
from types import SimpleNamespace
from unittest import mock

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fdbroker.errors import QueueFull
from fdbroker.inbox import store as module
from fdbroker.inbox.store import NotStored, Stored, opened

TOPICS = ("news", "mail")
MESSAGES, BYTES = 5, 60  # of one sender
UIDS = st.integers(1, 3)


class Machine(RuleBasedStateMachine):
    """Invariant: what waits for whom, and what each sender has used, are what a plain dictionary says.

    So a message is never lost after its commit, and never there again after that of its acknowledgement.
    """

    def __init__(self):
        super().__init__()
        self.now_us = 1_000_000
        clock = SimpleNamespace(time_ns=lambda: self.now_us * 1000, monotonic=lambda: self.now_us / 10**6)
        self.patched = mock.patch.object(module, "time", clock)
        self.patched.start()
        self.folder = tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
        self.store, _ = opened(self.folder)
        self.number = 0
        self.kept: dict[int, tuple[Stored, set[int]]] = {}
        self.new: list[tuple[Stored, set[int]]] = []
        self.done: list[tuple[int, int]] = []

    @rule(
        sender=UIDS,
        recipients=st.frozensets(UIDS, min_size=1),
        topic=st.sampled_from(TOPICS),
        data=st.sampled_from([b"", b"x" * 10, b"y" * 20]),
        keep_s=st.integers(1, 100),
        at_once=st.booleans(),
    )
    def put(self, sender, recipients, topic, data, keep_s, at_once):
        if self.full(sender, data):  # then the sender's own that were over when they were committed go
            self.kept = {
                number: row
                for number, row in self.kept.items()
                if row[0].sender != sender or row[0].expires_us > self.now_us
            }
        if self.full(sender, data):
            with pytest.raises(QueueFull):
                self.store.check(sender, len(data), MESSAGES, BYTES)
            return
        self.store.check(sender, len(data), MESSAGES, BYTES)
        self.number += 1
        message = Stored(self.number, sender, topic, self.now_us + keep_s * 10**6, data)
        self.store.put(message, recipients)
        self.new.append((message, set(recipients)))
        if at_once:
            self.commit()

    def full(self, sender, data):
        used = [message for message, _ in [*self.kept.values(), *self.new] if message.sender == sender]
        return len(used) >= MESSAGES or sum(len(one.data) for one in used) + len(data) > BYTES

    @rule(uid=UIDS, numbers=st.lists(st.integers(0, 30), max_size=3))
    def acknowledge(self, uid, numbers):
        numbers = [number % (self.number + 2) for number in numbers]
        self.store.acknowledge(uid, frozenset(TOPICS), numbers)
        self.done += [(uid, number) for number in numbers]

    @rule()
    def commit(self):
        self.store.commit()
        self.kept |= {message.number: (message, left) for message, left in self.new}
        for uid, number in self.done:
            if number in self.kept:
                self.kept[number][1].discard(uid)
                if not self.kept[number][1]:
                    del self.kept[number]
        self.new, self.done = [], []

    @precondition(lambda self: self.new)
    @rule()
    def the_disk_is_full(self):
        self.store._database.execute("PRAGMA query_only = ON")
        with pytest.raises(NotStored):
            self.store.commit()
        self.store._database.execute("PRAGMA query_only = OFF")
        self.new, self.done = [], []

    @rule()
    def crash(self):
        """What a process that is killed leaves behind, opened by the next one."""
        copy = tempfile.mkdtemp(dir=os.path.dirname(self.folder))
        shutil.copytree(self.folder, copy, ignore=shutil.ignore_patterns("*-reserve"), dirs_exist_ok=True)
        self.end()
        self.folder = copy
        self.store, said = opened(copy)
        assert said == ""
        assert self.store.last_number >= max(self.kept, default=0)
        self.new, self.done = [], []
        self.look()

    @rule(seconds=st.integers(1, 60))
    def time_passes(self, seconds):
        self.now_us += seconds * 10**6
        self.look()

    def look(self):
        """Those that are over go, and count for nobody."""
        self.store.expire()
        self.kept = {number: row for number, row in self.kept.items() if row[0].expires_us > self.now_us}

    @invariant()
    def agrees(self):
        for uid in range(1, 5):
            for topics in (TOPICS, TOPICS[:1]):
                wanted = [
                    (number, message.data)
                    for number, (message, left) in sorted(self.kept.items())
                    if uid in left and message.topic in topics and message.expires_us > self.now_us
                ]
                assert self.store.waiting(uid, topics, 0, 1000) == wanted
                assert self.store.waiting(uid, topics, 3, 2) == [row for row in wanted if row[0] > 3][:2]
        used: dict[int, tuple[int, int]] = {}
        for message in [message for message, _ in [*self.kept.values(), *self.new]]:
            count, size = used.get(message.sender, (0, 0))
            used[message.sender] = (count + 1, size + len(message.data))
        assert self.store._used == used

    def end(self):
        self.store.close()
        shutil.rmtree(self.folder)

    def teardown(self):
        self.end()
        self.patched.stop()


TestStore = Machine.TestCase
TestStore.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
