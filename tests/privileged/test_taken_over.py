"""What a taken-over process can do: every attempt of tests/attempts.py, from behind the confinement of each process.

What came of it stands in docs/confinement-tried.json, from where SECURITY.md has its table. A run that differs from it fails.
After a change that is meant, FDBROKER_RECORD=1 writes it anew, for a reviewer to read the difference.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attempts
import harness
import pytest
import takeover
from harness import CAROL, LIBC, MEM, node, running, status_of

from fdbroker.kernel import landlock

RECORD = Path(__file__).parents[2] / "docs/confinement-tried.json"
# the processes in the record, and in the document
COLUMNS = {
    "opener": "opener",
    "keeper": "keeper",
    "inbox": "inbox",
    "inbox-store": "inbox that stores",
    "worker": "namespaces",
    "witness": "witness",
    "refuser": "refuser",
    "launcher": "launcher",
}
POLICY = """
version: 1
topics: {mail: {deliver: [queue]}, note: {deliver: [subscribers]}}
everyone:
  devices: [{path: /dev/lab/allowed, access: rw}]
  namespaces: [{type: [net, mnt, uts], create: true}]
  sockets: [{namespace: "*", bind: [80]}]
  send: [mail, note]
"""
WITHOUT_STORE = POLICY.replace("queue", "subscribers")


def _victim() -> int:
    """A process that has nothing to do with the broker, in namespaces of its own."""
    process = os.fork()
    if process == 0:
        os.setresgid(CAROL, CAROL, CAROL)
        os.setresuid(CAROL, CAROL, CAROL)
        LIBC.unshare(attempts.CLONE["user"] | attempts.CLONE["net"] | attempts.CLONE["mount"])
        signal.pause()
        os._exit(0)
    end = time.monotonic() + 10
    while os.readlink(f"/proc/{process}/ns/net") == os.readlink("/proc/self/ns/net"):
        assert time.monotonic() < end
        time.sleep(0.01)
    return process


def _run(policy: str, wanted: dict[str, list[str]], owned: contextlib.ExitStack) -> dict[str, Any]:
    """Start a broker and try everything in the processes `wanted`, each in these modes."""
    place = Path(owned.enter_context(harness.folder()))
    place.chmod(0o755)
    store = "inbox-store" in wanted
    with running(policy, "--state", str(place / "state"), program=takeover.program(str(place), store)) as broker:
        pids = {name: broker.pids[name] for name in ("launcher", "opener", "keeper", "worker", "witness")}
        pids["inbox-store" if store else "inbox"] = broker.pids["inbox"]
        pids["holder"] = broker.pids["namespaces"]
        return _try_in(place, broker, pids, wanted, owned)


def _run_broken(wanted: dict[str, list[str]], owned: contextlib.ExitStack) -> dict[str, Any]:
    """The same while the policy is broken; clients come, so that the refuser lives as long as it takes."""
    place = Path(owned.enter_context(harness.folder()))
    then = takeover.code(str(place), store=False)
    with harness.refusing(place, then) as (broker, refuser):
        pids = {"launcher": broker.process.pid, "refuser": refuser}
        return _try_in(place, broker, pids, wanted, owned, lambda: harness.ask(broker.socket, "/dev/null"))


def _try_in(
    place: Path,
    broker: harness.Broker,
    pids: dict[str, int],
    wanted: dict[str, list[str]],
    owned: contextlib.ExitStack,
    meanwhile: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    victim = _victim()
    try:
        pids["victim"] = victim
        same = {**pids, **({"child": pids["worker"]} if "worker" in pids else {})}
        bits = {role: int(status_of(pid)["CapPrm"], 16) for role, pid in same.items()}
        uids = {role: int(status_of(pid)["Uid"].split()[0]) for role, pid in same.items()}
        plan = {
            "pids": pids,
            "same": same,
            "uids": uids,
            "capabilities": {role: [n for n in range(64) if bits[role] >> n & 1] for role in same},
            "modes": {role: wanted.get(role, []) for role in same},
            "folders": {role: str(place / f"of-{role}") for role in same},
            "state": str(place / "state"),
        }
        (place / "state").mkdir(exist_ok=True)  # where nothing is stored there is none
        os.chown(place / "state", next((uids[role] for role in ("inbox", "inbox-store") if role in uids), 0), -1)
        for role in same:
            takeover.furnish(place / f"of-{role}", uids[role], owned)
        (place / "plan.new").write_text(json.dumps(plan))
        (place / "plan.new").rename(place / "plan")
        end = time.monotonic() + 300
        while missing := [role for role in wanted if not (place / f"{role}.json").exists()]:
            assert not (place / "failed").exists(), (place / "failed").read_text()
            assert time.monotonic() < end, f"{missing}: {broker.text()}"
            meanwhile()
            time.sleep(0.05)
    finally:
        (place / "end").touch()
        os.kill(victim, signal.SIGKILL)
        os.waitpid(victim, 0)
    return {role: json.loads((place / f"{role}.json").read_text()) for role in wanted}


@pytest.fixture(scope="module")
def tried() -> Iterator[dict[str, Any]]:
    """Process -> attempt -> mode -> what came of it."""
    harness.need_root()
    if os.uname().machine != "x86_64":
        harness.cannot("the numbers of the system calls are x86_64's")
    with contextlib.ExitStack() as owned:
        owned.enter_context(harness.private_dev())
        os.mkdir("/dev/pts")
        harness.mount("devpts", "/dev/pts", "devpts", 0, "ptmxmode=0666")
        owned.callback(harness.unmount, "/dev/pts")
        os.symlink("pts/ptmx", "/dev/ptmx")
        owned.enter_context(harness.own_network())
        node("/dev/lab/allowed", MEM["zero"])
        node("/dev/other", MEM["zero"], 0o666)
        abstract = owned.enter_context(socket.socket(socket.AF_UNIX))
        abstract.bind("\0fdbroker-tried")
        abstract.listen(4096)
        landlocked = ["whole", "no filter", "no landlock"]
        wanted = {"opener": [*landlocked, "free"], "keeper": landlocked, "inbox-store": landlocked}
        wanted |= {role: ["whole", "no filter"] for role in ("holder", "worker", "child", "witness")}
        wanted["launcher"] = landlocked
        found = _run(POLICY, wanted, owned)
        found |= _run(WITHOUT_STORE, {"inbox": landlocked}, owned)
        found |= _run_broken({"refuser": landlocked}, owned)
        yield found


# ---- what came of it


def _environment() -> dict[str, Any]:
    return {"linux": ".".join(os.uname().release.split(".")[:2]), "landlock": landlock.abi()}


def _refusals(outcomes: dict[str, str]) -> list[str]:
    """What refuses, each by itself: "killed" or "filter", then what stands behind it; nothing when it is possible."""
    whole = outcomes.get("whole", outcomes["no filter"])
    without, bare = outcomes["no filter"], outcomes.get("no landlock", outcomes["no filter"])
    found = []
    if whole != without:  # it may be the C library that says so: ENOSYS of clone3, no thread
        found.append("killed" if whole == "SIGSYS" else "filter")
    if bare != "ok":
        found.append("rights")
    elif without != "ok":
        found.append("Landlock")
    return found


def _table(tried: dict[str, Any]) -> dict[str, dict[str, list[str]]]:
    """Attempt -> process -> refusals. Of what root cannot do here either, only the filter's refusal is known."""
    table: dict[str, dict[str, list[str]]] = {}
    for name in attempts.ATTEMPTS:
        table[name] = {role: _refusals(found[name]) for role, found in tried.items()}
        if tried["opener"][name]["free"] in LACKING:
            known = {role: [one for one in found if one != "rights"] for role, found in table[name].items()}
            table[name] = {role: found or ["untried"] for role, found in known.items()}
    return table


