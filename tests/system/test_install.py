"""scripts/install into a folder: nothing of this machine changes, and no right is needed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import fdbroker

CHECKOUT = Path(__file__).resolve().parents[2]

# below policy/ in the checkout
MAC = ("apparmor/fdbroker", "selinux/fdbroker.te", "selinux/fdbroker.if", "selinux/fdbroker.fc")


def install(folder: Path) -> set[str]:
    subprocess.run([CHECKOUT / "scripts/install", folder], check=True)
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if not file.is_dir()}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("root")
    return folder, install(folder)


def test_places(installed):
    """Every file has its place, as hier(7) and systemd want it."""
    _, files = installed
    outside = {file for file in files if not file.startswith("opt/fdbroker/")}
    examples = {f"usr/share/doc/fdbroker/examples/{file.name}" for file in (CHECKOUT / "policy/examples").iterdir()}
    documents = {f"usr/share/doc/fdbroker/docs/{file.name}" for file in (CHECKOUT / "docs").glob("*.md")}
    documents |= {
        f"usr/share/doc/fdbroker/{name}" for name in ("README.md", "SECURITY.md", "CHANGELOG.md", "namespaces.conf")
    }
    documents |= {f"usr/share/doc/fdbroker/{name}" for name in ("docs/bundle/config.json", *MAC)}
    assert outside == examples | documents | {
        "usr/share/man/man8/fdbroker.8",
        "etc/fdbroker/policy.yaml",
        "usr/bin/fdbroker",
        "usr/lib/systemd/system/fdbroker.service",
        "usr/lib/systemd/system/fdbroker.socket",
        "usr/lib/systemd/system/fdbroker-dbus@.service",
        "usr/lib/systemd/system/fdbroker-evdev@.service",
        "usr/lib/systemd/user/fdbroker-notify.service",
        "usr/lib/sysusers.d/fdbroker.conf",
        "usr/lib/tmpfiles.d/fdbroker.conf",
    }


def test_program(installed):
    """The program starts isolated from the environment, and what it imports is complete and its own."""
    folder, _ = installed
    assert (folder / "usr/bin/fdbroker").read_text().startswith("#!/opt/fdbroker/bin/python3 -I\n")
    python = folder / "opt/fdbroker/bin/python3"
    modules = "fdbroker.launcher.service, fdbroker.opener.service, fdbroker.inbox.service, fdbroker.cli.commands, "
    modules += "fdbroker.bridges.dbus, fdbroker.bridges.evdev"
    program = f"import {modules}; print(fdbroker.__file__)"
    found = subprocess.run([python, "-I", "-B", "-c", program], capture_output=True, text=True, check=True).stdout
    assert found.startswith(f"{folder}/opt/fdbroker/lib/")
    version = subprocess.run(
        [python, "-I", "-B", "-m", "fdbroker", "--version"], capture_output=True, text=True, check=True
    ).stdout
    assert fdbroker.__version__ in version


def test_nobody_else_writes(installed):
    """None of it may be written by a group or by others."""
    folder, files = installed
    assert not [file for file in files if (folder / file).lstat().st_mode & 0o022 and not (folder / file).is_symlink()]


def test_mandatory_access_control(tmp_path):
    """Profile and module are among the documents, and nowhere else: AppArmor loads what is in /etc/apparmor.d."""
    (tmp_path / "etc/apparmor.d").mkdir(parents=True)
    found = {file for file in install(tmp_path) if "apparmor" in file or "selinux" in file}
    assert found == {f"usr/share/doc/fdbroker/{source}" for source in MAC}
    for source in MAC:
        assert (tmp_path / "usr/share/doc/fdbroker" / source).read_bytes() == (
            CHECKOUT / "policy" / source
        ).read_bytes()


def test_again(installed):
    """Installed again, it is the same, and the admin's policy is as it was."""
    folder, files = installed
    policy = folder / "etc/fdbroker/policy.yaml"
    policy.write_text("version: 1 # mine\n")
    assert install(folder) == files
    assert policy.read_text() == "version: 1 # mine\n"
