"""The shipped units under a real systemd, as an admin gets them from scripts/install."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import pytest

from fdbroker.limits import every as limits

DAC_OVERRIDE = 1 << 1  # linux/capability.h
MEMBER, GROUP = 4001, 4000


@pytest.fixture(scope="module")
def facts(nspawn: Callable[..., Any]) -> Any:
    return nspawn("service.py")


def served(asked: dict[str, Any]) -> bool:
    return asked.get("read") == "00" * 8


def test_install(facts):
    """Users and folders are made by sysusers and tmpfiles, the policy is valid, and installing again does no harm."""
    found = facts["installed"]
    assert found["again"] == 0
    assert set(found["users"]) == {f"fdbroker-{name}" for name in ("opener", "keeper", "inbox", "namespaces")}
    assert all(shell.endswith("nologin") for shell in found["users"].values())
    assert all(folder == [0, "0o755"] for folder in found["folders"].values())
    assert found["policy"]["code"] == 0


def test_activation(facts):
    """Nothing runs before the first client connects; that one, and its first message, is served."""
    found = facts["activation"]
    assert found["enabled"]["code"] == 0, found["enabled"]["stderr"]
    assert found["socket"] == [0, "fdbroker", "0o140660"]
    assert found["before"] == {"ActiveState": "inactive", "MainPID": "0"}
    assert found["ping"]["code"] == 0, found["ping"]["stderr"]
    assert found["after"]["ActiveState"] == "active"


def test_ready(facts):
    """The unit is one that says by itself when it serves."""
    found = facts["activation"]["after"]
    assert found["Type"] == "notify"
    assert found["StatusText"].startswith("Serving with /etc/fdbroker/policy.yaml")


def test_first_answer(facts):
    """From a connection to a service that does not run comes an answer, in the time that the slowest machine has."""
    assert facts["activation"]["first_answer_s"] < limits.START_SECONDS


def test_granted(facts):
    """A user without rights reads and writes a node that only root may open."""
    found = facts["granted"]["zero"]
    assert found["itself"] == "EACCES"
    assert found["granted"][:2] == ["1:5", "rw"]
    assert re.fullmatch(r"/etc/fdbroker/policy\.yaml:\d+", found["granted"][2])
    assert found["read"] == "00" * 8
    assert found["written"] == 8
    assert found["inherited"] is False


def test_granted_read_only(facts):
    """A descriptor for ro cannot write."""
    found = facts["granted"]["read_only"]
    assert found["flags"] == os.O_RDONLY
    assert found["read"] == "00" * 8
    assert found["written"] == "EBADF"


def test_granted_ioctl(facts):
    """The opener's confinement does not travel with the descriptor: its holder may ioctl."""
    assert facts["granted"]["tun"]["features"] != 0


def test_granted_command(facts):
    """`fdbroker open … -- COMMAND` gives the command its descriptor."""
    assert facts["granted"]["command"]["stdout"].split() == ["00"] * 4


@pytest.mark.parametrize("who", ["other_user", "root", "no_rule", "more_access"])
def test_denied(facts, who):
    """Who or what no rule names is denied, root too."""
    assert facts["denied"][who]["refused"] == "Denied"


def test_denied_tells_nothing(facts):
    """The answer for a path that no rule names is the same whether it exists or not."""
    found = facts["denied"]
    assert found["no_rule"]["refused"] == found["no_rule_and_absent"]["refused"] == "Denied"


def test_denied_device(facts):
    """A node whose name fits and which is another device is refused."""
    assert facts["denied"]["other_device"]["refused"] == "NotWhatItWas"


def test_denied_connection(facts):
    """Who is not in the socket's group cannot even connect."""
    assert facts["denied"]["no_member"]["refused"] == "BrokerUnavailable"


def test_denied_command(facts):
    """`fdbroker open` exits with 77 and says how to find out why."""
    found = facts["denied"]["command"]
    assert found["code"] == 77
    assert "fdbroker policy explain" in found["stderr"]


def test_journal_allow(facts):
    """The journal has a grant with who, what, and by which rule."""
    found = facts["journal"]
    record = found["allow"][0]
    assert record["FDBROKER_UID"] == str(MEMBER)
    assert record["FDBROKER_ACCESS"] == "rw"
    assert record["FDBROKER_RDEV"] == "1:5"
    assert re.fullmatch(r"/etc/fdbroker/policy\.yaml:\d+", record["FDBROKER_RULE"])
    assert record["SYSLOG_IDENTIFIER"] == "fdbroker"
    assert record["_PID"] == str(found["opener"])  # the journal's own word on who wrote it


def test_journal_deny(facts):
    """The journal has a refusal with who, what, and at which stage; it has another kind of message."""
    found = facts["journal"]
    record = found["deny"][0]
    assert record["FDBROKER_UID"] == str(MEMBER)
    assert record["FDBROKER_STAGE"] == "authorize"
    assert record["MESSAGE_ID"] != found["allow"][0]["MESSAGE_ID"]


def test_own_users(facts):
    """Opener, keeper and inbox run as their own users, all four ids, and the keeper in no group."""
    found = facts["confinement"]
    assert len(set(found["uids"].values())) == 3
    for name, uid in found["uids"].items():
        assert found["processes"][name]["Uid"].split() == [str(uid)] * 4
    assert found["processes"]["keeper"]["Groups"].split() == []


@pytest.mark.parametrize("name", ["launcher", "opener", "keeper", "inbox", "witness"])
def test_confined(facts, name):
    """No process has a capability in force or can gain one, and all have a system call filter."""
    status = facts["confinement"]["processes"][name]
    for field in ("CapEff", "CapInh", "CapBnd", "CapAmb"):
        assert int(status[field], 16) == 0, field
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"


