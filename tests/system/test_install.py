"""scripts/install into a folder: nothing of this machine changes, and no right is needed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest
from harness import cannot

import fdbroker

CHECKOUT = Path(__file__).resolve().parents[2]
LIBRARIES = sysconfig.get_path("purelib")  # of the environment that scripts/install copies

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
    """The program starts with its own folder and the standard library alone; what it imports is complete and its own."""
    folder, _ = installed
    program = (folder / "usr/bin/fdbroker").read_text()
    assert program.startswith("#!/opt/fdbroker/bin/python3 -IS\n")
    # it runs where it was installed, below `folder`
    here = program.replace('"/opt/fdbroker', f'"{folder}/opt/fdbroker').replace("sys.exit(main())", "")
    modules = "fdbroker.launcher.service, fdbroker.opener.service, fdbroker.inbox.service, fdbroker.cli.commands, "
    modules += "fdbroker.bridges.dbus, fdbroker.bridges.evdev"
    tell = f"{here}\nimport {modules}\nprint('site' in sys.modules, *sys.path, sep='\\n')\n{'sys.exit(main())'}"
    python = folder / "opt/fdbroker/bin/python3"
    found = subprocess.run([python, "-IS", "-B", "-c", tell, "--version"], capture_output=True, text=True, check=True)
    site, *paths, version = found.stdout.splitlines()
    assert site == "False"
    assert paths[-1].startswith(f"{folder}/opt/fdbroker/lib/")
    library = sysconfig.get_path("stdlib")
    assert paths[1:-1] == [library, f"{library}/lib-dynload"], paths
    assert paths[0].endswith(".zip"), paths
    assert fdbroker.__version__ in version


@pytest.mark.parametrize(
    "words, code", [(["--help"], 0), (["--user"], 64), (["-x", "/somewhere"], 64), (["a", "b"], 64)]
)
def test_options_are_no_folders(tmp_path, words, code):
    """An option is answered or refused, and nothing is installed below a folder of that name."""
    done = subprocess.run([CHECKOUT / "scripts/install", *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == code
    assert "usage: install [DESTDIR]" in (done.stderr if code else done.stdout)
    assert not list(tmp_path.iterdir())


def test_environment_has_lists_of_its_files():
    """Whatever pip built the environment, each library came as a wheel: an installation by setup.py leaves no RECORD."""
    for name in ("fdbroker", "python-prctl", "pyseccomp", "PyYAML", "msgspec", "click", "rich"):
        (found,) = metadata.distributions(name=name, path=[LIBRARIES])
        assert found.read_text("RECORD"), name


PIP = "23.0.1"  # of Debian 12; the last one that installs by setup.py


def _built(where: Path, words: list[str], requirement: str) -> list[str]:
    """Which lists of its files python-prctl has, once these words of pip's have built it in an environment at `where`."""
    environment = {**os.environ, "PIP_NO_CACHE_DIR": "1"}  # else it may be there as a wheel
    subprocess.run([os.path.realpath(sys.executable), "-m", "venv", where], check=True)
    python = where / "bin/python"
    pip = [python, "-m", "pip"]
    version = subprocess.run([*pip, "--version"], capture_output=True, text=True, check=True).stdout.split()[1]
    wanted = [] if version == PIP else [[*pip, "install", "--quiet", f"pip=={PIP}"]]
    for command in (*wanted, [*pip, "uninstall", "--quiet", "--yes", "wheel"], [python, *words, requirement]):
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            cannot(f"{command} failed, without a network perhaps: {done.stderr}")
    (packages,) = (where / "lib").glob("python3*/site-packages")
    (found,) = metadata.distributions(name="python-prctl", path=[str(packages)])
    return [name for name in ("RECORD", "installed-files.txt") if found.read_text(name)]


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="pip of Debian 12 needs its Python, 3.11")
def test_environment_of_debian_12_has_a_list_of_what_was_built_from_source(tmp_path):
    """By the words of scripts/setup, where pip has neither `wheel` nor a wheel that it has built before.

    Without one of these words that very environment comes without the list.
    """
    setup = (CHECKOUT / "scripts/setup").read_text()
    (line,) = re.findall(r"^ *\.venv/bin/python (-m pip install .*) --editable", setup, re.MULTILINE)
    (requirement,) = [one for one in metadata.requires("fdbroker") or [] if one.startswith("python-prctl")]
    words = line.split()
    assert _built(tmp_path / "ours", words, requirement) == ["RECORD"]
    words.remove("--use-pep517")
    assert _built(tmp_path / "without", words, requirement) == ["installed-files.txt"]


@pytest.fixture(scope="module")
def copied(installed, tmp_path_factory):
    """A copy of the checkout, with an environment of its own that has what an installation needs and no more."""
    folder, _ = installed
    copy = tmp_path_factory.mktemp("copy")
    for name in ("fdbroker", "scripts", "policy", "units", "docs"):
        shutil.copytree(CHECKOUT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "SECURITY.md", "CHANGELOG.md"):
        shutil.copy(CHECKOUT / name, copy / name)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", copy / ".venv"], check=True)
    (there,) = (copy / ".venv/lib").glob("python3*/site-packages")
    (libraries,) = (folder / "opt/fdbroker/lib").glob("python3*/site-packages")
    shutil.copytree(libraries, there, dirs_exist_ok=True, ignore=shutil.ignore_patterns("fdbroker", "__pycache__"))
    (ours,) = Path(LIBRARIES).glob("fdbroker-*.dist-info")
    shutil.copytree(ours, there / ours.name)
    return copy, there


BREAK = {
    "whole": (lambda there: None, ""),
    "a file is missing": (lambda there: next(there.glob("_prctl*.so")).unlink(), "lacks _prctl"),
    "no list of files": (
        lambda there: next(there.glob("python_prctl-*.dist-info/RECORD")).unlink(),
        "no list of the files of python-prctl",
    ),
    "a module does not load": (lambda there: (there / "prctl.py").write_text("import nothing"), "does not run"),
}


@pytest.mark.parametrize("how", BREAK)
def test_a_broken_environment_is_not_installed(copied, tmp_path, how):
    """The installation fails, says why, and leaves what an earlier one has installed as it was."""
    copy, there = copied
    breaking, said = BREAK[how]
    (tmp_path / "opt/fdbroker").mkdir(parents=True)
    (tmp_path / "opt/fdbroker/earlier").write_text("runs")
    kept = tmp_path / "kept"
    shutil.copytree(there, kept)
    try:
        breaking(there)
        done = subprocess.run([copy / "scripts/install", tmp_path], capture_output=True, text=True)
    finally:
        shutil.rmtree(there)
        kept.rename(there)
    assert done.returncode == (1 if said else 0), done.stderr
    assert said in done.stderr
    assert [file.name for file in (tmp_path / "opt").iterdir()] == ["fdbroker"]
    assert (tmp_path / "opt/fdbroker/earlier").exists() == bool(said)


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


def test_relative_folder(tmp_path):
    """A folder that is named from where somebody stands is that one for every file."""
    subprocess.run([CHECKOUT / "scripts/install", "below"], check=True, cwd=tmp_path)
    assert {file.name for file in (tmp_path / "below").iterdir()} == {"etc", "opt", "usr"}
    assert not (CHECKOUT / "below").exists()


def test_again(installed):
    """Installed again, it is the same, and the admin's policy is as it was."""
    folder, files = installed
    policy = folder / "etc/fdbroker/policy.yaml"
    policy.write_text("version: 1 # mine\n")
    assert install(folder) == files
    assert policy.read_text() == "version: 1 # mine\n"
