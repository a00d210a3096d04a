"""The mutations that scripts/mutate makes: each names a line that is there once, and a test; no threat is without."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
MUTATIONS = json.loads((TOP / "tests/attacks/mutations.json").read_text())


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda one: f"{one['threat']} {one['file']}")
def test_the_line_is_there_once_and_so_is_the_test(mutation):
    for file, line, _ in [[mutation["file"], mutation["line"], ""], *mutation.get("also", [])]:
        assert (TOP / "fdbroker" / file).read_text().count(line) == 1, line
    test = (TOP / mutation["test"]).read_text()
    assert re.search(rf"^def {mutation['fails']}\(", test, re.MULTILINE), mutation["fails"]


def _threats():
    """The rows of SECURITY.md that have a mechanism: number and module."""
    text = (TOP / "SECURITY.md").read_text()
    rows = re.findall(r"^\| T(\d+) \|[^|]*\|[^|]*\|([^|]*)\|", text, re.MULTILINE)
    return [int(number) for number, module in rows if module.strip()]


@pytest.mark.parametrize("number", _threats())
def test_every_threat_is_an_attack_here_which_a_mutation_lets_through(number):
    attacks = [str(path.relative_to(TOP)) for path in (TOP / "tests/attacks").glob(f"test_t{number:02}_*.py")]
    assert len(attacks) == 1
    assert attacks[0] in [one["test"] for one in MUTATIONS if one["threat"] == f"T{number}"]
