"""T62: code that nobody counts: what Python runs or finds by itself, as root, before a process is confined."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import MEM, MS_BIND, Raw, folder, mount, node, outcome, private_dev, running, unmount

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


def _evil(name: str, mark: Path) -> str:
    """A line of Python that writes down who it is, and in which process."""
    return f"import sys; open({str(mark)!r}, 'a').write({name!r} + open('/proc/self/cmdline').read() + chr(10))"


def _plant(packages: Path, others: Path, mark: Path) -> None:
    """What each way of `site` would run or find."""
    others.mkdir(parents=True)
    (packages / "evil.pth").write_text(f"{_evil('evil.pth', mark)}; sys.path.insert(0, {str(others)!r})\n{others}\n")
    (packages / "sitecustomize.py").write_text(_evil("sitecustomize", mark))
    for name in SHADOWS:
        (others / f"{name}.py").write_text(_evil(name, mark))
        if not list(packages.glob(f"{name}*")):  # else it is the very package
            (packages / f"{name}.py").write_text(_evil(name, mark))


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


# what each process says of itself before it is confined, in a module that all of them import first
TELL = """
import json as _json, os as _os, sys as _sys
_flags = {name: getattr(_sys.flags, name) for name in ("isolated", "no_site", "dont_write_bytecode")}
print("told", _json.dumps([_os.getpid(), _flags, _sys.path]), file=_sys.stderr, flush=True)
"""
# where Debian's Python looks when `site` runs
DISTRIBUTIONS = (
    f"/usr/local/lib/python{sysconfig.get_python_version()}/dist-packages",
    "/usr/lib/python3/dist-packages",
)


@contextlib.contextmanager
def _in_place(where: Path) -> Iterator[Path]:
    """What is installed below `where` is at its real place, and the folders of DISTRIBUTIONS are empty, for the tests alone."""
    mounted = []
    try:
        mount(str(where / "opt"), "/opt", "none", MS_BIND)
        mounted.append("/opt")
        for place in ("/usr/local/lib", "/usr/lib/python3/dist-packages"):
            mount("planted", place, "tmpfs", 0, "mode=0755")
            mounted.append(place)
        (packages,) = Path("/opt/fdbroker/lib").glob("python3*/site-packages")
        yield packages
    finally:
        for place in reversed(mounted):
            unmount(place)


def test_every_process_as_installed_has_the_standard_library_and_one_folder(root, tmp_path):
    """At the places where the service is installed, with its program as it is: nothing of the machine's own Python counts."""
    where, mark = tmp_path / "installed", tmp_path / "mark"
    subprocess.run([CHECKOUT / "scripts/install", where], check=True)
    start = f"import os, sys; os.execv({str(where / 'usr/bin/fdbroker')!r}, ['fdbroker', *sys.argv[1:]])"
    with _in_place(where) as packages, private_dev(), folder() as state:
        for place in DISTRIBUTIONS:
            Path(place).mkdir(parents=True, exist_ok=True)
            for name in SHADOWS:
                Path(place, f"{name}.py").write_text(_evil(name, mark))
            Path(place, "evil.pth").write_text(_evil("evil.pth", mark) + "\n")
        orders = packages / "fdbroker/kernel/orders.py"
        orders.write_text(orders.read_text() + TELL)
        node("/dev/lab/zero", MEM["zero"])
        with running(POLICY, "--state", f"{state}/mail", program=("-c", start)) as broker:
            pids = {name: pid for name, pid in broker.pids.items() if name != "worker"}  # forked, as it is
            assert set(pids) == {"launcher", "opener", "keeper", "inbox", "namespaces", "witness"}
            words = {name: Path(f"/proc/{pid}/cmdline").read_text().split("\0") for name, pid in pids.items()}
            lines = [line.removeprefix("told ") for line in broker.text().splitlines() if line.startswith("told ")]
            told = {pid: (flags, path) for pid, flags, path in map(json.loads, lines)}
        python = "/opt/fdbroker/bin/python3"
        assert words["launcher"][:4] == [python, "-IS", str(where / "usr/bin/fdbroker"), "serve"]
        for name, pid in pids.items():
            if name != "launcher":
                assert words[name][:5] == [python, "-I", "-S", "-B", "-c"], name
                assert words[name][5].startswith(
                    f"import sys; sys.path += [{str(packages)!r}]; from fdbroker.{name}."
                ), name
            flags, path = told[pid]
            assert (flags["isolated"], flags["no_site"]) == (1, 1), name
            assert flags["dont_write_bytecode"] == (name != "launcher"), name
            library = sysconfig.get_path("stdlib")
            zipped = library.replace("python3.", "python3") + ".zip"
            assert path == [zipped, library, f"{library}/lib-dynload", str(packages)], name
        assert not mark.exists(), mark.read_text()
        # what is planted bites where `site` runs, with the interpreter that this one was made from
        subprocess.run([Path(python).resolve(), "-I", "-c", "import prctl"], check=True)
        assert {line.partition("/")[0] for line in mark.read_text().splitlines()} >= {"evil.pth", "prctl"}


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
