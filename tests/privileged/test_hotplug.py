"""Nodes that come, go and change, as watchers and who opens them see it, with a real broker."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path

import pytest
from harness import ALICE, BOB, GROUP, MEM, NO_RATES, Raw, as_user, ask, cannot, node, running

from fdbroker.launcher import needs

LIST = "io.fdbroker.Broker.List"
LAB = 'version: 1\neveryone: {devices: [{path: "/dev/lab/*", access: rw}]}\n'
QUIET_S = 1.0
DATED = 400  # nodes of a folder, of which one changes all the time
LISTINGS = 5  # of which one is taken to be the mean


@contextlib.contextmanager
def watching(broker):
    """A client that is sent each list: `next_list()` is its content, path to (access, generation)."""
    with Raw(broker.socket) as client:
        client.send_call(LIST, more=True)

        def next_list():
            reply = client.reply()
            assert reply["continues"] is True
            offers = reply["parameters"]["resources"]
            return {one["resource"]["device"]: (one["access"], one["generation"]) for one in offers}

        yield client, next_list


def is_quiet(client):
    client.sock.settimeout(QUIET_S)
    try:
        return client.reply() is None
    except TimeoutError:
        return True
    finally:
        client.sock.settimeout(15)


def test_mode_and_owner_are_told_and_only_what_can_be_opened_is_offered(dev):
    node("/dev/lab/a", MEM["zero"], 0o666)
    with running(LAB) as broker, watching(broker) as (_, next_list):  # an opener without a capability
        first = next_list()["/dev/lab/a"]
        assert first[0] == "rw"
        os.chmod("/dev/lab/a", 0o600)
        assert next_list() == {}
        assert ask(broker.socket, "/dev/lab/a") == "OpenFailed"
        os.chmod("/dev/lab/a", 0o644)
        assert next_list()["/dev/lab/a"][0] == "ro"
        assert ask(broker.socket, "/dev/lab/a") == "granted"
        os.chmod("/dev/lab/a", 0o666)
        assert next_list()["/dev/lab/a"] == first
        os.chown("/dev/lab/a", 0, GROUP)
        second = next_list()["/dev/lab/a"]
        os.chown("/dev/lab/a", BOB, GROUP)
        third = next_list()["/dev/lab/a"]
        assert [first[0], second[0], third[0]] == ["rw"] * 3
        assert len({first[1], second[1], third[1]}) == 3


def test_an_opener_that_was_given_a_capability_offers_what_root_alone_may_open(dev):
    node("/dev/lab/a", MEM["zero"])
    with running(LAB) as broker, watching(broker) as (_, next_list):
        first = next_list()["/dev/lab/a"]
        os.chmod("/dev/lab/a", 0)
        access, generation = next_list()["/dev/lab/a"]
        assert access == "rw"
        assert generation != first[1]
        assert ask(broker.socket, "/dev/lab/a", access="rw") == "granted"


def test_an_opener_that_may_read_alone_offers_that(dev):
    node("/dev/lab/a", MEM["zero"])
    with running(LAB.replace("rw", "ro")) as broker, watching(broker) as (_, next_list):
        assert next_list()["/dev/lab/a"][0] == "ro"
        assert ask(broker.socket, "/dev/lab/a") == "granted"


@pytest.mark.parametrize("becomes", ["zero", "full"])
def test_a_node_that_goes_and_comes_under_its_name_at_once_is_told(dev, becomes):
    node("/dev/lab/a", MEM["zero"], 0o666)
    with running(LAB) as broker, watching(broker) as (_, next_list):
        before = next_list()
        for _ in range(3):
            os.unlink("/dev/lab/a")
            node("/dev/lab/a", MEM[becomes], 0o666)
            after = next_list()
            assert after.keys() == before.keys()
            assert after != before
            before = after


def test_who_may_write_to_a_node_cannot_keep_the_service_busy_by_dating_it(dev):
    """The keeper hears of each time, for it watches the folder, and would list all of its nodes anew; nobody else hears."""

    def date(seconds):
        end, count = time.monotonic() + seconds, 0
        while time.monotonic() < end:
            os.utime("/dev/lab/0")
            count += 1
        return count

    for number in range(DATED):
        node(f"/dev/lab/{number}", MEM["zero"], 0o666)
    with running(LAB + NO_RATES) as broker, watching(broker) as (client, next_list):
        assert len(next_list()) == DATED
        os.utime("/dev/lab/0")
        assert is_quiet(client)
        before_s = _cpu_s(broker)
        with Raw(broker.socket) as other:
            for _ in range(LISTINGS):
                assert len(other.call(LIST)["parameters"]["resources"]) == DATED
        listing_s = (_cpu_s(broker)["keeper"] - before_s["keeper"]) / LISTINGS
        before_s = _cpu_s(broker)
        assert as_user(ALICE, [], date, 3.0) > 1000
        took_s = {name: at_s - before_s[name] for name, at_s in _cpu_s(broker).items()}
        assert took_s.pop("keeper") < 12 * listing_s  # one every 0.1 s would be 30
        assert max(took_s.values()) < 0.1, took_s
        # and who watches is told what comes meanwhile
        node("/dev/lab/new", MEM["zero"], 0o666)
        assert len(next_list()) == DATED + 1


def _cpu_s(broker):
    """The time that each process has had of a CPU."""
    return {name: int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9 for name, pid in broker.pids.items()}


# ---- in devtmpfs, where the kernel removes a folder with its last node


@pytest.fixture
def place(root):
    """A name in the machine's own /dev that nobody uses; what a test makes there is removed."""
    if os.stat("/dev").st_dev != needs._devtmpfs():
        cannot("/dev is no devtmpfs")
    name = f"/dev/fdbroker-test-{os.getpid()}"
    try:
        yield name
    finally:
        if os.path.isdir(name):
            shutil.rmtree(name)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def test_a_folder_that_goes_and_comes_again_is_served_without_a_restart(place):
    policy = f'version: 1\neveryone: {{devices: [{{path: "{place}/usb/*", access: rw}}]}}\n'
    node(f"{place}/usb/lp0", MEM["zero"])
    with running(policy) as broker, watching(broker) as (_, next_list):
        assert list(next_list()) == [f"{place}/usb/lp0"]
        for _ in range(3):
            assert ask(broker.socket, f"{place}/usb/lp0", access="rw") == "granted"
            os.unlink(f"{place}/usb/lp0")
            os.rmdir(f"{place}/usb")
            os.rmdir(place)
            assert next_list() == {}
            assert ask(broker.socket, f"{place}/usb/lp0") == "NoSuchResource"
            node(f"{place}/usb/lp0", MEM["zero"])
            assert list(next_list()) == [f"{place}/usb/lp0"]
        broker.reload(policy)
        assert "is reloaded" in broker.text()


