"""Nodes whose number no driver has yet: the rule that names the number has it opened, and its class is judged then."""

from __future__ import annotations

import errno
import os
import types
from unittest import mock

import pytest
from harness import MEM, Raw, descriptors_of, node, outcome, running

from fdbroker.errors import NotWhatItWas, OpenFailed
from fdbroker.kernel.capabilities import Bracket
from fdbroker.opener import request
from fdbroker.opener.open import Nodes
from fdbroker.policy.decide import View
from fdbroker.terms import DenyRule, Device, DeviceRule, Grant, Namespace, NamespaceRule

NOBODYS = os.makedev(240, 7)  # for local use, Documentation/admin-guide/devices.txt: no driver of a distribution's
SEEN = View((), (), (), (), {}, administrator=False)
ASKED = Device("/dev/mine", "rw")


def _rule(number, kernel_class="mem"):
    return DeviceRule("/dev/mine", "rw", kernel_class, number, False, "everyone", "f:1", ())


def _opened(nodes, *rules):
    """What was judged, once it is open."""
    found, descriptors = {}, {}
    try:
        nodes.judge_some([ASKED], [rules], SEEN, found)
        nodes.open_all([ASKED], found, descriptors)
        return found
    finally:
        for number in [*descriptors.values(), *(one.node.descriptor for one in found.values())]:
            os.close(number)


class Loading(Nodes):
    """Nodes whose driver comes with the open: the kernel has the class that is said, one answer for each time."""

    said: list[str]
    asked = 0

    def facts(self, name, status, *, keep=True):
        self.asked += 1
        return super().facts(name, status, keep=keep)._replace(kernel_class=self.said[self.asked - 1], kernel_name="")


@pytest.fixture
def loading(dev):
    node("/dev/mine", MEM["zero"], 0o666)
    nodes = Loading(Bracket(frozenset()))
    yield nodes
    nodes.close()


def test_a_driver_that_comes_with_the_open_is_judged_then(loading):
    loading.said = ["", "mem"]
    assert _opened(loading, _rule("1:5"))[0].node.facts.number == "1:5"


@pytest.mark.parametrize("comes", ["input", ""])
def test_one_of_another_class_is_refused_and_nothing_stays_open(loading, comes):
    loading.said = ["", comes]
    os.close(loading.look("/dev/mine", SEEN).descriptor)  # so that the device's folder is kept
    loading.asked = 0
    before = descriptors_of(os.getpid())
    with pytest.raises(NotWhatItWas, match=f"its class is {comes or 'unknown'}, not mem"):
        _opened(loading, _rule("1:5"))
    assert descriptors_of(os.getpid()) == before


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
    found, descriptors = {}, {}
    nodes.judge_some([ASKED], [(_rule("1:5"),)], SEEN, found)
    os.unlink("/dev/mine")
    try:
        with pytest.raises(NotWhatItWas, match="removed"):
            nodes.open_all([ASKED], found, descriptors)
        assert descriptors == {}
    finally:
        os.close(found[0].node.descriptor)


def test_after_a_reload_the_way_to_a_node_and_the_rule_of_what_was_made_are_judged_again(nodes):
    """A deny rule names where a link led, or the rule by which the worker made something is gone."""
    node("/dev/real", MEM["zero"], 0o666)
    os.symlink("real", "/dev/mine")
    rule, made_by = _rule("1:5"), NamespaceRule(("net",), "", False, True, None, "everyone", "f:2", ())
    new = Namespace("net")
    denying = DenyRule(("/dev/real",), (), frozenset(), frozenset(), True, "everyone", "f:3", (), ())
    granted = {1: Grant(new, made_by, "", "")}

    def again(view, allowed):
        found = {}
        nodes.judge_some([ASKED], [(rule,)], SEEN, found)
        connection = types.SimpleNamespace(view=view)
        opening = types.SimpleNamespace(
            connection=connection, view=SEEN, resources=[ASKED, new], found=found, grants=granted
        )
        try:
            with mock.patch.object(request, "authorize_resources", return_value=allowed):
                request._authorize_again(opening)
        finally:
            os.close(found[0].node.descriptor)

    after = SEEN._replace(limits={"burst": 1})
    again(after, [(rule,), (made_by,)])
    with pytest.raises(request._Ended, match=r"authorize.*it leads to /dev/real"):
        again(after._replace(deny=(denying,)), [(rule,), (made_by,)])
    with pytest.raises(request._Ended, match=r"authorize.*the rule that allowed it is gone"):
        again(after, [(rule,), (made_by._replace(where="f:9"),)])
