"""Namespaces and sockets under a real systemd: the shipped units, and the drop-in that an admin puts beside them."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from fdbroker.limits import every as limits

MEMBER, OTHER = 4001, 4002
TYPES = ("net", "mnt", "pid", "user", "uts", "ipc", "cgroup", "time")
NEW_TYPES = ("net", "mnt", "uts", "ipc", "cgroup", "time")
# linux/capability.h
DAC_READ_SEARCH, NET_BIND_SERVICE, NET_ADMIN, SYS_CHROOT, SYS_PTRACE, SYS_ADMIN = (
    1 << number for number in (2, 10, 12, 18, 19, 21)
)
WORKER = DAC_READ_SEARCH | NET_BIND_SERVICE | NET_ADMIN | SYS_CHROOT | SYS_PTRACE | SYS_ADMIN
NOT_THE_WORKER = {"launcher", "holder", "opener", "keeper", "inbox", "witness"}


@pytest.fixture(scope="module")
def facts(nspawn: Callable[..., Any]) -> Any:
    return nspawn("namespaces.py")


def served(asked: dict[str, Any]) -> bool:
    return asked.get("read") == "00" * 8


def test_no_such_rules_no_worker(facts):
    """With a policy that has no rule for namespaces nothing is started for them, with the drop-in or without."""
    for step in ("without_drop_in", "without_rules"):
        found = facts[step]
        assert found["started"] == 0
        assert set(found["plain"]) == {"launcher", "opener", "keeper", "inbox", "witness"}
        assert served(found["asked"])


def test_rules_without_drop_in(facts):
    """Without the drop-in such a policy is refused: the journal says what is missing, and which file gives it."""
    found = facts["without_drop_in"]
    assert found["code"] != 0
    assert (found["ActiveState"], found["Result"], found["ExecMainStatus"]) == ("failed", "exit-code", "78")
    assert found["NRestarts"] == "0"
    (said,) = set(found["said"])
    assert {"CAP_SYS_ADMIN", "CAP_NET_ADMIN"} <= set(re.findall(r"CAP_\w+", said))
    assert "namespaces.conf" in said
    assert found["client"] == 75


def test_drop_in(facts):
    """The commands in the drop-in's own comment are all that it needs, also while clients are refused."""
    refusing = facts["without_drop_in"]["refusing"]
    assert refusing["ActiveState"] == "activating"
    assert "nobody is served" in refusing["StatusText"]
    found = facts["drop_in"]
    assert len(found["commands"]) == 2
    assert [done["code"] for done in found["done"]] == [0, 0], found["done"]
    assert found["file"] == [0, "0o644", True]
    assert found["DropInPaths"] == "/etc/systemd/system/fdbroker.service.d/namespaces.conf"
    assert found["ActiveState"] == "active"
    assert found["StatusText"].startswith("Serving")
    assert "inode" in found["asked"]


def test_security(facts):
    """By systemd's own measure: the unit alone as before, at most 2.3; with the drop-in not much more than twice that."""
    assert facts["without_drop_in"]["exposure"] <= 2.3
    assert facts["begun"]["exposure"] <= 5.0


def test_named(facts):
    """A namespace that `ip netns add` made after the service has started, and with it the folder, is found."""
    found = facts["named"]
    assert facts["begun"]["folder"] is False
    assert found["before"]["refused"] == "NoSuchResource"
    assert found["asked"]["inode"] == found["inode"] != found["own"]


def test_named_is_listed(facts):
    """A list that is watched is told of it, and of the sockets inside it, though the folder came later as well."""
    before, after = facts["named"]["listed"]
    assert not [name for name in before if "vpn-a" in name]
    new = set(after) - set(before)
    assert {"net:vpn-a", "socket:net:vpn-a"} <= new
    assert all("vpn-a" in name for name in new)


def test_named_is_of_no_use(facts):
    """A plain program is told that it cannot enter it, and why; the kernel says the same."""
    found = facts["named"]
    assert found["asked"]["usable"] is False
    assert "CAP_SYS_ADMIN" in found["asked"]["why"]
    assert found["enters"] == [False, "EPERM"]


