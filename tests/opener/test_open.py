"""Nodes whose number no driver has yet: the rule that names the number has it opened, and its class is judged then."""

from __future__ import annotations

import errno
import os
import socket
from unittest import mock

import pytest
from harness import MEM, Raw, descriptors_of, node, outcome, running

from fdbroker.errors import Denied, NotWhatItWas, OpenFailed
from fdbroker.kernel.capabilities import Bracket
from fdbroker.limits import every as limits
from fdbroker.opener import open as open_module
from fdbroker.opener import request
from fdbroker.opener.authorize import Account, Connection, Flight
from fdbroker.opener.close import Closing
from fdbroker.opener.open import THREAD, TURN, WORKER, Nodes
from fdbroker.opener.views import Permit, Seen
from fdbroker.policy.decide import View
from fdbroker.policy.fit import DANGEROUS_CLASSES
from fdbroker.terms import DenyRule, Device, DeviceRule, Grant, Namespace, NamespaceRule, Subject

NOBODYS = os.makedev(240, 7)  # for local use, Documentation/admin-guide/devices.txt: no driver of a distribution's
SEEN = View((), (), (), {}, administrator=False)
ASKED = Device("/dev/mine", "rw")


def _rule(number, kernel_class="mem"):
    return DeviceRule("/dev/mine", "rw", kernel_class, number, False, "everyone", "f:1", ())


def _opened(nodes, *rules, permit=None, removed=""):
    """The grant to which the node led, once it is open; a node of a driver that may sleep is opened as by a thread."""
    found, grants, descriptors = {}, {}, {}
    permits = [permit or Permit(ASKED, rules)]
    try:
        if removed:
            with mock.patch.object(open_module, "sleeps", return_value=True):
                assert nodes.open_some(permits, SEEN, found, grants, descriptors) == THREAD
            os.unlink(removed)
            nodes.open_some(permits, SEEN, found, grants, descriptors, sleep=True)
        assert nodes.open_some(permits, SEEN, found, grants, descriptors) is None
        return grants[0]
    finally:
        for number in [*descriptors.values(), *(one.descriptor for one in found.values())]:
            os.close(number)


class Loading(Nodes):
    """Nodes whose driver comes with the open: the kernel has the class that is said, one answer for each time."""

    said: list[str]
    asked = 0

    def device(self, kind, rdev, *, keep=True):
        self.asked += 1
        return super().device(kind, rdev, keep=keep)[0], self.said[self.asked - 1], ""


@pytest.fixture
def loading(dev):
    node("/dev/mine", MEM["zero"], 0o666)
    nodes = Loading(Bracket(frozenset()))
    yield nodes
    nodes.close()


def test_a_driver_that_comes_with_the_open_is_judged_then(loading):
    loading.said = ["", "mem"]
    assert _opened(loading, _rule("1:5")).rdev == "1:5"


@pytest.mark.parametrize("comes", ["input", ""])
def test_one_of_another_class_is_refused_and_nothing_stays_open(loading, comes):
    loading.said = ["", comes]
    os.close(loading.look("/dev/mine", {}).descriptor)  # so that the device's folder is kept
    loading.asked = 0
    before = descriptors_of(os.getpid())
    with pytest.raises(NotWhatItWas, match=f"its class is {comes or 'unknown'}, not mem"):
        _opened(loading, _rule("1:5"))
    assert descriptors_of(os.getpid()) == before


def test_a_dangerous_class_that_comes_with_the_open_is_refused_to_a_rule_for_whatever_class(loading):
    loading.said = ["", DANGEROUS_CLASSES[0]]
    with pytest.raises(NotWhatItWas, match="dangerous"):
        _opened(loading, _rule("1:5", ""))


def test_a_registered_class_is_asked_for_once_and_an_unregistered_number_is_opened_for_a_rule_that_names_it(loading):
    loading.said = ["mem"]
    _opened(loading, _rule("1:5", "input"), _rule("1:5"))
    assert loading.asked == 1
    for number in ("1:*", "*:5", ""):
        loading.said, loading.asked = [""], 0
        with pytest.raises(NotWhatItWas, match="its class is unknown, not mem"):
            _opened(loading, _rule(number))


