"""Links below /dev: they lead where the kernel says, as far as every one of them is root's and stays below /dev."""

from __future__ import annotations

import contextlib
import os
import shutil

import pytest
from harness import ALICE, MEM, node
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fdbroker.errors import NoSuchResource, NotWhatItWas
from fdbroker.nodes.find import Finder

TOP = "/dev/t"
PLACES = ("x", "y", "z", "l", "d/x", "d/y", "d/e/x", "d/e/l")
# of a link at the top, and in a folder; `..` stands behind folders alone, of which the paths here are
TARGETS = (
    *PLACES,
    "d",
    "d/e",
    "./x",
    "d//y",
    "d/../y",
    "d/e/../../z",
    "l/x",
    "l/e/x",
    "gone",
    f"{TOP}/y",
    f"{TOP}/d/e/x",
)
UP = {"d": "../", "d/e": "../../"}
TREES = st.fixed_dictionaries({place: st.sampled_from(("node", "", *TARGETS)) for place in PLACES})
ASKED = (*PLACES, "l/x", "l/y", "l/e/x", "d/e/l/x", "l/l/l/x")


@contextlib.contextmanager
def _finder():
    finder = Finder()
    try:
        yield finder
    finally:
        finder.close()


def _found(finder, path):
    """What was found, as the kernel knows it, and the paths where links led."""
    try:
        found = finder.look(path, {})
    except (NoSuchResource, NotWhatItWas) as refusal:
        return type(refusal).__name__, str(refusal)
    os.close(found.descriptor)
    return (found.status.st_dev, found.status.st_ino), found.names


def _by_the_kernel(path):
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return "NoSuchResource"
    except OSError:  # ELOOP
        return "NotWhatItWas"
    return status.st_dev, status.st_ino


@given(TREES)
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_link_leads_where_the_kernel_says(dev, tree):
    shutil.rmtree(TOP, ignore_errors=True)
    os.makedirs(f"{TOP}/d/e")
    for place, what in tree.items():
        if what == "node":
            node(f"{TOP}/{place}", MEM["zero"])
        elif what:
            up = "" if what.startswith("/") else UP.get(os.path.dirname(place), "")
            os.symlink(up + what, f"{TOP}/{place}")
    with _finder() as finder:
        for asked in ASKED:
            path = f"{TOP}/{asked}"
            found, names = _found(finder, path)
            assert found == _by_the_kernel(path), (path, names)
            if isinstance(found, tuple):
                last = names[-1] if names else path
                assert os.path.realpath(path) == last
                assert [os.stat(name).st_ino for name in names] == [found[1]] * len(names)


@pytest.mark.parametrize(
    ("targets", "why"),
    [
        (["/etc/passwd"], "a link leads out of /dev"),
        (["../etc/passwd"], "a link leads out of /dev"),
        (["d/../../dev/real"], "a link leads out of /dev"),
        (["/dev/../etc/passwd"], "a link leads out of /dev"),
        (["/deviant"], "a link leads out of /dev"),
        (["/dev"], "a link leads out of /dev"),
        (["/dev/"], "a link leads to a folder"),
        (["."], "a link leads to a folder"),
        (["1", "2", "/etc/passwd"], "a link leads out of /dev"),
        (["0"], "too many links"),
        (["1", "0"], "too many links"),
    ],
)
def test_a_link_that_leads_elsewhere_is_none(dev, targets, why):
    os.mkdir("/dev/d")
    for number, target in enumerate(targets):
        os.symlink(target, f"/dev/{number}")
    with _finder() as finder:
        found, said = _found(finder, "/dev/0")
    assert found == "NotWhatItWas"
    assert why in said


def test_so_many_links_are_followed_as_the_kernel_does(dev):
    node("/dev/0", MEM["zero"])
    for number in range(1, 42):
        os.symlink(str(number - 1), f"/dev/{number}")
    with _finder() as finder:
        assert _found(finder, "/dev/40") == (_by_the_kernel("/dev/40"), tuple(f"/dev/{n}" for n in reversed(range(40))))
        assert _found(finder, "/dev/41")[0] == _by_the_kernel("/dev/41") == "NotWhatItWas"


@pytest.mark.parametrize("place", ["l", "d/l", "d"])
def test_a_link_of_somebody_else_is_none_wherever_it_is_on_the_way(dev, place):
    os.mkdir("/dev/real")
    node("/dev/real/l", MEM["zero"])
    if place == "d":
        os.symlink("real", "/dev/d")
    elif place == "d/l":
        os.mkdir("/dev/d")
        os.symlink("../real/l", "/dev/d/l")
    else:
        os.symlink("d/l", "/dev/l")
        os.symlink("real", "/dev/d")
    os.lchown(f"/dev/{place}", ALICE, 0)
    asked = "/dev/l" if place == "l" else "/dev/d/l"
    with _finder() as finder:
        found, why = _found(finder, asked)
        assert (found, "does not belong to root" in why) == ("NotWhatItWas", True)
        os.lchown(f"/dev/{place}", 0, 0)
        assert _found(finder, asked)[0] == _by_the_kernel(asked)
