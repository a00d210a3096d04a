"""Every module loads under every Python that it may meet, without a warning: what is deprecated today ends a service tomorrow."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import MS_BIND, mount, unmount

TOP = Path(__file__).resolve().parents[2]
LIBRARIES = Path(sysconfig.get_path("purelib"))

# Another Python cannot load the libraries that are compiled for this one: such a one is made up. Others' warnings are
# theirs, so what can be loaded of the libraries is loaded before warnings are errors.
CODE = r"""
import importlib, os, sys, warnings
from unittest import mock

top, *libraries = sys.argv[1:]
sys.path += [top, *libraries]
warnings.simplefilter("ignore")
for name in ("yaml", "click", "rich.console", "rich.table", "dbus_fast.aio"):
    importlib.import_module(name)
for name in ("prctl", "msgspec", "evdev"):
    try:
        importlib.import_module(name)
    except (ImportError, NameError):  # the one for the compiled part; prctl has the other when that is another version's
        sys.modules[name] = mock.MagicMock(name=name)
warnings.simplefilter("error")
count = 0
for folder, _, files in os.walk(top + "/fdbroker"):
    for file in files:
        if file.endswith(".py"):
            importlib.import_module(os.path.relpath(f"{folder}/{file[:-3]}", top).replace("/", "."))
            count += 1
print(*sys.version_info[:2], count)
"""


def _pythons() -> dict[str, str]:
    """Each Python from 3.11 on that runs: version -> program. This one is the first of its version."""
    found = {f"3.{sys.version_info.minor}": sys.executable}
    for folder in os.environ.get("PATH", "").split(":"):
        for program in sorted(Path(folder).glob("python3.*")):
            version = re.fullmatch(r"python(3\.(\d+))", program.name)
            if not version or int(version[2]) < 11 or version[1] in found:
                continue
            if (
                subprocess.run([program, "-c", ""], capture_output=True).returncode == 0
            ):  # pyenv has names that lead nowhere
                found[version[1]] = str(program)
    return found


def _load(*command: str | Path) -> str:
    """Its version."""
    done = subprocess.run([*command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    *version, count = done.stdout.split()
    assert int(count) == len(list((TOP / "fdbroker").rglob("*.py")))
    return ".".join(version)


PYTHONS = _pythons()


@pytest.mark.parametrize("version", sorted(PYTHONS))
def test_every_module_loads_without_a_warning(version):
    assert version == _load(PYTHONS[version], "-I", "-S", "-B", "-c", CODE, TOP, LIBRARIES)


@pytest.mark.parametrize(("suite", "version"), [("trixie", "3.13"), ("forky", "3.14")])
def test_every_module_loads_under_the_python_of_a_later_debian(root, debian: Callable[[str], Path], suite, version):
    tree = debian(suite)
    place = tree / "mnt"
    place.mkdir(exist_ok=True)
    mount(str(TOP), str(place), "none", MS_BIND)
    try:
        found = _load(
            *("chroot", tree, "/usr/bin/python3", "-I", "-S", "-B", "-c", CODE),
            *("/mnt", "/usr/lib/python3/dist-packages", Path("/mnt") / LIBRARIES.relative_to(TOP)),
        )
    finally:
        unmount(str(place))
    assert found == version


def test_no_structure_is_packed():
    """From Python 3.14 on `_pack_` without `_layout_`, which older ones do not have, gives a DeprecationWarning."""
    packed = [path.name for path in (TOP / "fdbroker").rglob("*.py") if re.search(r"\b_pack_\b *=", path.read_text())]
    assert packed == []
