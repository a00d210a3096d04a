"""Boots a machine for a test module: it runs one script of inside/, which writes facts that the tests then judge."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
LAB = CHECKOUT / "scripts/lab"
CACHE = CHECKOUT / ".cache"


def unavailable(reason: str) -> None:
    """These tests cannot run here: skip them, but never where somebody relies on them having run."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI=true, and this machine cannot run it: {reason}", pytrace=False)
    pytest.skip(reason)


class Facts:
    """What the script in the machine found out: one mapping for each of its steps."""

    def __init__(self, out: Path, status: int) -> None:
        self._status = status
        self._out = out
        self._told = False
        file = out / "facts"
        lines = file.read_text().splitlines() if file.exists() else []
        self._steps = {fact.pop("step"): fact for fact in map(json.loads, lines)}

    def __getitem__(self, step: str) -> dict[str, Any]:
        found = self._steps.get(step, {"error": f"the machine never got to {step}"})
        if "error" in found:
            text = [found["error"]]
            if not self._told:  # once is enough
                self._told = True
                text.append(f"the machine ended with {self._status}")
                text += [f"--- {name}\n{self.end_of(name)}" for name in ("log", "journal.txt", "console")]
            pytest.fail("\n".join(text), pytrace=False)
        return found

    def end_of(self, name: str) -> str:
        """The end of what the machine wrote there."""
        file = self._out / name
        return file.read_text(errors="replace")[-4000:] if file.exists() else "(there is none)"


@pytest.fixture(scope="session")
def boot(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Facts]:
    """`boot(machine, commands, …)` runs shell commands in a machine ("nspawn" or "vm") and returns their facts."""

    def boot(machine: str, commands: str, limit_s: int, *words: str, kept: str = "", **environment: str) -> Facts:
        if os.geteuid() != 0:
            unavailable("only root can start machines")
        out = tmp_path_factory.getbasetemp() / kept if kept else tmp_path_factory.mktemp(machine)
        if (out / "status").exists():  # another module has asked for the same
            return Facts(out, 0)
        out.mkdir(exist_ok=True)
        test = out / "test"
        test.write_text(f"set -eu\ncd {shlex.quote(str(CHECKOUT))}\n{commands}\n")
        ended = subprocess.run(
            [LAB / machine, out, test, *words],
            env={**os.environ, **environment, "LIMIT": str(limit_s)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if not (out / "status").exists():
            pytest.fail(f"{ended.stderr}{Facts(out, ended.returncode).end_of('console')}", pytrace=False)
        return Facts(out, ended.returncode)

    return boot


@pytest.fixture(scope="session")
def nspawn(boot: Callable[..., Facts]) -> Callable[..., Facts]:
    """Boot systemd with what scripts/install installs; `nspawn(script, …)` runs a script of inside/ there."""
    if shutil.which("systemd-nspawn") is None:
        unavailable("no systemd-nspawn: install the package systemd-container")

    def run(script: str, *arguments: str | Path, limit_s: int = 120) -> Facts:
        words = shlex.join(map(str, ("/opt/fdbroker/bin/python3", "-B", f"tests/system/inside/{script}", *arguments)))
        return boot("nspawn", f"scripts/install\nexec {words}", limit_s)

    return run


@pytest.fixture(scope="session")
def vm(boot: Callable[..., Facts]) -> Callable[..., Facts]:
    """Boot a virtual machine with sound and input devices; `vm(script)` runs a script of inside/ there.

    With `modules` the kernel has these security modules, and the script what scripts/install installs, under a real
    systemd unless `mode` is "init". With `suite` it is the kernel of that suite of Debian's. `devices` are what QEMU adds
    to the machine, each as its option -device takes it.
    """
    if shutil.which("qemu-system-x86_64") is None:
        unavailable("no qemu-system-x86_64: install the package qemu-system-x86")
    made("mkkernel", CACHE / "kernel")

    def run(
        script: str, modules: str = "", mode: str = "systemd", suite: str = "", devices: Sequence[str] = ()
    ) -> Facts:
        kernel = str(CACHE / f"kernel-{suite}" if suite else CACHE / "kernel")
        if suite:
            made("mkkernel", Path(kernel), suite)
        if modules:
            inside = f"scripts/install\nexec /opt/fdbroker/bin/python3 -B tests/system/inside/{script}"
            return boot("vm", inside, 600, mode, KDIR=kernel, LSM=modules)
        # where every user can read it, wherever the checkout lies
        program = "mkdir /run/program\nmount --bind . /run/program\nexport PYTHONPATH=/run/program"
        inside = f"exec /run/program/.venv/bin/python /run/program/tests/system/inside/{script}"
        added = {"DEVICES": " ".join(devices)}
        return boot("vm", f"{program}\n{inside}", 600, kept=f"vm-{script}", KDIR=kernel, **added)

    return run


@pytest.fixture(scope="session")
def cache() -> Callable[[str], Path]:
    """`cache(script)` is the folder that a script of scripts/lab makes."""

    def cache(script: str) -> Path:
        made(script, CACHE / script)
        return CACHE / script

    return cache


@pytest.fixture(scope="session")
def debian() -> Callable[[str], Path]:
    """`debian(suite)` is a tree of it: trixie has varlinkctl and Python 3.13, forky Python 3.14."""
    if os.geteuid() != 0:
        unavailable("only root can change into another tree")

    def debian(suite: str) -> Path:
        made("debian", CACHE / suite, suite)
        return CACHE / suite

    return debian


def made(script: str, folder: Path, *words: str) -> None:
    """Make what is kept in the cache; when it is there, this does nothing."""
    folder.parent.mkdir(exist_ok=True)
    ended = subprocess.run([LAB / script, folder, *words], capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        unavailable(f"scripts/lab/{script}: {ended.stderr.strip()}")