def test_named_denied(facts):
    """What no rule names is denied, and so is who no rule names."""
    found = facts["named"]
    assert found["no_rule"]["refused"] == found["other"]["refused"] == "Denied"


@pytest.mark.parametrize("kind", TYPES)
def test_of_caller(facts, kind):
    """The namespace of a process of the caller's, one that it made itself too, is that very namespace."""
    found = facts["of_caller"]
    for name in ("plain", "child"):
        given, actual, answer = found[name][kind]
        assert given == actual, answer
    assert found["plain"][kind][0] == found["ours"][kind]
    assert found["child"][kind][0] != found["ours"][kind]


def test_of_caller_entered(facts):
    """With the user namespace of its own process a plain program enters that process's network by nsenter."""
    entered, wanted, stderr = facts["of_caller"]["entered"]
    assert entered == wanted, stderr
    assert facts["of_caller"]["child"]["user"][2]["usable"] is True
    assert facts["of_caller"]["child"]["net"][2]["usable"] is False  # without the other one first


@pytest.mark.parametrize("kind", TYPES)
def test_not_the_callers(facts, kind):
    """Another user's process, root's, process 1, the opener, a zombie, and none: the answers are all the same."""
    found = facts["not_the_callers"]
    assert found["state"].startswith("Z")
    resource = {"namespace": {"type": kind, "pid": "…"}, "access": "ro"}
    denied = {"error": "io.fdbroker.Broker.Denied", "parameters": {"resource": resource}}
    for whose in ("other", "root", "init", "opener", "zombie", "gone"):
        assert found[whose][kind] == denied, whose


def test_not_the_callers_record(facts):
    """The admin, unlike the client, is told why."""
    assert facts["not_the_callers"]["reasons"] == ["it does not belong to the caller's uid alone"]


@pytest.mark.parametrize("kind", NEW_TYPES)
def test_created(facts, kind):
    """A new namespace belongs to the caller's user namespace; it is said to be usable, and nsenter enters it."""
    found = facts["created"]["made"][kind]
    assert (found["usable"], found["why"]) == (True, "")
    assert found["mine"]
    assert found["entered"][:1] == [found["is"]], found["stderr"]
    assert found["is"] != found["own"]


def test_created_net(facts):
    """In a new network namespace there is `lo`, up, and nothing else."""
    (lo,) = json.loads(facts["created"]["made"]["net"]["entered"][1])
    assert lo["ifname"] == "lo"
    assert {"UP", "LOWER_UP"} <= set(lo["flags"])


@pytest.mark.parametrize("kind", NEW_TYPES)
def test_created_without_user_namespace(facts, kind):
    """To a program that has no user namespace of its own it is said that it cannot use it."""
    found = facts["created"]["plain"][kind]
    assert found["usable"] is False
    assert "CAP_SYS_ADMIN" in found["why"]


def test_created_mnt(facts):
    """A new mount namespace shows what the caller sees, its own mounts too, and nothing of the service's sandbox."""
    found = facts["copied_mounts"]
    assert found["seen_by_service"] == [False, False]  # its own /tmp, and no /home
    assert found["inside"] == found["outside"]
    assert any(mount[1] == "/mnt" for mount in found["inside"])
    assert found["read"]["code"] == 0, found["read"]
    assert found["read"]["stdout"].splitlines() == ["the caller's", "the caller's", *found["home"]]


def test_created_mnt_is_a_copy(facts):
    """What is mounted inside is not seen outside."""
    assert facts["copied_mounts"]["mine"] == ["file"]


def test_linked(facts):
    """A server that a user without rights runs in a new, connected namespace exchanges data with the machine."""
    found = facts["linked"]
    assert found["code"] == 0
    assert re.fullmatch(r"10\.88\.0\.\d+", found["address"])
    assert set(found["interfaces"]) == {"lo", "eth0"}
    assert found["same"]


