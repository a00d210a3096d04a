"""A taken-over launcher under the shipped unit and a real systemd; the other processes: tests/privileged/test_taken_over.py."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RECORD = Path(__file__).parents[2] / "docs/confinement-tried.json"


@pytest.fixture(scope="module")
def facts(nspawn: Callable[..., Any]) -> Any:
    return nspawn("taken_over.py")["tried"]


def test_the_launcher_is_confined_as_the_unit_and_itself_say(facts):
    """The attempts were made behind both."""
    assert facts["code"] == 0
    assert facts["status"]["Seccomp"] == "2"
    assert int(facts["status"]["Seccomp_filters"]) > 1
    odd = {
        name: said
        for name, said in facts["outcomes"].items()
        if not re.fullmatch(r"ok|filter|SIG[A-Z]+|no effect|E[A-Z]+", said)
    }
    assert not odd


def test_under_the_unit_it_can_do_no_more_than_the_record_says(facts):
    """What is possible by hand and refused by the unit stands in docs/confinement-tried.json; FDBROKER_RECORD=1 writes it."""
    record = json.loads(RECORD.read_text())
    by_hand = {row["name"]: not row["refusals"]["launcher"] for row in record["attempts"]}
    possible = {name for name, said in facts["outcomes"].items() if said == "ok"}
    assert not {name for name in possible if not by_hand[name]}
    refused = [name for name, there in by_hand.items() if there and name not in possible]
    if os.environ.get("FDBROKER_RECORD"):
        record["unit"] = refused
        RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    assert not set(record["unit"]) & possible
    assert refused == record["unit"]
