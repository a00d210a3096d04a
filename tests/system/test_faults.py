"""The shipped units under load, while their processes die and hang, and while the journal is gone.

Out of memory, and what the disk, the policy and /dev do: tests/privileged/test_faults.py.

At any moment: it comes back by itself, nothing is granted that the journal does not have, nothing is lost that was said to be
stored, and no process, descriptor or mount is left over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

STEPS = ["healthy", "killed", "hanging", "journal_killed", "journal_gone", "journal_not_there"]
# what a client may meet, beside the broker being gone
REFUSED = {
    "killed": {"OpenFailed"},  # a namespace whose worker is gone
    "hanging": {"OpenFailed"},
    "journal_killed": {"RateLimited"},
    "journal_gone": {"RateLimited"},
    "journal_not_there": {"RateLimited"},
}


@pytest.fixture(scope="module")
def facts(nspawn: Callable[..., Any]) -> Any:
    return nspawn("faults.py", limit_s=300)


@pytest.mark.parametrize("step", STEPS)
def test_goes_on(facts, step):
    """Every client got what it asked for before and after, and went on after each error by itself."""
    found = facts[step]
    assert found["errors"] == {}
    assert min(*found["granted"].values(), *found["stored"].values()) > 3
    assert found["wrong"] == 0
    for kinds in found["found"].values():
        assert set(kinds) - {"BrokerUnavailable"} <= REFUSED.get(step, set())


@pytest.mark.parametrize("step", ["healthy", "killed", "hanging"])
def test_nothing_is_granted_unrecorded(facts, step):
    """The journal has at least as many grants of each user as its programs got descriptors."""
    found = facts[step]
    for uid, count in found["granted"].items():
        assert found["recorded"].get(uid, 0) - found["undone"].get(uid, 0) >= count


@pytest.mark.parametrize("step", STEPS)
def test_nothing_stored_is_lost(facts, step):
    """Each message whose sending succeeded has come to its recipient, and none again once that was confirmed."""
    found = facts[step]
    assert found["lost"] == {uid: [] for uid in found["stored"]}
    assert found["again"] == 0


@pytest.mark.parametrize("step", STEPS)
def test_nothing_is_left_over(facts, step):
    """Idle again, each process has the descriptors of a fresh one; there is no other process, and no mount more."""
    found = facts[step]
    assert found["descriptors"] == found["before"]
    assert found["left"] == []
    assert found["mounts"] == facts["started"]["mounts"]


def test_left_alone_while_it_is_only_loaded(facts):
    """The watchdog does not take load for a hang."""
    assert facts["healthy"]["same"]
    assert all(kinds == {} for kinds in facts["healthy"]["found"].values())


def test_devices_do_not_wait_for_a_worker_that_hangs(facts):
    """While the namespaces worker is stopped, devices are granted."""
    assert facts["hanging"]["devices_while_worker_hung"] > 10


def test_a_journal_that_is_killed_loses_at_most_what_it_was_reading(facts):
    """The service runs on; what it wrote waits in the socket, which systemd keeps."""
    found = facts["journal_killed"]
    assert found["same"]
    missing = sum(max(0, count - found["recorded"].get(uid, 0)) for uid, count in found["granted"].items())
    assert missing <= found["kills"]


def test_without_the_journal_nothing_is_granted(facts):
    """Until it is back: then the same processes find it. What waited in its closed socket is the journal's loss."""
    found = facts["journal_gone"]
    assert found["while_gone"] == 0
    assert found["after"] > 10
    assert found["same"]
    missing = sum(max(0, count - found["recorded"].get(uid, 0)) for uid, count in found["granted"].items())
    assert missing <= found["queue"]


def test_it_does_not_start_without_a_place_for_its_records(facts):
    """Standard error is /dev/null then; it waits for the journal, and serves when that is back."""
    found = facts["journal_not_there"]
    assert found["state"]["ActiveState"] == "activating"
    assert found["stderr"] == "/dev/null"
    assert found["while_gone"] == 0
    assert found["after"] > 10
    missing = sum(max(0, count - found["recorded"].get(uid, 0)) for uid, count in found["granted"].items())
    assert missing <= found["queue"]


def test_stopped(facts):
    """After all of that it stops in order."""
    assert facts["stopped"] == {
        "ActiveState": "inactive",
        "Result": "success",
        "left": "",
        "seconds": facts["stopped"]["seconds"],
    }