def test_linked_port(facts):
    """On the bridge stands whose it is, and it is kept from the other namespaces and from the spanning tree."""
    (port,) = facts["linked"]["ports"]
    assert port["ifalias"] == f"fdbroker uid others {facts['linked']['address']}"
    assert port["linkinfo"]["info_slave_data"]["isolated"] is True
    assert port["linkinfo"]["info_slave_data"]["guard"] is True


def test_linked_goes(facts):
    """Its end on the bridge goes with the namespace."""
    assert facts["linked"]["left"] == ["lo", "br0"]


@pytest.mark.parametrize("resource", ["stream", "dgram", "stream,inet6", "dgram,inet6"])
def test_socket(facts, resource):
    """A program without rights exchanges data with a network that its own cannot reach: no filter is in the way."""
    found = facts["sockets"]["connect"][resource]
    assert int(found["rights"], 16) == 0
    assert found["own"] == "ENETUNREACH"
    assert found["same"]
    assert found["name"] in {"10.99.0.1", "fd99::1"}  # the namespace's own address


@pytest.mark.parametrize("resource", ["stream", "stream,inet6"])
def test_socket_bound(facts, resource):
    """On port 443 it serves who comes from that network."""
    found = facts["sockets"]["serve"][resource]
    assert found["name"] == 443
    assert found["peer"] in {"10.99.0.2", "fd99::2"}
    assert found["same"]


def test_socket_denied(facts):
    """Another port, or another namespace, is denied."""
    assert {one["refused"] for one in facts["sockets"]["refused"].values()} == {"Denied"}


@pytest.mark.parametrize(
    ("resource", "access", "rule"),
    [
        ("net:vpn-a", "ro", "{type: net, name:"),
        ("mnt:new", "ro", "create: true}"),
        ("socket:net:vpn-x,bind=443", "rw", "{namespace:"),
    ],
)
def test_journal(facts, resource, access, rule):
    """The journal has each grant with who, what, and the line of the rule."""
    found = facts["journal"]
    record = found["granted"][resource][0]
    assert record["FDBROKER_RESOURCE"] == resource
    assert record["FDBROKER_ACCESS"] == access
    assert record["FDBROKER_UID"] == str(MEMBER)
    file, line = record["FDBROKER_RULE"].split(":")
    assert file == "/etc/fdbroker/policy.yaml"
    assert rule in found["rules"][int(line) - 1]
    assert record["_PID"] == str(found["opener"])  # the journal's own word on who wrote it


def test_journal_namespace(facts):
    """It says which namespace left; of a socket there is nothing more to say than its name."""
    granted = facts["journal"]["granted"]
    assert granted["net:vpn-a"][0]["FDBROKER_NAMESPACE"] == f"net:[{facts['named']['inode']}]"
    assert granted["mnt:new"][0]["FDBROKER_NAMESPACE"] == facts["created"]["made"]["mnt"]["is"]
    assert "FDBROKER_NAMESPACE" not in granted["socket:net:vpn-x,bind=443"][0]


def test_own_user(facts):
    """Keeper and worker run as users of their own, all four ids, in no other group."""
    found = facts["confinement"]
    assert len({found["uids"][name] for name in ("opener", "keeper", "inbox", "worker")}) == 4
    for name, uid in found["uids"].items():
        status = found["processes"][name]
        assert status["Uid"].split() == status["Gid"].split() == [str(uid)] * 4
        assert status["Groups"].split() == []


@pytest.mark.parametrize("name", ["launcher", "holder", "opener", "keeper", "inbox", "worker"])
def test_confined(facts, name):
    """No process has a capability in force or can gain one, and all have a system call filter."""
    status = facts["confinement"]["processes"][name]
    for field in ("CapEff", "CapInh", "CapBnd", "CapAmb"):
        assert int(status[field], 16) == 0, field
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"


