"""The fuzz targets: their corpus replayed, a short run of the fuzzer, and faults planted in a copy that it must find.

Long runs: scripts/fuzz.
"""

from __future__ import annotations

import importlib.util
import json
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import harness
import pytest
from fuzz import fuzzing
from packaging.requirements import Requirement

SECONDS = 3
FAULTS = json.loads((fuzzing.HERE / "faults.json").read_text())


@pytest.fixture
def engine():
    """The fuzzer, which is there ready built for the Pythons and machines that pyproject.toml says."""
    if importlib.util.find_spec("atheris") is not None:
        return
    project = tomllib.loads((fuzzing.TOP / "pyproject.toml").read_text())["project"]
    (wanted,) = (one for one in project["optional-dependencies"]["test"] if one.startswith("atheris"))
    marker = Requirement(wanted).marker
    if marker is None or marker.evaluate():
        harness.cannot("atheris is not installed")
    pytest.skip(f"there is no atheris for Python {platform.python_version()} on {platform.machine()}")


def run(*arguments):
    """The fuzzer in a process of its own; what it said."""
    command = ["nice", sys.executable, str(fuzzing.HERE / "fuzzing.py"), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=500)
    return result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize("name", fuzzing.TARGETS)
def test_the_corpus_keeps_every_invariant_and_costs_no_more_than_its_length_allows(name):
    module, count = fuzzing.load(name), 0
    for label, data in fuzzing.inputs(name):
        trace = fuzzing.Trace()
        try:
            trace.run(module, data)
        except Exception as error:
            raise AssertionError(f"{label}: {data!r}") from error
        assert trace.lines <= fuzzing.WORK + fuzzing.WORK_PER_BYTE * len(data), label
        count += trace.lines > 0
    assert count > 3


def test_every_target_has_a_corpus_and_every_file_of_it_its_own_name():
    assert {path.name for path in fuzzing.CORPUS.iterdir()} == set(fuzzing.TARGETS)
    for path in fuzzing.CORPUS.glob("*/*"):
        assert path.name.removeprefix("crash-") == fuzzing.name_of(path.read_bytes())
        assert path.stat().st_size <= fuzzing.MAX_BYTES


@pytest.mark.parametrize("name", fuzzing.TARGETS)
def test_a_short_run_finds_nothing(engine, name, tmp_path):
    (tmp_path / "new").mkdir()
    for _, data in fuzzing.inputs(name):
        (tmp_path / "new" / fuzzing.name_of(data)).write_bytes(data)
    options = [f"-max_total_time={SECONDS}", f"-artifact_prefix={tmp_path}/"]
    code, said = run(name, tmp_path / "new", *options)
    assert code == 0, said
    (runs,) = re.findall(r"Done (\d+) runs", said)
    assert int(runs) > len(list(fuzzing.inputs(name)))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault['target']} {fault['file']}")
def test_a_planted_fault_is_found_from_the_seeds_alone(engine, fault, tmp_path):
    """So many runs were enough when it was recorded, several times over."""
    package, seeds = tmp_path / "copy" / "fdbroker", tmp_path / "seeds"
    shutil.copytree(fuzzing.TOP / "fdbroker", package, ignore=shutil.ignore_patterns("__pycache__"))
    seeds.mkdir()
    path = package / fault["file"]
    text = path.read_text()
    assert text.count(fault["line"]) == 1
    path.write_text(text.replace(fault["line"], fault["becomes"]))
    for number, data in enumerate(fuzzing.load(fault["target"]).seeds()):
        (seeds / str(number)).write_bytes(data)
    options = [f"-runs={fault['runs']}", "-seed=1", f"-artifact_prefix={tmp_path}/"]
    code, said = run("--package", package.parent, fault["target"], seeds, *options)
    assert code == 77, said
    assert fault["shows"] in said
    assert list(tmp_path.glob("crash-*"))


def test_each_target_has_a_planted_fault():
    assert {fault["target"] for fault in FAULTS} == set(fuzzing.TARGETS)
    assert all(Path(fault["file"]).suffix == ".py" for fault in FAULTS)
