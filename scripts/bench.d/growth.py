"""How cost grows: with the number of rules and deny rules, and a List with the number of nodes.

Brokers whose policies differ in that alone run side by side and are asked in turns.
"""

from __future__ import annotations

import contextlib
import json
import socket
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nodes
from measuring import Bench
from processes import Failed

# The design: what 1,000 rules cost at most, as a ratio to what 10 do; the start in seconds.
TARGETS = {"rules": 1000, "open": 1.25, "first": 1.25, "connect": 1.5, "start_s": 1.0}
_LIST = b'{"method":"io.fdbroker.Broker.List"}\0'
_LIST_S = 60.0


def rules(bench: Bench, counts: Sequence[int]) -> list[dict[str, Any]]:
    """One row for each number of rules, with as many deny rules; `_ratio` is to the first number."""
    asked = bench.write_policies({f"rules{count}": _with(count, nodes.many()) for count in counts})
    listing = bench.write_policies({f"few{count}": _with(count, [nodes.listed(nodes.FEW)]) for count in counts})
    rows: list[dict[str, Any]] = [{"rules": count} for count in counts]
    with contextlib.ExitStack() as stack:
        many = [stack.enter_context(bench.fdbroker(name, policy=path))[0] for name, path in asked.items()]
        few = [stack.enter_context(bench.fdbroker(name, policy=path))[0] for name, path in listing.items()]
        for what, brokers, requests in (
            ("open", many, bench.sizes.requests),
            ("first", many, bench.sizes.requests),
            ("connect", many, bench.sizes.connects),
            ("list", few, max(1, bench.sizes.connects // 5)),
        ):
            rounds = bench.ask(
                bench.cpus[0], requests, *((what, one) for one in brokers), rounds=bench.sizes.rounds_compared
            )
            for index, row in enumerate(rows):
                row[f"{what}_us"] = statistics.median(one[index] for one in rounds) / 1000
                row[f"{what}_ratio"] = statistics.median(one[index] / one[0] for one in rounds)
    for row, path in zip(rows, listing.values(), strict=True):
        row["start_s"] = statistics.median(bench.starts(path, bench.sizes.starts_with_rules))
    return rows


def _with(count: int, allowed: Sequence[str]) -> str:
    """A policy of `count` rules; those that count stand last."""
    allowed = [nodes.NULL, *allowed]
    rules, denied = nodes.others(count)
    return nodes.policy([*rules[: count - len(allowed)], *allowed], denied)


def listings(bench: Bench, counts: Sequence[int], floor: Path) -> list[dict[str, Any]]:
    """One row for each number of nodes that a List looks at, beside one open of the floor."""
    policies = bench.write_policies({f"nodes{count}": nodes.policy([nodes.listed(count)]) for count in counts})
    rounds_listed = bench.sizes.rounds_listed
    rows = []
    for count, (name, path) in zip(counts, policies.items(), strict=True):
        with bench.fdbroker(name, policy=path) as (broker, _):
            offers = _offers(broker)
            requests = max(1, bench.sizes.requests // max(10, count))
            listed = bench.ask(bench.cpus[0], requests, ("list", broker), rounds=rounds_listed)
            # not in the same rounds: a floor that is asked once or twice in each is cold
            opened = bench.ask(bench.cpus[0], bench.sizes.requests, ("open", floor), rounds=rounds_listed)
        us, floor_us = (statistics.median(one for (one,) in rounds) / 1000 for rounds in (listed, opened))
        to_floor = us / floor_us
        rows.append(
            {"nodes": count, "offers": offers, "us": us, "to_floor": to_floor, "each_to_floor": to_floor / offers}
        )
    return rows


def _offers(broker: Path) -> int:
    """How many resources a List of it has: what it is not cut to must be there. Raises Failed."""
    data = b""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(_LIST_S)
        sock.connect(str(broker))
        sock.sendall(_LIST)
        while not data.endswith(b"\0"):
            more = sock.recv(1 << 20)
            if not more:
                raise Failed("no answer to List")
            data += more
    offers = json.loads(data[:-1])["parameters"].get("resources", [])
    if not offers:
        raise Failed(f"List offers nothing: {data[:200]!r}")
    return len(offers)
