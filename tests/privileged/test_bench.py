"""`scripts/bench` measures, compares and tells where the time goes; no time is judged here, for machines differ."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from harness import need_root

TOP = Path(__file__).resolve().parents[2]
# a stage of each process that no open can do without
ESSENTIAL = {("client", "ask, in C"), ("inbox", "receive"), ("inbox", "decode"), ("inbox", "link"), ("inbox", "loop")}
ESSENTIAL |= {("opener", stage) for stage in ("link", "authorize", "open", "audit", "send", "loop")}


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
        "PING",
        "connect, identify, first open",
    ]
    for trip in found["round_trips"]:
        assert trip["to_the_same"] > 0
        assert trip["to_one_open"] > 0
        assert f"{trip['to_one_open']:.2f}" in printed
    assert found["idle_connections"]["ratio"] > 0
    assert found["fan_out"]["per_second"]["fdbroker"] > 0
    assert found["namespaces"]["ratio"] > 0
    assert found["memory"]["processes"] == 5  # launcher, opener, keeper, inbox, witness
    assert found["memory"]["pss_mb"] > 20


def test_who_is_there_is_compared_and_who_is_not_is_named(root, measured):
    printed, found = measured
    there = {(one["client"], one["who"]) for one in found["compared"]}
    expected = {("C", "floor"), ("C", "fdbroker")}
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
    if os.environ.get("CI") == "true":
        assert not found["not_installed"]  # scripts/test has unpacked them
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
        assert set(rows) >= {("opener", "accept"), ("opener", "identify")}
    for name in ESSENTIAL:
        assert rows[name]["us"] > 0, name
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1, abs=0.01)
    # what was timed is the same work that the kernel has counted, as far as a machine that does other things tells
    timed_us = sum(row["us"] for (_, stage), row in rows.items() if stage not in ("inexact", "confinement"))
    assert stages["whole_us"] / 2 < timed_us < stages["whole_us"] * 2
    assert sum(stages["processes"].values()) == pytest.approx(stages["whole_us"])
    assert all(number > 0.5 for number in stages["switches"].values())  # each of them was woken for each request


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
    assert not found["environment"]["quick"]


def test_absolute_times_are_in_no_document():
    """Another machine has others: what is printed are ratios and shares."""
    text = (TOP / "docs/performance.md").read_text()
    generated = re.findall(r"<!-- generated: bench-[a-z]+ -->(.*?)<!-- end -->", text, re.DOTALL)
    assert len(generated) == 5
    assert not re.search(r"\d ?(us|µs|ns)\b", "".join(generated))
