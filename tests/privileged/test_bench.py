"""`scripts/bench` measures, compares and tells where the time goes; no time is judged here, for machines differ."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from harness import need_root

from fdbroker.limits import every as limits

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts/bench.d"))
import nodes
import tables
from measuring import Bench, Sizes
from processes import members
from stages import PROCESSES

TOP = Path(__file__).resolve().parents[2]
# a stage of each process that no open can do without
ESSENTIAL = {("client", "ask, in C"), ("inbox", "receive"), ("inbox", "decode"), ("inbox", "link"), ("inbox", "loop")}
ESSENTIAL |= {("opener", stage) for stage in ("link", "authorize", "open", "audit", "send", "loop")}
SIZES = Sizes(1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, (), ())


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The quick run: what it printed, and its JSON."""
    need_root()
    out = tmp_path_factory.mktemp("bench") / "bench.json"
    command = [sys.executable, str(TOP / "scripts/bench"), "--quick", "--json", str(out)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout, json.loads(out.read_text())


def test_the_quick_run_prints_every_ratio(root, measured):
    printed, found = measured
    assert [trip["title"] for trip in found["round_trips"] if "two CPUs" not in trip["title"]] == [
        "one open, one CPU",
        "16 descriptors in one request",
        "16 different nodes in one request",
        "PING",
        "connect, identify, first open",
    ]
    for trip in found["round_trips"]:
        assert f"{trip['to_one_open']:.2f}" in printed
        assert f"{trip['to_the_chain']:.2f}" in printed
        assert 0 < trip["chain_us"] < trip["fdbroker_us"]  # they make the same calls
    assert found["round_trips"][0]["chain_to_one_open"] > 1
    first = {trip["title"]: trip["first_to_one_open"] for trip in found["round_trips"] if trip["first_us"] is not None}
    assert set(first) == {
        "one open, one CPU",
        "16 descriptors in one request",
        "16 different nodes in one request",
    }
    for trip in found["round_trips"]:
        if trip["title"] in first:
            assert trip["first_us"] > 0.9 * trip["fdbroker_us"]  # nothing that is remembered makes it faster
            assert f"{trip['first_to_one_open']:.2f}" in printed
    assert found["idle_connections"]["ratio"] > 0
    assert found["fan_out"]["per_second"]["fdbroker"] > 0
    assert found["fan_out"]["to_ours"]["fdbroker"] == 1
    assert found["namespaces"]["ratio"] > 0
    assert found["memory"]["processes"] == 5  # launcher, opener, keeper, inbox, witness
    assert found["memory"]["pss_mb"] > 20


def test_what_grows_is_measured_with_fewest_and_most(root, measured):
    printed, found = measured
    rows = found["growth"]["rows"]
    assert [row["rules"] for row in rows] == [10, 100]
    for what in ("open", "first", "connect", "list"):
        assert rows[0][f"{what}_ratio"] == 1
        assert f"{rows[1][f'{what}_ratio']:.2f}" in printed
        assert all(row[f"{what}_us"] > 0 for row in rows)
    assert all(row["start_s"] > 0 for row in rows)
    listings = found["listings"]
    assert [(row["nodes"], row["offers"]) for row in listings] == [(1, 1), (1000, 1000)]
    assert listings[1]["us"] > listings[0]["us"]
    assert listings[1]["each_to_floor"] == pytest.approx(listings[1]["to_floor"] / 1000)


def test_the_service_remembers_fewer_things_than_there_are_nodes(root):
    """So that a request for the next of them is the first of its kind, each time."""
    kept = [limits.KEPT_VALUES, limits.DEVICES_KEPT]
    for path in (TOP / "fdbroker").rglob("*.py"):
        constants = {}
        for one in ast.walk(ast.parse(path.read_text())):
            match one:
                case ast.Assign(targets=[ast.Name(name)], value=ast.Constant(int(number))):
                    constants[name] = number
                case ast.Call(func=ast.Name("lru_cache"), keywords=[ast.keyword("maxsize", ast.Constant(int(number)))]):
                    kept.append(number)
                case ast.Call(func=ast.Name("lru_cache"), keywords=[ast.keyword("maxsize", ast.Name(name))]):
                    kept.append(constants.get(name, 0) or getattr(limits, name, 0))
    assert len(kept) > 6  # they were found
    assert max(kept) < nodes.NODES
    assert f"{nodes.NODES:,} nodes" in (TOP / "docs/performance.md").read_text().replace("\n", " ")


def counted(folder, bench, kind, group, address):
    """How often each system call was made for a hundred requests of one kind, by all processes of that group."""
    report, log = folder / "calls", folder / "strace.log"
    pids = [word for one in members(group) for word in ("-p", one.name)]
    with log.open("w") as said:
        strace = subprocess.Popen(["strace", "-f", "-c", "-U", "name,calls", "-o", report, *pids], stderr=said)
    deadline_s = time.monotonic() + 20
    while log.read_text().count(" attached") < len(pids) // 2:
        assert time.monotonic() < deadline_s, log.read_text()
        time.sleep(0.05)
    bench.ask(bench.cpus[0], 25, (kind, address), rounds=3)  # and a round before them
    time.sleep(0.5)  # the last connection ends
    strace.send_signal(signal.SIGINT)
    strace.wait(20)
    found = dict(re.findall(r"^(\w+) +(\d+)$", report.read_text(), re.MULTILINE))
    return {name: int(calls) for name, calls in found.items() if name not in ("total", *WAITING)}


# how often a process is woken is chance, and so is how often it looks at the clock then, and for more
WAITING = ("epoll_wait", "epoll_ctl", "clock_gettime", "recvmsg", "recvfrom", "ioctl", "restart_syscall")


@pytest.mark.parametrize("kind", ["open", "batch", "ping", "connect"])
def test_the_chain_makes_the_calls_of_the_service(root, kind):
    """All but those of waiting, as often for a request: else chain.c has to follow the service."""
    with tempfile.TemporaryDirectory(dir="/mnt") as name:
        folder = Path(name)
        folder.chmod(0o755)
        bench = Bench(folder, SIZES)
        with bench.fdbroker("service") as (address, group), bench.in_c("chain") as (chain, leader):
            service = counted(folder, bench, kind, group, address)
            chained = counted(folder, bench, kind, leader, chain)
    assert sum(chained.values()) >= 100
    differs = {
        one: f"{service.get(one, 0)} times, chain {chained.get(one, 0)} times"
        for one in service.keys() | chained.keys()
        if abs(service.get(one, 0) - chained.get(one, 0)) > 25
    }
    assert not differs


def test_the_interpreter_that_served_is_named(root, measured):
    printed, found = measured
    told = "import platform, sysconfig; print(platform.python_version(), sysconfig.get_config_var('CONFIG_ARGS'))"
    version, _, options = subprocess.check_output([TOP / ".venv/bin/python", "-c", told], text=True).partition(" ")
    assert found["environment"]["python"].startswith(f"{version} of ")
    assert found["environment"]["profile"].startswith("not ") != ("--enable-optimizations" in options)
    assert found["environment"]["profile"] in printed


def test_who_is_there_is_compared_and_who_is_not_is_named(root, measured):
    printed, found = measured
    there = {(one["client"], one["who"]) for one in found["compared"]}
    expected = {("C", who) for who in ("floor", "chain", "fdbroker", "fdbroker, each of 16")}
    expected |= {("Python", who) for who in ("floor", "fdbroker", "fdbroker, asyncio")}
    for name, entry in (
        ("seatd", ("C", "seatd")),
        ("dbus-daemon", ("Python", "D-Bus, dbus-daemon")),
        ("dbus-broker", ("Python", "D-Bus, dbus-broker")),
    ):
        if name in found["not_installed"]:
            assert f"not installed: {name}" in printed
        else:
            expected.add(entry)
    assert there == expected
    for name in ("redis", "mosquitto"):
        assert (name in found["not_installed"]) != (found["fan_out"]["per_second"].get(name, 0) > 0)
    if os.environ.get("CI") == "true":
        assert not {"seatd", "dbus-daemon", "dbus-broker"} & set(
            found["not_installed"]
        )  # scripts/test has unpacked them
    for one in found["compared"]:
        assert one["us"] > 0
        assert one["to_floor"] == 1 if one["who"] == "floor" else one["to_floor"] > 0


@pytest.mark.parametrize("what", ["open", "connect"])
def test_the_stages_make_up_the_whole(root, measured, what):
    _, found = measured
    stages = found["stages"][what]
    rows = {(row["process"], row["stage"]): row for row in stages["stages"]}
    assert set(rows) >= ESSENTIAL
    if what == "connect":
        assert set(rows) >= {("opener", "accept"), ("opener", "identify"), ("keeper", "link"), ("keeper", "entry")}
    for name in ESSENTIAL:
        assert rows[name]["us"] > 0, name
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1, abs=0.01)
    # what was timed is the same work that the kernel has counted, as far as a machine that does other things tells
    timed_us = sum(row["us"] for (_, stage), row in rows.items() if stage not in ("inexact", "confinement"))
    assert stages["whole_us"] / 2 < timed_us < stages["whole_us"] * 2
    assert sum(stages["processes"].values()) == pytest.approx(stages["whole_us"])
    # each of them was woken for each request; the keeper for a connection alone
    assert {name for name, number in stages["switches"].items() if number > 0.5} == (
        set(PROCESSES) if what == "connect" else {"inbox", "opener"}
    )