@pytest.mark.parametrize("number", [errno.ENODEV, errno.ENXIO])
def test_without_a_driver_the_text_says_so(number):
    assert "no driver is loaded for 10:223," in str(OpenFailed(number, rdev="10:223"))
    assert "no driver is loaded for its number," in str(OpenFailed(number))
    assert "driver" not in str(OpenFailed(errno.EBUSY, rdev="10:223"))


def test_a_number_that_no_driver_has_is_asked_of_the_kernel(dev):
    node("/dev/mine", NOBODYS, 0o666)
    everyone = 'version: 1\neveryone: {devices: [{path: /dev/mine, access: rw, class: misc, device: "%s"}]}\n'
    with running(everyone % "240:7") as broker, Raw(broker.socket) as client:
        reply = client.open("/dev/mine", access="rw")
        assert (outcome(reply), reply["parameters"]["errno"]) == ("OpenFailed", errno.ENXIO)
        assert "no driver is loaded for 240:7" in broker.records("refused")[0]["FDBROKER_REASON"]
        broker.reload(everyone % "240:*")
        reply = client.open("/dev/mine", access="rw")
        assert (outcome(reply), reply["parameters"]["reason"]) == ("NotWhatItWas", "its class is unknown, not misc")


@pytest.fixture
def nodes(dev):
    made = Nodes(Bracket(frozenset()))
    yield made
    made.close()


def test_a_node_that_is_removed_before_it_is_opened_is_not_opened(nodes):
    """Its number may be another device's by then, and what was found of it would open that."""
    node("/dev/mine", MEM["zero"], 0o666)
    before = descriptors_of(os.getpid())
    with pytest.raises(NotWhatItWas, match="removed"):
        _opened(nodes, _rule("1:5"), removed="/dev/mine")
    assert descriptors_of(os.getpid()) == before


def test_of_what_was_judged_before_only_the_same_is_granted_again(nodes):
    """The path is allowed as before, but leads to another device, or by a name that is denied now."""
    rule, wide = _rule("1:5"), _rule("1:3")
    permit = Permit(ASKED, (rule, wide))
    for number, granted in (("zero", rule), ("zero", rule), ("null", wide), ("zero", rule)):
        node("/dev/mine", MEM[number], 0o666)
        assert _opened(nodes, permit=permit).rule is granted
        os.unlink("/dev/mine")
    node("/dev/mine", os.makedev(1, 11), 0o600)
    with pytest.raises(NotWhatItWas, match="its device number is 1:11, not 1:5"):
        _opened(nodes, permit=permit)
    os.unlink("/dev/mine")
    os.symlink("real", "/dev/mine")
    node("/dev/real", MEM["zero"], 0o666)
    denying = DenyRule(("/dev/real",), (), frozenset(), frozenset(), True, "everyone", "f:3", (), ())
    found = {}
    with pytest.raises(Denied, match="it leads to /dev/real"):
        nodes.open_some([permit], SEEN._replace(deny=(denying,)), found, {}, {})
    os.close(found[0].descriptor)
    assert _opened(nodes, permit=permit).rule is rule


@pytest.mark.parametrize(("path", "turns"), [("/dev/mine", 2), ("/dev/link", 5)])
def test_so_many_nodes_are_judged_in_one_turn(nodes, path, turns):
    """RESOURCES_AT_ONCE, behind links a quarter of these; so many are opened then, when the last of them is judged."""
    node("/dev/mine", MEM["zero"], 0o666)
    os.symlink("mine", "/dev/link")
    permits = [Permit(Device(path, "ro"), (_rule("1:5"),))] * (limits.RESOURCES_AT_ONCE + 1)
    found, grants, descriptors = {}, {}, {}
    counts = []
    while nodes.open_some(permits, SEEN, found, grants, descriptors) == TURN:
        counts.append((len(found), len(descriptors)))
    step = limits.RESOURCES_AT_ONCE // (turns - 1)
    every = len(permits)
    assert counts == [*((step * turn, 0) for turn in range(1, turns)), (every, every - 1)]
    assert len(found) == len(grants) == len(descriptors) == len(permits)
    for number in [*descriptors.values(), *(one.descriptor for one in found.values())]:
        os.close(number)


