"""T62: code that nobody counts: what Python runs or finds by itself, as root, before a process is confined."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from harness import MEM, Raw, folder, node, outcome, private_dev, running

CHECKOUT = Path(__file__).resolve().parents[2]
# every process that the service can have
POLICY = """
version: 1
topics: {lab: {deliver: [queue], keep: 1h}}
everyone:
  devices: [{path: /dev/lab/zero, class: mem, device: "1:5"}]
  namespaces: [{type: net, name: "*"}]
  send: [lab]
"""
# names that the standard library or another package has already
SHADOWS = ("prctl", "msgspec", "sqlite3", "selectors", "contextlib", "fdbroker")


def _installed(where: Path) -> tuple[Path, Path, Path]:
    """The service as scripts/install installs it, below `where`: its program, its interpreter, its packages."""
    subprocess.run([CHECKOUT / "scripts/install", where], check=True)
    program = where / "usr/bin/fdbroker"
    program.write_text(program.read_text().replace('"/opt/fdbroker', f'"{where}/opt/fdbroker'))
    (packages,) = (where / "opt/fdbroker/lib").glob("python3*/site-packages")
    return program, where / "opt/fdbroker/bin/python3", packages


def _plant(packages: Path, others: Path, mark: Path) -> None:
    """What each way of `site` would run or find; whatever runs writes down who it is, and in which process."""

    def evil(name: str) -> str:
        return f"import sys; open({str(mark)!r}, 'a').write({name!r} + open('/proc/self/cmdline').read() + chr(10))"

    others.mkdir(parents=True)
    (packages / "evil.pth").write_text(f"{evil('evil.pth')}; sys.path.insert(0, {str(others)!r})\n{others}\n")
    (packages / "sitecustomize.py").write_text(evil("sitecustomize"))
    for name in SHADOWS:
        (others / f"{name}.py").write_text(evil(name))
        if not list(packages.glob(f"{name}*")):  # else it is the very package
            (packages / f"{name}.py").write_text(evil(name))


def test_no_process_of_the_service_runs_or_finds_what_is_planted_for_site(root, tmp_path):
    where, mark = tmp_path / "installed", tmp_path / "mark"
    program, python, packages = _installed(where)
    _plant(packages, where / "usr/local/lib/python3/dist-packages", mark)
    flag = program.read_text().split()[1]  # of its first line, which names the interpreter below /opt
    start = f"import os, sys; os.execv({str(python)!r}, [{str(python)!r}, {flag!r}, {str(program)!r}, *sys.argv[1:]])"
    with private_dev(), folder() as state:
        node("/dev/lab/zero", MEM["zero"])
        with running(POLICY, "--state", f"{state}/mail", program=("-c", start)) as broker:
            assert set(broker.pids) == {"launcher", "opener", "keeper", "inbox", "namespaces", "worker", "witness"}
            with Raw(broker.socket) as client:
                assert outcome(client.open("/dev/lab/zero")) == "granted"
                assert outcome(client.call("io.fdbroker.Inbox.Send", {"topic": "lab", "payload": "eA=="})) == "granted"
    assert not mark.exists(), mark.read_text()
    # what is planted bites where `site` runs
    subprocess.run([python, "-I", "-c", "import sqlite3"], check=True)
    assert {line.partition(str(python))[0] for line in mark.read_text().splitlines()} >= {"evil.pth", "sqlite3"}


@pytest.mark.parametrize("name", ["sqlite3", "selectors"])
def test_a_package_never_stands_before_the_standard_library(root, tmp_path, name):
    """A library that came with another one, and is called as one of Python's, is not what the children import."""
    (tmp_path / f"{name}.py").write_text("raise SystemExit(99)")
    from fdbroker.launcher import start

    *python, code, _ = start.command("inbox", "")
    planted = code.replace("sys.path += [", f"sys.path += [{str(tmp_path)!r}, ").replace(
        "sys.exit(main())", f"import {name}"
    )
    assert planted.count(str(tmp_path)) == 1
    subprocess.run([*python, planted], check=True)
