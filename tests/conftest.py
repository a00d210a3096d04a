"""Fixtures of all tests."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from pathlib import Path

import harness
import pytest


def pytest_sessionstart(session: pytest.Session) -> None:
    if os.geteuid() == 0:
        harness.own_mount_namespace()


@pytest.fixture(autouse=True)
def no_descriptor_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test this process has the descriptors open that it had before."""
    before = set(harness.descriptors_of(os.getpid(), every=True).items())
    yield
    gc.collect()
    end_s = time.monotonic() + 10
    while left := {
        (name, what)
        for name, what in set(harness.descriptors_of(os.getpid(), every=True).items()) - before
        if "/fd" not in what
    }:
        assert time.monotonic() < end_s, f"descriptors left open: {left}"
        time.sleep(0.05)  # a thread may have it to close


@pytest.fixture
def root() -> None:
    """This test needs root."""
    harness.need_root()


@pytest.fixture
def dev(root: None) -> Iterator[Path]:
    """An own /dev."""
    with harness.private_dev() as path:
        yield path


@pytest.fixture(scope="session", autouse=True)
def stored_messages_of_the_machine():
    """No test leaves any: machines of other tests stand on this one's folders, and theirs could not be opened."""
    folder = "/var/lib/fdbroker"
    there = os.path.lexists(folder)
    yield
    assert there or not os.path.lexists(folder), f"a test has made {folder}: it needs --state"
