"""Inside the machine: the shipped units under load, while their processes die, hang, lose the journal."""

from __future__ import annotations

import contextlib
import grp
import json
import os
import random
import shutil
import signal
import socket
import time
from collections import Counter
from pathlib import Path
from typing import Any

from load import NAMESPACER, OPENERS, POLICY, RECEIVER, SENDERS, Load
from steps import make_node, open_in, report, role, run, show, wait_for, write_policy

JOURNAL = ("systemd-journald.service", "systemd-journald.socket", "systemd-journald-dev-log.socket")
NAMES = ("launcher", "opener", "keeper", "inbox", "witness", "namespaces", "worker")
MAY_CONNECT = grp.getgrnam("fdbroker").gr_gid
rand = random.Random(5)


def children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def processes() -> dict[str, int]:
    """The pids of all seven by name, as many as there are now."""
    main = int(show("MainPID")["MainPID"])
    found = {"launcher": main} if main else {}
    for pid in children(main) if main else ():
        with contextlib.suppress(OSError):
            found[role(pid)] = pid
    found.pop("", None)  # one that has just been forked, or is a zombie
    if "namespaces" in found and (workers := children(found["namespaces"])):
        found["worker"] = workers[0]
    return found


def all_there() -> dict[str, int] | None:
    """They, once all are there and the unit says that it serves."""
    if show("ActiveState")["ActiveState"] != "active":
        return None
    found = processes()
    return found if set(found) == set(NAMES) else None


def fresh() -> dict[str, int]:
    """A running service whose restarts nobody has counted yet."""
    run("systemctl", "reset-failed", "fdbroker.service", "fdbroker.socket")
    return wait_for("the service", all_there, 60)


def descriptors(pids: dict[str, int]) -> dict[str, int]:
    return {name: open_in(pid) for name, pid in pids.items()}


def written() -> str:
    """Wait until the journal has all that was sent to it before, and return the cursor of that place.

    By a record of our own: --sync overtakes what waits in the journal's socket.
    """
    mark = f"mark {time.monotonic_ns()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect("/run/systemd/journal/socket")
        sock.send(f"MESSAGE={mark}\nSYSLOG_IDENTIFIER=lab\n".encode())

    def found() -> str:
        lines = run("journalctl", "--identifier=lab", "--output=json", "--lines=1").stdout
        last = json.loads(lines) if lines else {}
        return last["__CURSOR"] if last.get("MESSAGE") == mark else ""

    return wait_for("the journal", found)


def recorded(since: str) -> dict[str, dict[str, int]]:
    """How many grants, and how many that did not come true, the journal has of each user from that cursor on."""
    written()
    found: dict[str, dict[str, int]] = {}
    for kind, number in (("granted", "a01"), ("undone", "a03")):
        identifier = f"MESSAGE_ID=6c0b6a1d5fd94b6c8f0d2b5b1f1f7{number}"
        command = ("journalctl", "--output=cat", "--output-fields=FDBROKER_UID", f"--after-cursor={since}")
        # the record of that place must be among those asked for, or the first after it is left out
        found[kind] = Counter(run(*command, identifier, "+", "SYSLOG_IDENTIFIER=lab", check=True).stdout.split())
    return found


def judged(load: Load, since: str) -> dict[str, Any]:
    """What the clients got beside what the journal and the queue have of it."""
    journal = recorded(since)
    received = load.said[RECEIVER].get("received", {})
    return {
        "errors": {uid: said["error"] for uid, said in load.said.items() if "error" in said},
        "granted": {uid: len(load.said[uid].get("at_s", ())) for uid in (*OPENERS, NAMESPACER)},
        "recorded": journal["granted"],
        "undone": journal["undone"],
        "wrong": sum(load.said[uid].get("wrong", 0) for uid in OPENERS),
        "stored": {uid: len(load.said[uid].get("stored", ())) for uid in SENDERS},
        "lost": {
            uid: sorted(set(load.said[uid].get("stored", ())) - set(received.get(str(uid), ()))) for uid in SENDERS
        },
        "again": load.said[RECEIVER].get("again"),
        "found": {uid: said.get("found") for uid, said in load.said.items()},
    }


def loaded() -> Load:
    return Load(Path("/run/load"), [MAY_CONNECT])


def idle(before: dict[str, int]) -> dict[str, Any]:
    """Whether, without clients, all have the descriptors that a fresh service has; what other processes are left."""
    pids = fresh()
    with contextlib.suppress(TimeoutError):
        wait_for("descriptors", lambda: descriptors(pids) == before)
    uids = {Path(f"/proc/{pid}").stat().st_uid for name, pid in pids.items() if name not in ("launcher", "witness")}
    left = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (entry / "cmdline").read_text()
            ours = entry.stat().st_uid in uids or "from fdbroker." in command
            if ours and int(entry.name) not in pids.values():
                left.append(command)
    return {"descriptors": descriptors(pids), "before": before, "left": left, "mounts": mounts()}


def mounts() -> int:
    return len(Path("/proc/self/mountinfo").read_text().splitlines())


# ---- the steps, in their order


