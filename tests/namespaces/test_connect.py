"""A net namespace is connected to its bridge, or it is not: nothing reaches the bridge of one that could not be finished."""

from __future__ import annotations

import os

import pytest
from harness import CLONE_NEWNET, LIBC, ip, own_network

from fdbroker.kernel.capabilities import Bracket
from fdbroker.namespaces.connect import connect
from fdbroker.terms import Uplink

UPLINK = Uplink("br0", "10.88.0.0/29", isolated=True)
NOTHING = Bracket(frozenset())  # root needs none


@pytest.fixture
def made(root):
    """A new net namespace beside one with a bridge, in which this process stays; what its `connect` does is a child's."""
    with own_network():
        ip("link", "add", "br0", "type", "bridge")
        ip("addr", "add", "10.88.0.1/29", "dev", "br0")
        ip("link", "set", "br0", "up")
        here = os.open("/proc/self/ns/net", os.O_RDONLY)
        assert LIBC.unshare(CLONE_NEWNET) == 0
        namespace = os.open("/proc/self/ns/net", os.O_RDONLY)
        assert LIBC.setns(here, CLONE_NEWNET) == 0
        yield namespace
        os.close(here)
        os.close(namespace)


def _connected(namespace):
    """Whether it could be connected; `connect` enters the namespace, so a child does it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            connect(namespace, UPLINK, 1000, 4, NOTHING, NOTHING)
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1] == 0


def test_one_that_is_connected_has_its_end_on_the_bridge_and_up(made):
    assert _connected(made)
    (port,) = [line for line in ip("-o", "link", "show", "master", "br0").splitlines() if "fdb" in line]
    assert "UP" in port


def test_one_in_which_lo_has_another_name_is_not_on_the_bridge(made):
    """Its owner can have it before it is connected, and keep it, and the request fails: there is no record of it."""
    child = os.fork()
    if child == 0:
        assert LIBC.setns(made, CLONE_NEWNET) == 0
        os.execvp("ip", ["ip", "link", "set", "lo", "name", "gone"])
    os.waitpid(child, 0)
    assert not _connected(made)
    assert ip("-o", "link", "show", "master", "br0") == ""
