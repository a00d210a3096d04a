"""Where the microseconds of one request go: CPU time by process, by stage, and what the confinement adds.

Three brokers are asked in turns by the C client on the same CPU: the real one, one that is not confined, and one that
is not confined and has its stages timed (staged.py). What the kernel counts for each process of the real one is the
whole; the stages are those of the timed one.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from processes import Failed, children_of, cpu_ns, switches

PROCESSES = ("inbox", "opener", "keeper")  # the keeper has a part in a connection, and none in an open
_REPORT_S = 20.0
_WARM = 200  # requests before it counts

Ask = Callable[..., list[tuple[int, ...]]]


class Brokers(NamedTuple):
    """Socket and process group of each; the timed one writes to `reports`."""

    floor: Path
    real: tuple[Path, int]
    unconfined: tuple[Path, int]
    timed: tuple[Path, int]
    reports: Path


def _reported(brokers: Brokers) -> dict[str, dict[str, float]]:
    """Microseconds by process and stage since the last report."""
    found = {}
    children = children_of(brokers.timed[1])
    for name in PROCESSES:
        pid = children[name]
        path = brokers.reports / f"{name}.json"
        path.unlink(missing_ok=True)
        os.kill(pid, signal.SIGUSR1)
        deadline_s = time.monotonic() + _REPORT_S
        while not path.exists():
            if time.monotonic() > deadline_s:
                raise Failed(f"the timed {name} does not report")
            time.sleep(0.01)
        found[name] = json.loads(path.read_text())
    return found


def _used(group: int) -> dict[str, tuple[int, int]]:
    return {name: (cpu_ns(pid), switches(pid)) for name, pid in children_of(group).items()}


def _client_us() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (used.ru_utime + used.ru_stime) * 1e6


def measure(ask: Ask, cpu: int, what: str, requests: int, count_rounds: int, brokers: Brokers) -> dict[str, Any]:
    """One kind of request. `ask` returns the rounds, and there is one before these that is not returned."""
    targets = [(what, one) for one in (brokers.floor, brokers.real[0], brokers.unconfined[0], brokers.timed[0])]
    ask(cpu, requests, *targets, rounds=max(1, _WARM // requests))
    _reported(brokers)
    before = {kind: _used(getattr(brokers, kind)[1]) for kind in ("real", "unconfined")}
    client_us = _client_us()
    rounds = ask(cpu, requests, *targets, rounds=count_rounds)
    count = (len(rounds) + 1) * requests
    client_us = (_client_us() - client_us) / count / len(targets)
    after = {kind: _used(getattr(brokers, kind)[1]) for kind in before}
    timed = _reported(brokers)

    def spent_us(kind: str, name: str) -> float:
        return (after[kind][name][0] - before[kind][name][0]) / count / 1000

    rows = [{"process": "client", "stage": "ask, in C", "us": client_us}]
    for name in PROCESSES:
        stages = {stage: us / count for stage, us in timed[name].items()}
        rows += [{"process": name, "stage": stage, "us": us} for stage, us in stages.items() if us >= 0.01]
        unconfined_us = spent_us("unconfined", name)
        rows.append({"process": name, "stage": "confinement", "us": spent_us("real", name) - unconfined_us})
        # what the timing does not tell: its own inexactness, for the same code runs in both
        rows.append({"process": name, "stage": "inexact", "us": unconfined_us - sum(stages.values())})
    whole_us = client_us + sum(spent_us("real", name) for name in PROCESSES)
    return {
        "requests": count,
        "whole_us": whole_us,
        "round_trip_us": statistics.median(real for _, real, *_ in rounds) / 1000,
        "floor_us": statistics.median(floor for floor, *_ in rounds) / 1000,
        "to_floor": statistics.median(real / floor for floor, real, *_ in rounds),
        "unconfined_to_floor": statistics.median(free / floor for floor, _, free, _ in rounds),
        "switches": {name: (after["real"][name][1] - before["real"][name][1]) / count for name in PROCESSES},
        "processes": {"client": client_us} | {name: spent_us("real", name) for name in PROCESSES},
        "stages": [row | {"share": row["us"] / whole_us} for row in rows],
    }