def started() -> dict[str, Any]:
    make_node("/dev/lab/zero", 1, 5)
    with open("/etc/passwd", "a", encoding="utf-8") as users:  # each is its own owner, with limits of its own
        users.writelines(
            f"lab-{uid}:x:{uid}:{uid}::/:/usr/sbin/nologin\n" for uid in (*OPENERS, *SENDERS, RECEIVER, NAMESPACER)
        )
    drop_ins = Path("/etc/systemd/system/fdbroker.service.d")
    drop_ins.mkdir(parents=True, exist_ok=True)
    shutil.copy("/usr/share/doc/fdbroker/namespaces.conf", drop_ins)
    (drop_ins / "watchdog.conf").write_text("[Service]\nWatchdogSec=2s\n")
    run("systemctl", "daemon-reload", check=True)
    run("systemd-tmpfiles", "--create", "fdbroker.conf", check=True)
    write_policy(POLICY)
    run("systemctl", "start", "fdbroker.socket", "fdbroker.service", check=True)
    global empty  # noqa: PLW0603 -- of a service that nobody has asked anything
    empty = descriptors(fresh())
    return {"descriptors": empty, "mounts": mounts()}


def healthy() -> dict[str, Any]:
    """Loaded for longer than the watchdog waits, it is left alone."""
    since, before = written(), fresh()
    with loaded() as load:
        time.sleep(5)
    return {**judged(load, since), "same": processes() == before, **idle(empty)}


def killed() -> dict[str, Any]:
    since, restarts, took = written(), [], []
    with loaded() as load:
        for name in (*NAMES, "opener", "inbox"):
            pids = fresh()
            time.sleep(rand.uniform(0.1, 0.9))
            restarts.append(int(show("NRestarts")["NRestarts"]))
            began_s = time.monotonic()
            os.kill(pids[name], signal.SIGKILL)
            after = wait_for(f"after the {name}", lambda old=pids[name], name=name: there_again(name, old))
            took.append(time.monotonic() - began_s)
            if name != "worker":
                assert not set(after.values()) & set(pids.values()), (pids, after)
    return {**judged(load, since), "took_s": took, **idle(empty)}


def there_again(name: str, old: int) -> dict[str, int] | None:
    found = all_there()
    return found if found and found[name] != old else None


def hanging() -> dict[str, Any]:
    """SIGSTOP; the watchdog speaks for these four, the worker has a time of its own."""
    since, took = written(), {}
    with loaded() as load:
        for name in ("launcher", "opener", "keeper", "inbox", "worker"):
            pids = fresh()
            time.sleep(rand.uniform(0.1, 0.9))
            began_s = time.monotonic()
            os.kill(pids[name], signal.SIGSTOP)
            after = wait_for(f"after the {name}", lambda old=pids[name], name=name: there_again(name, old), 60)
            took[name] = [began_s, time.monotonic()]
            same = {one for one in pids if pids[one] == after[one]}
            assert same == (set(NAMES) - {"worker"} if name == "worker" else set()), (pids, after)
            wait_for("the old ones' end", lambda old=pids[name]: not Path(f"/proc/{old}").exists())
    began_s, end_s = took["worker"]
    during = sum(began_s < at_s < end_s for uid in OPENERS for at_s in load.said[uid].get("at_s", ()))
    return {**judged(load, since), "devices_while_worker_hung": during, **idle(empty)}


def journal_killed() -> dict[str, Any]:
    """The service manager keeps its socket, and starts it again."""
    since, before = written(), fresh()
    with loaded() as load:
        for _ in range(3):
            time.sleep(rand.uniform(0.3, 0.8))
            pid = int(show("MainPID", unit=JOURNAL[0])["MainPID"])
            os.kill(pid, signal.SIGKILL)
            wait_for("the journal", lambda old=pid: int(show("MainPID", unit=JOURNAL[0])["MainPID"]) not in (0, old))
        time.sleep(1)
    return {**judged(load, since), "kills": 3, "same": processes() == before, **idle(empty)}


def journal_gone() -> dict[str, Any]:
    """With its sockets; then back, with new ones."""
    since, before = written(), fresh()
    with loaded() as load:
        time.sleep(1)
        run("systemctl", "stop", *JOURNAL, check=True)
        gone_s = time.monotonic()
        time.sleep(3)
        back_s = time.monotonic()
        run("systemctl", "start", *JOURNAL, check=True)
        time.sleep(7)
    at_s = [one for uid in OPENERS for one in load.said[uid].get("at_s", ())]
    return {
        **judged(load, since),
        "while_gone": sum(gone_s < one < back_s for one in at_s),
        "after": sum(one > back_s for one in at_s),
        "same": processes() == before,
        "queue": int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text()),
        **idle(empty),
    }


def journal_not_there() -> dict[str, Any]:
    """At the start: systemd gives the service /dev/null then."""
    since = written()
    with loaded() as load:
        run("systemctl", "stop", *JOURNAL, check=True)
        gone_s = time.monotonic()
        run("systemctl", "kill", "--kill-whom=all", "--signal=KILL", "fdbroker.service")
        time.sleep(4)
        state = show("ActiveState", "SubState")
        main = int(show("MainPID")["MainPID"])
        stderr = os.readlink(f"/proc/{main}/fd/2") if main else ""
        back_s = time.monotonic()
        run("systemctl", "start", *JOURNAL, check=True)
        fresh()
        time.sleep(1)
    at_s = [one for uid in OPENERS for one in load.said[uid].get("at_s", ())]
    return {
        **judged(load, since),
        "state": state,
        "stderr": stderr,
        "while_gone": sum(gone_s + 0.5 < one < back_s for one in at_s),
        "after": sum(one > back_s for one in at_s),
        "queue": int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text()),
        **idle(empty),
    }


def stopped() -> dict[str, Any]:
    run("systemctl", "stop", "fdbroker.socket", "fdbroker.service")
    return {
        **show("ActiveState", "Result"),
        "left": run("pgrep", "--full", "--", "fdbroker serve|from fdbroker[.]").stdout,
    }


empty: dict[str, int] = {}
report([started, healthy, killed, hanging, journal_killed, journal_gone, journal_not_there, stopped])
