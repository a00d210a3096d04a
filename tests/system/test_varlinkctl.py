"""The service is understood by varlinkctl of systemd 257, which shares no code with it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fdbroker

INTERFACES = ("io.fdbroker.Admin", "io.fdbroker.Broker", "io.fdbroker.Inbox", "org.varlink.service")


@pytest.fixture(scope="module")
def facts(nspawn: Callable[..., Any], debian: Callable[[str], Path]) -> Any:
    found = nspawn("varlinkctl.py", debian("trixie"))
    assert found["started"]["code"] == 0, found["started"]["stderr"]
    return found


def documents(text: str) -> list[dict[str, Any]]:
    """JSON texts one after the other, with a record separator before each or not."""
    return [json.loads(line) for line in text.replace("\x1e", "").splitlines() if line]


def essence(text: str) -> str:
    """An interface without comments and spaces."""
    return re.sub(r"#.*|\s", "", text)


def test_info(facts):
    """`info` gets what GetInfo must say."""
    found = facts["info"]
    assert found["code"] == 0, found["stderr"]
    said = documents(found["stdout"])[0]
    assert said["version"] == fdbroker.__version__
    assert set(said["interfaces"]) == set(INTERFACES)


def test_list_interfaces(facts):
    """`list-interfaces` gets all."""
    assert set(facts["list_interfaces"]["stdout"].split()) == set(INTERFACES)


def test_list_methods(facts):
    """`list-methods` gets all methods of all."""
    assert set(facts["list_methods"]["stdout"].split()) == {
        "io.fdbroker.Admin.Reload",
        "io.fdbroker.Broker.About",
        "io.fdbroker.Broker.Open",
        "io.fdbroker.Broker.List",
        "io.fdbroker.Inbox.Receive",
        "io.fdbroker.Inbox.Send",
        "io.fdbroker.Inbox.Subscribe",
        "org.varlink.service.GetInfo",
        "org.varlink.service.GetInterfaceDescription",
    }


@pytest.mark.parametrize("name", INTERFACES)
def test_introspect(facts, name):
    """`introspect` parses each interface, and prints the one that is in the package."""
    found = facts["introspect"][name]
    assert found["code"] == 0, found["stderr"]
    source = Path(fdbroker.__file__).parent / f"wire/{name}.varlink"
    assert essence(found["stdout"]) == essence(source.read_text())


def test_validate(facts):
    """The interface passes `validate-idl`."""
    assert facts["validated"]["code"] == 0, facts["validated"]["stderr"]


def test_call_open(facts):
    """`call` of Open gets a grant."""
    found = facts["call_open"]["granted"]
    assert found["code"] == 0, found["stderr"]
    grant = documents(found["stdout"])[0]["grants"][0]
    assert grant["resource"]["device"] == "/dev/lab/zero"
    assert grant["rdev"] == "1:5"


def test_call_denied(facts):
    """A refusal is understood as an error by its name."""
    found = facts["call_open"]["denied"]
    assert found["code"] != 0
    assert "io.fdbroker.Broker.Denied" in found["stderr"] + found["stdout"]


@pytest.mark.parametrize(
    "call, error", [("wrong", "org.varlink.service.InvalidParameter"), ("method", "org.varlink.service.MethodNotFound")]
)
def test_call_wrong(facts, call, error):
    """A call that is wrong gets the standard's own error."""
    found = facts["call_open"][call]
    assert found["code"] != 0
    assert error in found["stderr"] + found["stdout"]


def test_call_list(facts):
    """`call` of List gets one reply."""
    found = facts["call_list"]
    assert found["code"] == 0, found["stderr"]
    assert [one["resource"]["device"] for one in documents(found["stdout"])[0]["resources"]] == ["/dev/lab/zero"]


def test_call_list_more(facts):
    """`call --more` of List gets another reply when a node comes, and when it goes."""
    replies = documents(facts["call_list_more"]["stdout"])
    names = [[one["resource"]["device"] for one in reply["resources"]] for reply in replies]
    assert names == [["/dev/lab/zero"], ["/dev/lab/zero", "/dev/lab/zero-new"], ["/dev/lab/zero"]]


def test_call_about(facts):
    """`call` of About gets the digest of the policy's one file, as the interface describes it."""
    found = facts["call_about"]
    assert found["code"] == 0, found["stderr"]
    said = documents(found["stdout"])[0]
    assert said["version"] == fdbroker.__version__
    path, data = b"/etc/fdbroker/policy.yaml", found["policy"].encode()
    assert said["digest"] == hashlib.sha256(b"%b\0%d\0%b" % (path, len(data), data)).hexdigest()


def test_call_reload(facts):
    """`call` of Reload as root loads a policy, or gets all that is wrong with it; a user is denied."""
    found = facts["call_reload"]
    assert "io.fdbroker.Admin.Denied" in found["user"]["stderr"] + found["user"]["stdout"]
    assert documents(found["root"]["stdout"]) == [{"applied": True, "findings": []}]
    (said,) = documents(found["broken"]["stdout"])
    assert said["applied"] is False
    (finding,) = said["findings"]
    assert (finding["file"], finding["line"]) == ("/etc/fdbroker/policy.yaml", 2)
    assert "evrybody" in finding["message"]


def test_call_while_the_policy_is_broken(facts):
    """Whatever is called, the one answer is understood as an error by its name."""
    found = facts["call_refused"]
    assert found["code"] != 0
    assert "io.fdbroker.Broker.PolicyBroken" in found["stderr"] + found["stdout"]
