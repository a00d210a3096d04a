"""Faults of what the service stands on: a disk that is full, a journal that goes, a policy that is garbage while it is read.

What a process that dies or hangs does under the shipped units is in tests/system/test_faults.py.
"""

from __future__ import annotations

import contextlib
import os
import time

import harness
import pytest
from harness import ALICE, BOB, as_user, running

import fdbroker
from fdbroker.errors import QuotaExceeded

MAIL = f"""
version: 1
topics: {{mail: {{deliver: [queue]}}, brief: {{deliver: [queue], keep: 2s}}}}
limits: {{stored_messages: 100000, stored_bytes: 1073741824, requests_per_second: 1000000, burst: 1000000}}
users:
  {ALICE}: {{send: [mail, brief]}}
  {BOB}: {{subscribe: [mail, brief]}}
"""


@contextlib.contextmanager
def small_disk(mebibytes):
    """A folder on a file system of that size, which is root's alone."""
    with harness.folder() as where:
        disk = where / "disk"
        disk.mkdir()
        harness.mount("small", str(disk), "tmpfs", 0, f"mode=0755,size={mebibytes}m")
        try:
            yield disk
        finally:
            harness.unmount(str(disk))


def fill(disk):
    """Another program takes all the room that is left."""
    with open(disk / "other", "ab", buffering=0) as file:
        with pytest.raises(OSError, match="No space left"):
            while True:
                file.write(bytes(4096))


def send_until_full(address, topic, size, most):
    """How many messages were said to be stored before the first that was not; most at the end."""
    with fdbroker.connect(address) as client:
        for number in range(most):
            try:
                client.send(topic, f"{number} ".ljust(size, "x"))
            except QuotaExceeded as refusal:
                return number if refusal.limit == "store_bytes" else -1
    return most


def receive_all(address, acknowledge=True):
    """The numbers that the payloads begin with, all of them, each acknowledged in the next call."""
    got, last = [], []
    with fdbroker.connect(address) as client:
        after = 0
        while True:
            messages = client.receive(1000, last if acknowledge else ())
            messages = [one for one in messages if one.number > after]
            if not messages:
                return got
            got += [int(one.payload.split()[0]) for one in messages]
            last = [one.number for one in messages]
            after = last[-1]


@pytest.mark.parametrize("size", [10, 60_000])
def test_on_a_full_disk_what_was_stored_is_received_and_acknowledged_and_later_more_is_stored(dev, size):
    """The disk is filled by other programs too, so not even the database's log can grow."""
    with small_disk(40) as disk:
        state = ("--state", str(disk / "state"))
        with running(MAIL, *state) as broker:
            first = as_user(ALICE, [], send_until_full, broker.socket, "mail", size, 200)
            fill(disk)
            second = as_user(ALICE, [], send_until_full, broker.socket, "mail", size, 20_000)
            assert second < 20_000
            fill(disk)
            assert os.statvfs(disk).f_bavail == 0
            assert "messages cannot be stored: " in broker.text()
            # all of it is there, and goes, although there is no room for anything
            assert as_user(BOB, [], receive_all, broker.socket) == [*range(first), *range(second)]
            assert as_user(BOB, [], receive_all, broker.socket) == []
            (disk / "other").unlink()
            time.sleep(1.1)
            assert as_user(ALICE, [], send_until_full, broker.socket, "mail", size, 50) == 50
        with running(MAIL, *state) as broker:
            assert as_user(BOB, [], receive_all, broker.socket) == [*range(50)]


def test_killed_on_a_full_disk_it_starts_again_and_lets_acknowledge(dev):
    with small_disk(40) as disk:
        state = ("--state", str(disk / "state"))
        with running(MAIL, *state) as broker:
            fill(disk)
            stored = as_user(ALICE, [], send_until_full, broker.socket, "mail", 1000, 20_000)
            fill(disk)
            broker.expected_code = None
            os.kill(broker.pids["inbox"], 9)
            broker.process.wait(10)
        fill(disk)
        with running(MAIL, *state) as broker:
            assert as_user(BOB, [], receive_all, broker.socket) == [*range(stored)]
        with running(MAIL, *state) as broker:
            assert as_user(BOB, [], receive_all, broker.socket) == []


def test_on_a_full_disk_what_is_over_goes_and_makes_room(dev):
    with small_disk(40) as disk, running(MAIL, "--state", str(disk / "state")) as broker:
        as_user(ALICE, [], send_until_full, broker.socket, "brief", 60_000, 100)
        fill(disk)
        kept = as_user(ALICE, [], send_until_full, broker.socket, "mail", 60_000, 20_000)
        fill(disk)
        time.sleep(2.1)
        end = time.monotonic() + 20
        while as_user(ALICE, [], send_until_full, broker.socket, "mail", 60_000, 10) < 10:
            assert time.monotonic() < end, broker.text()
            time.sleep(0.2)
        assert len(as_user(BOB, [], receive_all, broker.socket)) >= kept + 10


def test_without_room_for_the_reserve_nothing_new_is_stored(dev):
    with small_disk(8) as disk, running(MAIL, "--state", str(disk / "state")) as broker:
        assert as_user(ALICE, [], send_until_full, broker.socket, "mail", 10, 10) == 0
        assert "messages cannot be stored: the disk is full: there is no room for the reserve" in broker.text()