# what the kernel of the run may not have at all
LACKING = ("ENOSYS", "EAFNOSUPPORT")


def test_each_attempt_succeeds_for_root(tried):
    """So none is refused for a silly reason: an unconfined process of root's does it, where the kernel has it at all."""
    missing = {"prlimit64"} if not int(status_of(os.getpid())["CapEff"], 16) >> 24 & 1 else set()  # CAP_SYS_RESOURCE
    failed = {
        name: found["free"]
        for name, found in tried["opener"].items()
        if found["free"] not in ("ok", *LACKING) and attempts.ATTEMPTS[name].calls not in missing
    }
    assert not failed
    lacking = [name for name, found in tried["opener"].items() if found["free"] in LACKING]
    assert len(lacking) <= 15, lacking


def test_no_attempt_went_wrong_otherwise(tried):
    """What came of each is success, an errno, the filter's word, or the filter's signal; and the process was confined."""
    odd = [
        (role, name, mode, said)
        for role, found in tried.items()
        for name, outcomes in found.items()
        for mode, said in outcomes.items()
        if not re.fullmatch(r"ok|filter|SIGSYS|no effect|E[A-Z]+", said)
        # code that a kernel without 32-bit programs ends
        and (attempts.ATTEMPTS[name].calls, said) != ("int0x80", "SIGSEGV")
    ]
    assert not odd


def test_holder_worker_and_its_child_are_confined_alike(tried):
    """One column stands for them."""
    assert tried["holder"] == tried["worker"] == tried["child"]


def test_what_is_possible_has_a_reason(tried):
    """And no reason is left of what is not possible any more."""
    table = _table(tried)
    possible = {(name, role) for name, found in table.items() for role, refusals in found.items() if not refusals}
    unexplained = {(name, role) for name, role in possible if not attempts.ATTEMPTS[name].reason(role)}
    if landlock.abi() >= json.loads(RECORD.read_text())["environment"]["landlock"]:
        assert not unexplained
    used = {(name, key) for name, role in possible for key in (role, attempts.ALIKE.get(role), "all")}
    assert not [
        (name, key) for name, one in attempts.ATTEMPTS.items() for key in one.accepted if (name, key) not in used
    ]


def test_nothing_is_weaker_than_the_record_says(tried):
    """Each attempt is refused by all that refused it when docs/confinement-tried.json was written."""
    table, environment = _table(tried), _environment()
    rows = [
        {
            "topic": topic,
            "name": one.name,
            "calls": one.calls,
            "refusals": {COLUMNS[role]: table[one.name][role] for role in COLUMNS},
            "accepted": {COLUMNS[role]: one.reason(role) for role in COLUMNS if not table[one.name][role]},
        }
        for topic, some in attempts.TABLE.items()
        for one in some
    ]
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if os.environ.get("FDBROKER_RECORD"):
        record = {**record, "environment": environment, "attempts": rows}
        RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    old = environment["landlock"] < record["environment"]["landlock"]
    recorded = {row["name"]: row for row in record["attempts"]}
    weaker = [
        (row["name"], process, kept, row["refusals"][process])
        for row in rows
        for process, kept in recorded[row["name"]]["refusals"].items()
        if not {one for one in kept if not (old and one == "Landlock")} <= set(row["refusals"][process])
        and not (tried["opener"][row["name"]]["free"] in LACKING and row["refusals"][process] == kept[:1])
    ]
    assert not weaker
    if environment == record["environment"]:
        assert rows == record["attempts"], "the record is old: write it anew with FDBROKER_RECORD=1"
