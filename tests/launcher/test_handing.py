"""A policy for opener, keeper and inbox: each of them gets it or none, and none uses one that was not handed on."""

from __future__ import annotations

import errno
import os
import socket
import time

import pytest

from fdbroker.kernel.link import Link
from fdbroker.launcher.ends import ServiceFailed
from fdbroker.launcher.handing import Handing
from fdbroker.launcher.start import Child
from fdbroker.limits import launcher as limits
from fdbroker.policy.compiled import Policy
from fdbroker.wire import link

NAMES = ("opener", "inbox", "keeper", "witness")
POLICY = Policy(frozenset(), frozenset(), {}, {}, {}, (), (), {}, {}, {})


@pytest.fixture
def ends():
    """The children, of which nothing but the links is looked at, and the other ends of these by name."""
    pairs = {name: socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for name in NAMES}
    yield (
        [Child(name, None, Link(ours), ()) for name, (ours, _) in pairs.items()],
        {name: theirs for name, (_, theirs) in pairs.items()},
    )
    for ours, theirs in pairs.values():
        ours.close()
        theirs.close()


def _came(theirs):
    """The numbers of the policies that came to each."""
    found = {}
    for name, end in theirs.items():
        found[name] = []
        end.setblocking(False)
        while True:
            try:
                data, descriptors, _, _ = socket.recv_fds(end, 100, 1)
            except BlockingIOError:
                break
            found[name].append(link.LAUNCHER_TO_OPENER.decode(data).number)
            os.close(descriptors[0])
    return found


def test_each_gets_it_and_the_next_one_waits_until_all_use_it(ends):
    children, theirs = ends
    handing = Handing()
    for number in (1, 2):
        assert handing.give(children, POLICY) == ""
        assert _came(theirs) == {"opener": [number], "inbox": [number], "keeper": [number], "witness": []}
        assert "busy" in handing.give(children, POLICY)
        assert [handing.taken("opener", number - 1), handing.taken("witness", number)] == [False, False]
        taken = [handing.taken(name, number) for name in ("opener", "keeper", "keeper", "inbox", "inbox")]
        assert taken == [False, False, False, True, False]


@pytest.mark.parametrize("full", ["opener", "inbox", "keeper"])
def test_none_gets_it_while_one_has_no_room(ends, full):
    """Else the others would keep one more at each attempt, however often that is."""
    children, theirs = ends
    (link_,) = [child.link for child in children if child.name == full]
    while not link_.waiting:
        link_.send(link.PING)
    handing = Handing()
    assert "busy" in handing.give(children, POLICY)
    assert not handing.can(children)
    theirs[full].setblocking(False)
    with pytest.raises(BlockingIOError):
        while theirs[full].recv(100):
            link_.flush()
    assert _came(theirs) == {name: [] for name in NAMES}
    assert handing.give(children, POLICY) == ""


def test_what_one_could_not_be_sent_has_its_number_for_itself(ends, monkeypatch):
    """Who has it, and not yet the next one, would use it when the opener says to use that one."""
    children, theirs = ends
    handing = Handing()

    def refuse(*_):
        raise OSError(errno.ETOOMANYREFS, os.strerror(errno.ETOOMANYREFS))

    with monkeypatch.context() as patched:
        patched.setattr(children[0].link, "send_with_descriptors", refuse)
        for generation in (1, 2, 2, 2, 3):
            assert "cannot be told" in handing.give(children, POLICY._replace(generation=generation))
            assert handing.can(children)
            assert not handing.taken("inbox", 1)
    assert handing.give(children, POLICY._replace(generation=4)) == ""
    tried = [1, 2, 2, 2, 3, 4]  # what is tried again is the same one, in whose place it is put
    assert _came(theirs) == {"opener": [4], "inbox": tried, "keeper": tried, "witness": []}
    assert [handing.taken(name, 4) for name in ("inbox", "keeper", "opener")] == [False, False, True]
    assert handing.give(children, POLICY._replace(generation=4)) == ""
    assert _came(theirs)["opener"] == [5]


def test_what_one_could_not_be_sent_and_is_tried_again_may_have_its_number(ends, monkeypatch):
    children, theirs = ends
    handing = Handing()
    with monkeypatch.context() as patched:
        patched.setattr(children[0].link, "send_with_descriptors", lambda *_: False)
        assert "busy" in handing.give(children, POLICY)
    assert handing.give(children, POLICY) == ""
    assert _came(theirs) == {"opener": [1], "inbox": [1, 1], "keeper": [1, 1], "witness": []}
    assert [handing.taken(name, 1) for name in ("inbox", "keeper", "opener")] == [False, False, True]


def test_who_does_not_take_it_in_time_ends_the_service(ends, monkeypatch):
    handing = Handing()
    handing.look()
    assert handing.give(ends[0], POLICY) == ""
    handing.taken("opener", 1)
    handing.look()
    later_s = time.monotonic() + limits.POLICY_SECONDS
    monkeypatch.setattr(time, "monotonic", lambda: later_s)
    with pytest.raises(ServiceFailed, match="the inbox and the keeper did not take the new policy"):
        handing.look()