def test_a_node_directly_in_dev_that_goes_and_comes_again_is_served_without_a_restart(place):
    rdev = os.stat("/dev/fuse").st_rdev if os.path.exists("/dev/fuse") else cannot("no /dev/fuse")
    node(place, rdev)
    with running(f"version: 1\neveryone: {{devices: [{{path: {place}, access: rw}}]}}\n") as broker:
        assert ask(broker.socket, place, access="rw") == "granted"
        os.unlink(place)
        node(place, rdev)
        assert ask(broker.socket, place, access="rw") == "granted"


def test_landlock_is_as_narrow_as_what_stays(place):
    def given(pattern):
        found = [pattern] if os.path.exists(pattern) else []
        return needs._places(pattern, found, needs._devtmpfs())

    assert given("/dev/null") == {"/dev/null"}  # in every kernel
    assert given("/dev/pts/*") == {"/dev/pts"}  # mounted there
    assert given("/dev/none/*") == {"/dev"}
    node(f"{place}/a", MEM["zero"])
    assert given(f"{place}/*") == {"/dev"}
    with contextlib.ExitStack() as stack:
        stack.callback(os.unlink, "/dev/fdbroker-link")
        os.symlink(f"{place}/a", "/dev/fdbroker-link")
        assert given("/dev/fdbroker-link") == {"/dev"}


def test_elsewhere_a_folder_stays(dev):
    node("/dev/lab/a", MEM["zero"])
    assert needs._places("/dev/lab/*", ["/dev/lab/a"], needs._devtmpfs()) == {"/dev/lab"}
