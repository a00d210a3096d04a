"""T19: a hostile environment, and a socket path that is something else."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
import time

import pytest
from harness import EVERYONE_NULL, ask, folder, running

EVIL = {
    "PYTHONSTARTUP": "/tmp/evil.py",
    "PYTHONINSPECT": "1",
    "PYTHONHOME": "/nonexistent",
    "LD_LIBRARY_PATH": "/tmp/evil",
    "TMPDIR": "/nonexistent",
    "LISTEN_FDS": "1",
    "LISTEN_PID": "1",
    "NOTIFY_SOCKET": "/nonexistent/notify",
    "WATCHDOG_USEC": "x",
    "IFS": "x",
    "PATH": "/tmp/evil",
}


def test_serve_takes_nothing_from_it_and_passes_nothing_on(dev, tmp_path):
    evil = tmp_path / "evil"
    evil.mkdir()
    for name in ("yaml", "socket", "fdbroker", "prctl", "sitecustomize", "usercustomize"):
        (evil / f"{name}.py").write_text("import os; os._exit(99)\n")
    environment = {**EVIL, "PYTHONPATH": str(evil), "PYTHONUSERBASE": str(evil)}
    with running(EVERYONE_NULL, environment=environment) as broker:
        assert ask(broker.socket, "/dev/null") == "granted"
        for name in ("opener", "inbox"):
            with open(f"/proc/{broker.pids[name]}/environ") as text:
                names = {entry.partition("=")[0] for entry in text.read().split("\0") if entry}
            assert names == {"PATH", "LANG"}


def test_the_plain_command_starts_itself_isolated(dev, tmp_path):
    evil = tmp_path / "yaml.py"
    evil.write_text("import os; os._exit(99)\n")
    command = [sys.executable, "-m", "fdbroker", "serve", "--check", "--policy", "/nonexistent"]
    result = subprocess.run(command, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, cwd="/")
    assert result.returncode == 78, result.stderr
    assert "cannot be read" in result.stderr


def test_no_arguments_at_all_is_survived():
    libc = ctypes.CDLL(None)
    child = os.fork()
    if child == 0:
        os.dup2(os.open("/dev/null", os.O_RDWR), 0)
        os.dup2(0, 1)
        os.dup2(0, 2)
        empty = (ctypes.c_char_p * 1)(None)
        libc.execve(sys.executable.encode(), empty, empty)
        os._exit(98)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) in (0, 1, 64, 98)


def _serve(where, path):
    (where / "policy.yaml").write_text(EVERYONE_NULL)
    return subprocess.run(
        [
            sys.executable,
            "-I",
            "-m",
            "fdbroker",
            "serve",
            "--policy",
            str(where / "policy.yaml"),
            "--socket",
            str(path),
        ],
        capture_output=True,
        text=True,
        timeout=20,
    )


@pytest.mark.parametrize("kind", ["file", "link to a file", "dangling link", "folder", "alices socket", "fifo"])
def test_what_is_in_the_sockets_way_is_left_alone(root, kind):
    with folder() as where:
        path = where / "socket"
        other = where / "precious"
        other.write_text("precious")
        if kind == "file":
            path.write_text("mine")
        elif kind == "link to a file":
            path.symlink_to(other)
        elif kind == "dangling link":
            path.symlink_to(where / "nowhere")
        elif kind == "folder":
            path.mkdir()
        elif kind == "fifo":
            os.mkfifo(path)
        else:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.bind(str(path))
            os.chown(path, 50001, 50001)
        before = os.lstat(path)
        result = _serve(where, path)
        assert result.returncode == 78, result.stderr
        assert "in the way" in result.stderr
        assert "Traceback" not in result.stderr
        after = os.lstat(path)
        assert (before.st_ino, before.st_mode) == (after.st_ino, after.st_mode)
        assert other.read_text() == "precious"


def test_an_abstract_or_relative_address_is_refused(root):
    with folder() as where:
        for address in ("@fdbroker", "relative/socket"):
            result = _serve(where, address)
            assert result.returncode == 78
            assert "abstract" in result.stderr


def test_a_folder_that_others_may_write_to_is_refused(root):
    with folder() as where:
        open_folder = where / "open"
        open_folder.mkdir()
        open_folder.chmod(0o777)
        result = _serve(where, open_folder / "socket")
        assert result.returncode == 78
        assert "replace the socket" in result.stderr


def test_a_second_broker_at_the_same_address_is_refused_and_a_stale_socket_is_not(dev):
    with running(EVERYONE_NULL) as broker:
        with folder() as where:
            result = _serve(where, broker.socket)
            assert result.returncode == 69
            assert "already" in result.stderr
        assert ask(broker.socket, "/dev/null") == "granted"
    with folder() as where:
        path = where / "socket"
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(path))
        (where / "policy.yaml").write_text(EVERYONE_NULL)
        process = subprocess.Popen(
            [
                sys.executable,
                "-I",
                "-m",
                "fdbroker",
                "serve",
                "--policy",
                str(where / "policy.yaml"),
                "--socket",
                str(path),
            ],
            stderr=subprocess.DEVNULL,
        )
        for _ in range(250):
            try:
                assert ask(str(path), "/dev/null") == "granted"
                break
            except OSError:
                time.sleep(0.02)
        else:
            raise AssertionError("it did not come up")
        process.terminate()
        assert process.wait(60) == 0
        assert not path.exists()