def test_a_stage_that_is_not_found_is_an_error(root):
    """A function that is renamed is not silently left out."""
    code = "import staged; staged._replace(staged.Times('opener'), 'opener.request:no_such', 'open')"
    run = [sys.executable, "-c", code]
    result = subprocess.run(run, capture_output=True, text=True, cwd=TOP / "scripts/bench.d")
    assert result.returncode != 0
    assert "no_such" in result.stderr


def test_the_plot_in_the_documents_is_drawn_from_their_numbers():
    code = (
        "import json, sys, bars, show; sys.stdout.reconfigure(encoding='utf-8');"
        "print(bars.svg(*show.plot(json.load(open('../../docs/bench.json')))), end='')"
    )
    run = [sys.executable, "-c", code]
    drawn = subprocess.run(run, capture_output=True, check=True, cwd=TOP / "scripts/bench.d").stdout
    assert drawn == (TOP / "docs/bench.svg").read_bytes()
    found = json.loads((TOP / "docs/bench.json").read_text())
    texts = {text.text for text in ET.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text")}
    assert {f"{one['to_floor']:.2f}" for one in found["compared"]} <= texts
    assert found["round_trips"][0]["title"] in texts


def test_the_documents_say_when_their_numbers_are_rough():
    found = json.loads((TOP / "docs/bench.json").read_text())
    text = (TOP / "docs/performance.md").read_text()
    assert ("**A rough run" in text) == found["environment"]["quick"]


def test_who_is_ahead_is_said_of_each_pair_and_in_the_right_direction():
    compared = [
        {"client": "C", "who": who, "cpus": cpus, "to_floor": ratio}
        for who, ratio in (("floor", 1.0), ("fdbroker", 6.0), ("fdbroker, each of 16", 1.0), ("seatd", 2.0))
        for cpus in (1, 2)
    ]
    fan_out = {"subscribers": 1000, "to_ours": {"fdbroker": 1.0, "redis": 0.8}}
    measured = {"compared": compared, "fan_out": fan_out, "not_installed": ["dbus-broker", "mosquitto"]}
    heads, rows = tables.BLOCKS["ahead"](measured)
    assert heads[3:] == ("one CPU", "two CPUs")
    assert rows == [
        ("C", "one open", "seatd", *["behind: 3.0 times its time"] * 2),
        ("C", "each of 16 in one request", "seatd", *["ahead: 0.50 of its time"] * 2),
        ("C", "delivery to 1,000 subscribers", "redis", "", "ahead: 0.80 of its time"),
        ("", "", "dbus-broker: not installed", "", ""),
        ("", "", "mosquitto: not installed", "", ""),
    ]


def test_a_target_is_reached_by_what_is_not_above_it():
    """Judged are exactly those numbers that the design has a target for."""
    found = json.loads((TOP / "docs/bench.json").read_text())
    found["fan_out"]["to_ours"] = {"fdbroker": 1.0, "redis": 1.5, "mosquitto": 9.0}
    found["memory"]["pss_mb"], found["start"]["seconds"] = 60.0, 0.51
    rows = {row[0]: row[1:4] for row in tables.BLOCKS["ratios"](found).rows}
    assert rows["redis's deliveries to 1,000 subscribers, to ours"] == ("1.50", "1", "**not reached**")
    assert rows["mosquitto's deliveries to 1,000 subscribers, to ours"] == ("9.0", "", "")
    assert rows["memory, PSS of 5 processes"] == ("60.0 MB", "60 MB", "reached")
    assert rows["start to first answer"] == ("0.51 s", "0.5 s", "**not reached**")
    assert rows["one open, one CPU"][1] == "7.5"
    assert rows["one open, one CPU, the first of its kind"][1] == "11"
    told = tables.BLOCKS["reached"](found)
    judged = [row for row in rows.values() if row[1]]
    reached = [row for row in judged if row[2] == "reached"]
    assert told.startswith(
        f"Of the design's {len(judged)} targets that this run could judge, {len(reached)} are reached."
    )
    assert "start to first answer (0.51 s, target 0.5)" in told


def test_absolute_times_are_in_no_document():
    """Another machine has others: what is printed are ratios and shares."""
    text = (TOP / "docs/performance.md").read_text()
    generated = re.findall(r"<!-- generated: bench-([a-z]+) -->(.*?)<!-- end -->", text, re.DOTALL)
    assert {name for name, _ in generated} == set(tables.BLOCKS)
    assert not re.search(r"\d ?(us|µs|ns)\b", "".join(block for _, block in generated))
