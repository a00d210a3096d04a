"""A policy that is broken, and a service that fails, with clients waiting: under the shipped units.

tests/attacks/test_t58_broken_policy.py has the same without systemd; scripts/clean a shorter one for the systemd of two
releases of Debian.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from fdbroker.limits import every as limits


@pytest.fixture(scope="module")
def facts(nspawn: Callable[..., Any]) -> Any:
    return nspawn("broken.py", limit_s=300)


def is_broken(text: str) -> bool:
    """Whether that is one refusal, and no more."""
    return bool(text.endswith("\0")) and json.loads(text[:-1])["error"] == "io.fdbroker.Broker.PolicyBroken"


def served(asked: dict[str, Any]) -> bool:
    return asked.get("read") == "00" * 8


def test_who_waits_is_told_and_let_go(facts):
    """Whatever a client has sent before the service ran, it hears PolicyBroken, and its connection ends."""
    found = facts["waiting"]
    assert found["enabled"] == 0
    assert (found["before"]["ActiveState"], found["before"]["socket"]) == ("inactive", "active")
    assert len(found["heard"]) == 4
    assert [one["text"] for one in found["heard"] if not is_broken(one["text"])] == []
    assert found["heard"][0]["end"] == "nothing more"  # one that has sent nothing
    assert found["after"]["socket"] == "active"
    assert "nobody is served" in found["after"]["StatusText"]


def test_a_minute_of_clients_does_not_end_the_socket(facts):
    """One process refuses all of them, each soon; systemd starts nothing meanwhile, and the journal is not filled."""
    found = facts["minute"]
    heard = found["heard"]
    unread = heard.pop("")
    assert [text for text in heard if not is_broken(text)] == []
    assert min(unread, *heard.values()) > 20
    assert found["longest_s"] < 30
    assert found["before"]["MainPID"] == found["after"]["MainPID"] != "0"
    assert found["after"]["socket"] == "active"
    assert found["lines"] < 20


def test_it_ends_with_78_after_the_last_client(facts):
    """BROKEN_SECONDS later, saying what is to be mended; the socket stays."""
    found = facts["ends"]
    assert found["last"]["code"] == 75
    assert limits.BROKEN_SECONDS - 1 <= found["after_s"] < limits.BROKEN_SECONDS + 30
    after = found["after"]
    assert (after["Result"], after["ExecMainCode"], after["ExecMainStatus"]) == ("exit-code", "1", "78")
    assert (after["MainPID"], after["NRestarts"]) == ("0", "0")
    assert after["socket"] == "active"
    assert sum("unknown key 'evrybody'" in line for line in found["said"]) == 2  # when it starts, and when it ends


def test_the_next_client_starts_it_and_once_mended_the_next_is_served(facts):
    found = facts["again"]
    assert found["refused"]["code"] == 75
    assert found["before"]["MainPID"] not in ("0", facts["minute"]["after"]["MainPID"])
    assert served(found["asked"]), found["asked"]
    assert found["after"]["MainPID"] == found["before"]["MainPID"]  # nobody has restarted it
    assert (found["after"]["ActiveState"], found["after"]["socket"]) == ("active", "active")


def test_mended_after_its_end_the_next_client_is_served(facts):
    found = facts["mended_between"]
    assert found["refused"]["code"] == 75
    assert (found["before"]["ExecMainStatus"], found["before"]["socket"]) == ("78", "active")
    assert served(found["asked"]), found["asked"]
    assert found["after"]["ActiveState"] == "active"


def test_no_number_of_failures_ends_the_socket(facts):
    """Each ends with 1, by a traceback; twenty ended it once."""
    found = facts["failing"]
    assert found["before"]["ActiveState"] == "inactive"
    after = found["after"]
    assert int(after["NRestarts"]) >= found["tracebacks"] - 1 > 20
    assert after["socket"] == "active"


def test_no_rate_of_starts_ends_the_socket(facts):
    """A hundred that end with 78 at once, as fast as systemd can."""
    found = facts["ending_at_once"]
    assert found["starts"] >= 100
    assert found["after"]["NRestarts"] == "0"  # the client that waits makes all of them
    assert found["after"]["socket"] == "active"


@pytest.mark.parametrize("step", ["failing", "ending_at_once"])
def test_once_the_fault_is_mended_those_who_wait_are_served(facts, step):
    """The fault alone is mended, and the units are neither restarted nor reset."""
    found = facts[step]
    assert found["answered"] == 0  # they have waited
    assert set(found["replies"]) == {b"\0\0\0\4PONG".hex()}
    assert served(found["asked"]), found["asked"]
    assert (found["then"]["ActiveState"], found["then"]["socket"]) == ("active", "active")
