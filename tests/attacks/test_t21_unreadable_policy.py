"""T21: a policy file that cannot be used is skipped."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from harness import EVERYONE_NULL, Broker, Raw, folder, outcome, running

GOOD = "version: 1\n"


def _broken(where, kind):
    """A drop-in that cannot be used."""
    drop_ins = where / "policy.d"
    drop_ins.mkdir(exist_ok=True)
    path = drop_ins / "50-broken.yaml"
    if kind == "syntax":
        path.write_text("version: [")
    elif kind == "unknown key":
        path.write_text("version: 1\nusrs: {}\n")
    elif kind == "dangling link":
        path.symlink_to(where / "nowhere")
    elif kind == "somebody's link":
        (where / "real").write_text(GOOD)
        path.symlink_to(where / "real")
        os.chown(path, 50001, 50001, follow_symlinks=False)
    elif kind == "link to somebody's":
        (where / "real").write_text(GOOD)
        os.chown(where / "real", 50001, 50001)
        path.symlink_to(where / "real")
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "writable":
        path.write_text(GOOD)
        path.chmod(0o666)
    elif kind == "somebody's":
        path.write_text(GOOD)
        os.chown(path, 50001, 50001)
    elif kind == "somebody's folder":
        path.write_text(GOOD)
        os.chown(drop_ins, 50001, 50001)
    elif kind == "not utf-8":
        path.write_bytes(b"version: 1 # \xff\n")
    elif kind == "empty":
        path.write_text("")
    elif kind == "failing test":
        path.write_text("version: 1\ntests: [{as: {user: 50001}, open: /dev/zero, expect: allow}]\n")
    return path


KINDS = [
    "syntax",
    "unknown key",
    "dangling link",
    "somebody's link",
    "link to somebody's",
    "folder",
    "fifo",
    "writable",
    "somebody's",
    "somebody's folder",
    "not utf-8",
    "empty",
    "failing test",
]


@pytest.mark.parametrize("kind", KINDS)
def test_the_service_does_not_start_with_it(root, kind):
    with folder() as where:
        (where / "policy.yaml").write_text(EVERYONE_NULL)
        path = _broken(where, kind)
        result = subprocess.run(
            [
                *(sys.executable, "-I", "-m", "fdbroker", "serve", "--policy"),
                str(where / "policy.yaml"),
                "--socket",
                str(where / "s"),
            ],
            capture_output=True,
            text=True,
            timeout=20,
        )
        assert result.returncode == 78, result.stderr
        assert str(path) in result.stderr
        assert "Traceback" not in result.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_a_reload_with_it_fails_whole_and_the_old_policy_stays(dev, kind):
    with running(EVERYONE_NULL) as broker, Raw(broker.socket) as client:
        path = _broken(broker.folder, kind)
        broker.reload("version: 1\n")  # which alone would deny everything
        assert "NOT reloaded" in broker.text()
        assert str(path) in broker.text()
        assert outcome(client.open("/dev/null")) == "granted"


def test_a_symlink_of_roots_is_followed_at_the_start_and_in_a_reload(dev):
    """Also to a folder that the launcher, once confined, reads for that reason alone."""
    with folder() as elsewhere, folder() as where:
        (elsewhere / "null").touch(0o644)
        (where / "policy.yaml").symlink_to(elsewhere / "null")
        broker = Broker(where, EVERYONE_NULL)  # which writes the policy through the link
        try:
            broker.wait_ready()
            with Raw(broker.socket) as client:
                assert outcome(client.open("/dev/null")) == "granted"
                broker.reload(GOOD)
                assert (elsewhere / "null").read_text() == GOOD
                assert "NOT reloaded" not in broker.text()
                assert outcome(client.open("/dev/null")) == "Denied"
            assert broker.stop() == 0
        finally:
            broker.process.kill()
            broker.process.wait()


def test_drop_ins_add_up_in_order_of_name(dev):
    with running(GOOD) as broker, Raw(broker.socket) as client:
        drop_ins = broker.folder / "policy.d"
        drop_ins.mkdir()
        (drop_ins / "10-null.yaml").write_text(EVERYONE_NULL)
        (drop_ins / "20-zero.yaml").write_text("version: 1\neveryone: {devices: [{path: /dev/zero}]}\n")
        (drop_ins / ".ignored.yaml").write_text("version: [")
        (drop_ins / "ignored.yaml.dpkg-new").write_text("version: [")
        assert outcome(client.open("/dev/null", "/dev/zero")) == "Denied"
    with folder() as where:
        (where / "policy.d").mkdir()
        (where / "policy.d" / "10.yaml").write_text(EVERYONE_NULL + "limits: {connections: 5}\n")
        (where / "policy.d" / "20.yaml").write_text("version: 1\nlimits: {connections: 7}\n")
        (where / "policy.yaml").write_text("version: 1\nlimits: {connections: 3}\n")
        from fdbroker.policy.compile import load_policy

        policy = load_policy(str(where / "policy.yaml"), trusted=True).policy
        assert policy.limits["connections"] == 7
        assert policy.everyone[0].where == f"{where}/policy.d/10.yaml:2"