@pytest.mark.parametrize("name", ["opener", "keeper", "inbox", "witness"])
def test_started_isolated(facts, name):
    """Each child has the standard library, one folder behind it, and nothing that `site` would run or add."""
    *words, code = facts["confinement"]["started"][name]
    assert words == ["/opt/fdbroker/bin/python3", "-I", "-S", "-B", "-c"]
    folder = r"'/opt/fdbroker/lib/python3\.\d+/site-packages'"
    assert re.match(rf"import sys; sys\.path \+= \[{folder}\]; from fdbroker\.{name}\.__main__ import main; ", code)


def test_nothing_is_run_by_site(facts):
    """The unit's program starts so, too: what was planted for `site` is run by that interpreter without -S alone."""
    found = facts["confinement"]
    assert found["started"]["launcher"][:4] == ["/opt/fdbroker/bin/python3", "-IS", "/usr/bin/fdbroker", "serve"]
    assert "planted: " in found["site"]
    assert "planted: " not in found["said"]


def test_landlocked(facts):
    """The unit does not keep the processes from confining themselves: none says that it is without Landlock."""
    assert "Landlock" not in facts["confinement"]["said"]


def test_capabilities(facts):
    """The opener can raise the one that the policy needs, the witness CAP_SYS_PTRACE, and nobody any other."""
    permitted = {name: int(one["CapPrm"], 16) for name, one in facts["confinement"]["processes"].items()}
    assert permitted == {"launcher": 0, "opener": DAC_OVERRIDE, "keeper": 0, "inbox": 0, "witness": 1 << 19}


def test_no_capability_but_a_group(facts):
    """For a node that a group may open, the opener has that group and no capability."""
    found = facts["group_policy"]
    assert found["started"] == 0
    assert int(found["opener"]["CapPrm"], 16) == 0
    assert found["opener"]["Groups"].split() == ["4100"]
    assert served(found["asked"])


def test_list_more(facts):
    """`fdbroker list --more` shows a node that comes, and no more when it has gone."""
    found = facts["listing"]
    assert "/dev/lab/zero" in found["first"]
    assert set(found["made"]) - set(found["first"]) == {"/dev/lab/zero-new"}
    assert found["removed"] == found["first"]


def test_reload(facts):
    """After `systemctl reload` a new rule holds, in the same processes."""
    found = facts["reload"]
    assert found["before"]["refused"] == "Denied"
    assert found["code"] == 0
    assert served(found["after"])
    assert found["same"]


def test_reload_broken(facts):
    """A policy with an error is not used: the journal says file, line and column, the old one stays in force."""
    found = facts["reload_broken"]
    assert (found["code"], found["back"]["code"]) == (1, 0)  # systemd's for 78; the findings are in the unit's journal
    assert "NOT reloaded" in found["said"]
    assert "/etc/fdbroker/policy.yaml:5:" in found["said"]
    assert found["state"]["ActiveState"] == "active"
    assert served(found["after"])


def test_reload_takes_away(facts):
    """After a reload a rule that is gone holds no more."""
    assert facts["reload_broken"]["old"]["refused"] == "Denied"


def test_reload_beyond(facts):
    """A reload that needs a capability which the opener gave up is refused, and says so; the old policy stays."""
    found = facts["reload_beyond"]
    assert found["code"] == 1
    assert "CAP_DAC_OVERRIDE" in found["said"]
    assert "restart" in found["said"]
    assert served(found["asked"])


@pytest.mark.parametrize("name", ["launcher", "opener", "keeper", "inbox", "witness"])
def test_killed(facts, name):
    """When one process is killed the others end too, and systemd starts a service that serves."""
    found = facts["killed"][name]
    assert found["left"] == []
    assert found["after_s"] < limits.START_SECONDS
    assert served(found["asked"])


def test_watchdog(facts):
    """A process that hangs is noticed: systemd starts the service again; a healthy one is left alone."""
    found = facts["watchdog"]
    assert found["healthy"]
    assert found["after_s"] < 8
    assert not found["left"]
    assert served(found["asked"])


def test_stop(facts):
    """It stops within 5 seconds and says that all went well; clients find their connections closed."""
    found = facts["stop"]
    assert found["took_s"] < 2 * limits.STOP_SECONDS  # systemd and this machine have the rest
    assert found["ActiveState"] == "inactive"
    assert found["Result"] == "success"
    assert found["ExecMainStatus"] == "0"
    assert found["left"] == []
    assert found["idle"] == ""
    assert found["watcher"] == 69
    assert found["socket"] is True  # it is systemd's


def test_invalid_policy(facts):
    """With an invalid policy it does not start, says why, and is not tried again.

    Clients that start it are told, however many come; none is served before the policy is mended, and the next one is.
    """
    found = facts["invalid_policy"]
    assert found["code"] != 0
    assert found["Result"] == "exit-code"
    assert found["ExecMainStatus"] == "78"
    assert found["NRestarts"] == "0"
    assert "/etc/fdbroker/policy.yaml:2:1:" in found["said"][0]
    assert {client["code"] for client in found["clients"]} == {75}
    assert all("the broker's policy has an error" in client["stderr"] for client in found["clients"])
    assert found["running"] == ["refuser"]
    assert served(found["after"])
    assert found["same"]
    assert found["socket"] == "active"


def test_security(facts):
    """By systemd's own measure, from 0 to 10, the unit's exposure is at most 2.3: CAP_SYS_PTRACE is 0.3 of it."""
    assert facts["security"]["exposure"] <= 2.3


def test_gone(facts):
    """A node that is gone is said to be; with the units stopped there is no socket and no broker."""
    found = facts["gone"]
    assert found["absent"]["refused"] == "NoSuchResource"
    assert found["socket"] is False
    assert found["ping"] == 69
