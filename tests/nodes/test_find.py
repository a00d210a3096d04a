"""Nodes that are found, and what sysfs says of their devices, kept from one time to the next."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from harness import MEM, descriptors_of, mount, node, unmount

from fdbroker.limits import every as limits
from fdbroker.nodes.find import Finder

NUMBER = os.makedev(240, 7)  # of the range for experiments


@pytest.fixture
def sysfs(dev):
    """A /sys/dev in which devices come and go."""
    mount("sys", "/sys/dev", "tmpfs", 0, "mode=0755")
    Path("/sys/dev/char").mkdir()
    yield
    unmount("/sys/dev")


def _register(number, kernel_class, name):
    folder = Path(f"/sys/dev/devices/{name}")
    folder.mkdir(parents=True)
    (folder / "subsystem").symlink_to(f"../../class/{kernel_class}")
    Path(f"/sys/dev/char/{number}").symlink_to(f"../devices/{name}")


def _remove(number, name):
    Path(f"/sys/dev/char/{number}").unlink()
    shutil.rmtree(f"/sys/dev/devices/{name}")


def _found(finder, path, **keep):
    found = finder.look(path, {})
    os.close(found.descriptor)
    number, *said = finder.device(found.facts.kind, found.status.st_rdev, **keep) if keep else found.facts[2:]
    assert number == found.facts.number
    return tuple(said)


def _kept():
    return [one for one in descriptors_of(os.getpid()).values() if one.startswith("/sys/dev/devices/")]


def test_what_is_kept_of_a_device_is_not_believed_of_the_next_one_with_its_number(sysfs):
    node("/dev/mine", NUMBER)
    finder = Finder()
    try:
        assert _found(finder, "/dev/mine") == ("", "")
        for kernel_class, name in (("sound", "pcm"), ("input", "event0"), ("input", "event1"), ("block", "pcm")):
            _register("240:7", kernel_class, name)
            for _ in range(2):
                assert _found(finder, "/dev/mine") == (kernel_class, name)
                assert _found(finder, "/dev/mine", keep=False) == (kernel_class, name)
            assert _kept() == [f"/sys/dev/devices/{name}"]
            _remove("240:7", name)
            assert _found(finder, "/dev/mine") == ("", "")
            assert _kept() == []
    finally:
        finder.close()


def test_so_many_devices_are_kept(sysfs):
    """DEVICES_KEPT; with one more all are closed."""
    finder = Finder()
    try:
        for minor in range(limits.DEVICES_KEPT + 1):
            node(f"/dev/many/{minor}", os.makedev(240, minor))
            _register(f"240:{minor}", "sound", f"pcm{minor}")
            assert len(_kept()) == minor
            assert _found(finder, f"/dev/many/{minor}") == ("sound", f"pcm{minor}")
        assert len(_kept()) == 1
    finally:
        finder.close()
    assert _kept() == []


def test_the_kernels_own(dev):
    node("/dev/zero-too", MEM["zero"])
    finder = Finder()
    try:
        for _ in range(2):
            assert _found(finder, "/dev/zero-too") == ("mem", "zero")
    finally:
        finder.close()