def test_filter(facts):
    """Each process has as many filters: those of the unit, and one of its own."""
    found = facts["confinement"]["processes"]
    counts = {name: int(one["Seccomp_filters"]) for name, one in found.items()}
    assert len(set(counts.values())) == 1, counts


def test_capabilities(facts):
    """The worker can raise what the rules need, the others no more than with a policy without such rules."""
    permitted = {name: int(one["CapPrm"], 16) for name, one in facts["confinement"]["processes"].items()}
    before = {name: int(one["CapPrm"], 16) for name, one in facts["without_drop_in"]["plain"].items()}
    assert permitted == {**before, "holder": WORKER, "worker": WORKER}
    assert before["launcher"] == before["keeper"] == before["inbox"] == 0


def test_nothing_is_missing(facts):
    """No process says that it is without Landlock, or fails."""
    assert "Landlock" not in facts["confinement"]["said"]
    assert "Traceback" not in facts["confinement"]["said"]


def test_killed_worker(facts):
    """When the worker is killed it is started again, and serves; no other process ends, and systemd does nothing."""
    found = facts["killed_worker"]
    assert len(found["said"]) == len(found["answers"]) == 3
    assert {answer.get("inode") for answer in found["answers"]} == {facts["named"]["inode"]}
    assert set(found["same"]) == NOT_THE_WORKER
    assert (found["NRestarts"], found["ActiveState"]) == ("0", "active")


def test_killed_worker_at_once(facts):
    """Who asks at the very moment is answered at once: by the next one, or told to try again."""
    for answer, took_s in facts["killed_worker"]["moments"]:
        assert "inode" in answer or answer == {"refused": "OpenFailed", "number": errno.ECONNRESET}
        assert took_s < 8  # far from the ten seconds after which a worker is given up


def test_stopped_worker(facts):
    """When the worker hangs, its request fails in time, and a new one serves; no other process ends."""
    found = facts["stopped_worker"]
    assert found["answer"]["error"] == "io.fdbroker.Broker.OpenFailed"
    assert found["answer"]["parameters"]["errno"] == errno.ETIMEDOUT
    assert found["after_s"] < 20
    assert found["again_s"] < 30
    assert found["asked"]["inode"] == facts["named"]["inode"]
    assert len(found["said"]) == 1
    assert set(found["same"]) == NOT_THE_WORKER
    assert (found["NRestarts"], found["ActiveState"]) == ("0", "active")


def test_stopped_worker_devices(facts):
    """Meanwhile device requests, of the same user too, do not wait for it."""
    device = facts["stopped_worker"]["device"]
    assert not any(refused for refused, _ in device)
    assert max(took_s for _, took_s in device) < 8


def test_nothing_left(facts):
    """After all that each process has as many descriptors as at the start, and the worker has no child."""
    found = facts["left"]
    assert found["after"] == found["before"]
    assert found["children"] == []
    assert set(found["same"]) == NOT_THE_WORKER


def test_killed_holder(facts):
    """When the process that holds the worker's place is killed, all end, and systemd starts a service that serves."""
    found = facts["killed_holder"]
    assert found["NRestarts"] == "1"
    assert found["left"] == []
    assert found["after_s"] < limits.START_SECONDS
    assert found["asked"]["inode"] == facts["named"]["inode"]
    assert served(found["zero"])


@pytest.mark.parametrize("step", ["stopped", "stopped_when_stuck"])
def test_stop(facts, step):
    """It stops within 5 seconds and says that all went well, also when the worker hangs."""
    found = facts[step]
    assert found["took_s"] < 2 * limits.STOP_SECONDS  # systemd and this machine have the rest
    assert (found["ActiveState"], found["Result"], found["ExecMainStatus"]) == ("inactive", "success", "0")
    assert found["left"] == []


def test_stop_answers(facts):
    """Who waits for a worker that hangs when the service stops is told that it failed; no process fails."""
    found = facts["stopped_when_stuck"]
    assert found["answer"]["parameters"]["errno"] == errno.ETIMEDOUT
    assert "Traceback" not in found["said"]
