"""T1: the checked path is swapped for something else before it is opened."""

from __future__ import annotations

import os
import threading
import time

import pytest
from harness import ALICE, MEM, NO_RATES, Raw, as_user, node, outcome, running

POLICY = 'version: 1\neveryone: {devices: [{path: "/dev/pool/*", access: rw, class: mem, device: "1:5"}]}\n'


def _ask_many(address, path, seconds):
    """Every descriptor's device number, and how often each outcome came."""
    seen: dict[str, int] = {}
    numbers = set()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with Raw(address) as client:
            for _ in range(50):
                reply = client.open(path, access="rw")
                seen[outcome(reply)] = seen.get(outcome(reply), 0) + 1
                for number in client.descriptors:
                    numbers.add(os.fstat(number).st_rdev)
                    os.close(number)
                client.descriptors.clear()
    return [sorted(numbers), seen]


def _flip(stop, *names):
    """Exchange what stands under a name, as fast as can be: by rename, so that the name is always there."""
    count = 0
    while not stop.is_set():
        for source, target in names:
            os.rename(source, target)
        count += 1
    assert count > 500  # so many a second, at least, on a busy machine


@pytest.mark.parametrize("evil", ["link", "other node", "regular file", "fifo"])
def test_only_the_allowed_device_ever_comes(dev, evil):
    node("/dev/pool/good", MEM["zero"])
    node("/dev/secret", MEM["urandom"])
    if evil == "link":
        os.symlink("/dev/secret", "/dev/pool/.evil")
    elif evil == "other node":
        node("/dev/pool/.evil", MEM["urandom"])
    elif evil == "regular file":
        open("/dev/pool/.evil", "w").close()
    else:
        os.mkfifo("/dev/pool/.evil")
    stop = threading.Event()
    flips = [("/dev/pool/good", "/dev/pool/.kept"), ("/dev/pool/.evil", "/dev/pool/good")]
    flips += [("/dev/pool/good", "/dev/pool/.evil"), ("/dev/pool/.kept", "/dev/pool/good")]
    with running(POLICY.replace('"/dev/pool/*"', "/dev/pool/good") + NO_RATES) as broker:
        flipper = threading.Thread(target=_flip, args=(stop, *flips))
        flipper.start()
        try:
            numbers, seen = as_user(ALICE, [], _ask_many, broker.socket, "/dev/pool/good", 1.5)
        finally:
            stop.set()
            flipper.join()
    assert numbers == [MEM["zero"]]
    assert seen.get("granted", 0) > 0
    assert sum(count for name, count in seen.items() if name != "granted") > 0
    assert set(seen) <= {"granted", "NotWhatItWas", "NoSuchResource"}


def test_a_swapped_parent_folder_leads_nowhere_else(dev):
    node("/dev/pool/good", MEM["zero"])
    os.mkdir("/dev/elsewhere")
    node("/dev/elsewhere/good", MEM["urandom"])
    os.symlink("/dev/elsewhere", "/dev/evil")
    stop = threading.Event()
    flips = [
        ("/dev/pool", "/dev/kept"),
        ("/dev/evil", "/dev/pool"),
        ("/dev/pool", "/dev/evil"),
        ("/dev/kept", "/dev/pool"),
    ]
    with running(POLICY + NO_RATES) as broker:
        flipper = threading.Thread(target=_flip, args=(stop, *flips))
        flipper.start()
        try:
            numbers, seen = as_user(ALICE, [], _ask_many, broker.socket, "/dev/pool/good", 1.5)
        finally:
            stop.set()
            flipper.join()
    assert numbers == [MEM["zero"]]
    assert seen.get("granted", 0) > 0
