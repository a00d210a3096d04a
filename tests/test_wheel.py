"""What is installed is what was tested: the wheel has every module, the interfaces and the type marker, no tests."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

TOP = Path(__file__).resolve().parents[1]


def test_the_wheel_has_all_of_the_package_and_nothing_else(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(TOP / "fdbroker", source / "fdbroker", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(TOP / name, source / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(tmp_path),
    ]
    result = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = {
        str(path.relative_to(TOP))
        for path in (TOP / "fdbroker").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == wanted