def test_after_a_reload_the_way_to_a_node_and_the_rule_of_what_was_made_are_judged_again(nodes):
    """A deny rule names where a link led, or the rule by which the worker made something is gone."""
    node("/dev/real", MEM["zero"], 0o666)
    os.symlink("real", "/dev/mine")
    rule, made_by = _rule("1:5"), NamespaceRule(("net",), "", False, True, None, "everyone", "f:2", ())
    new = Namespace("net")
    denying = DenyRule(("/dev/real",), (), frozenset(), frozenset(), True, "everyone", "f:3", (), ())
    maxima = {name: limit.default for name, limit in limits.USER_LIMITS.items()}
    before, after = SEEN._replace(limits=maxima), SEEN._replace(limits=maxima | {"burst": 1})

    def refused(view, ours, theirs):
        """Why it is refused when that view comes while it waits for a thread, and these rules allow it then."""
        ends = socket.socketpair()
        subject = Subject(5, frozenset(), 5, 1, "", "", foreign=True, owner=5)
        connection = Connection(1, ends[0], subject, before, Account(maxima, 0.0), Flight(100))
        connection.view = _judged_by(before, {ASKED: Permit(ASKED, (rule,)), new: Permit(new, (made_by,))})
        opening = request.Opening(connection, [ASKED, new], Closing())
        audit = mock.Mock()
        steps = request.answer(opening, nodes, audit)
        assert next(steps) == WORKER
        opening.grants[1], opening.descriptors[1] = Grant(new, made_by), os.open("/dev/null", os.O_RDONLY)
        with mock.patch.object(open_module, "sleeps", return_value=True):
            assert next(steps) == THREAD
        opening.open_nodes(nodes)
        connection.view = _judged_by(view, {ASKED: Permit(ASKED, (ours,)), new: Permit(new, (theirs,))})
        try:
            next(steps)
        except StopIteration as end:
            return [record.args[0].stage for record in audit.refuse.call_args_list], str(end.value or "")
        finally:
            opening.close()
            for end in ends:
                end.close()

    assert refused(after, rule, made_by) == ([], "")
    denied = after._replace(deny=(denying,))
    assert refused(denied, rule, made_by) == (["authorize"], "it leads to /dev/real, denied to everyone")
    assert refused(after, rule, made_by._replace(types=("mnt",))) == (["authorize"], "the rule that allowed it is gone")
    # it stands somewhere else now, which was refused once
    assert refused(after, rule, made_by._replace(where="f:9", source="group x")) == ([], "")


def _judged_by(view, permits):
    """A view of its own by which that was decided."""
    seen = Seen(*view)
    seen.permits.update(permits)
    return seen


def test_each_new_namespace_counts_as_a_record(nodes):
    """They are asked for in the same words, and each has a record of its own."""
    rule, new = NamespaceRule(("uts",), "", False, True, None, "everyone", "f:2", ()), Namespace("uts")
    maxima = {name: limit.default for name, limit in limits.USER_LIMITS.items()} | {"record_burst": 20}
    ends = socket.socketpair()
    subject = Subject(5, frozenset(), 5, 1, "", "", foreign=True, owner=5)
    seen, account = SEEN._replace(limits=maxima), Account(maxima, 0.0)
    connection = Connection(1, ends[0], subject, seen, account, Flight(100))
    connection.view = _judged_by(seen, {new: Permit(new, (rule,))})
    opening = request.Opening(connection, [new] * 5, Closing())
    with mock.patch.object(request.time, "monotonic", return_value=0.0):
        steps = request.answer(opening, nodes, mock.Mock())
        assert next(steps) == WORKER
    left = 20 - 5 - limits.RECORDS_PER_CONNECTION
    assert [bool(account.records.take(1, 20, 0.0, cost)) for cost in (left + 1, left)] == [True, False]
    steps.close()
    opening.close()
    for end in ends:
        end.close()
