"""Deliveries a second to many subscribers: of fdbroker, and of redis-server and mosquitto where installed."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nodes
import rivals
from measuring import Bench
from processes import Failed, has_ended, running, tail

PROGRAMS = {"redis": "redis-server", "mosquitto": "mosquitto"}
TARGET = 1.0  # redis's deliveries to ours, at most
_SUBSCRIBERS = 1000
_START_S = 20.0
_TOPIC = "topics: {news: {}}\neveryone: {send: [news], subscribe: [news]}\n"


def fan_out(bench: Bench) -> dict[str, Any]:
    """All servers run side by side, on all CPUs, and each is used in turns; medians.

    The first turn does not count: the broker has just been asked by another user as well, so it divides its time.
    """
    policy = bench.write_policies({"topics": nodes.policy(more=_TOPIC, limits="subscriptions: 1024, ")})["topics"]
    with contextlib.ExitStack() as stack:
        addresses = {"fdbroker": stack.enter_context(bench.fdbroker("topics", pinned=False, policy=policy))[0]}
        for kind, name in PROGRAMS.items():
            program = rivals.find(name)
            if program is not None:
                addresses[kind] = stack.enter_context(_server(bench, kind, program))
        rounds = [
            {kind: _per_second(bench, kind, address) for kind, address in addresses.items()}
            for _ in range(1 + bench.sizes.fan_outs)
        ][1:]
    return {
        "subscribers": _SUBSCRIBERS,
        "messages": bench.sizes.messages,
        "per_second": {kind: statistics.median(one[kind] for one in rounds) for kind in addresses},
        "to_ours": {kind: statistics.median(one[kind] / one["fdbroker"] for one in rounds) for kind in addresses},
        "target": TARGET,
    }


def _per_second(bench: Bench, kind: str, address: Path) -> float:
    messages = bench.sizes.messages
    command = [bench.program("fanout"), kind, str(address), str(_SUBSCRIBERS), str(messages)]
    (took_ns,) = bench.output(command, "fanout", bench.cpus, client=True)
    return _SUBSCRIBERS * messages * 1e9 / int(took_ns)


@contextlib.contextmanager
def _server(bench: Bench, kind: str, program: str) -> Iterator[Path]:
    address = bench.folder / f"{kind}.sock"
    settings = bench.folder / "mosquitto.conf"
    settings.write_text(f"listener 0 {address}\nallow_anonymous true\nmax_queued_messages 0\nuser root\n")
    redis = ("--port", "0", "--unixsocket", str(address), "--unixsocketperm", "777", "--save", "")
    options = {"redis": (*redis, "--maxclients", "20000"), "mosquitto": ("-c", str(settings))}
    with bench.log(kind) as log, running([program, *options[kind]], bench.cpus, log) as process:
        deadline_s = time.monotonic() + _START_S
        while not address.exists():
            if has_ended(process) or time.monotonic() > deadline_s:
                raise Failed(f"{kind} does not listen: {tail(Path(log.name))}")
            time.sleep(0.01)
        address.chmod(0o777)
        yield address
