"""The mutations that scripts/mutate makes: each names a line that is there once, and a test that exists."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
MUTATIONS = json.loads((TOP / "tests/attacks/mutations.json").read_text())


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda one: f"{one['threat']} {one['file']}")
def test_the_line_is_there_once_and_so_is_the_test(mutation):
    for file, line, _ in [[mutation["file"], mutation["line"], ""], *mutation.get("also", [])]:
        assert (TOP / "fdbroker" / file).read_text().count(line) == 1, line
    assert (TOP / mutation["test"]).exists()


def test_every_threat_has_a_mutation():
    numbers = {int(path.name[6:8]) for path in (TOP / "tests/attacks").glob("test_t[0-9]*.py")}
    assert numbers <= {int(mutation["threat"][1:]) for mutation in MUTATIONS}
