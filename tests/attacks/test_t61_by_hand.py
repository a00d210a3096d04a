"""T61: the service is started by hand: root's terminal, /dev/tty, a socket in a folder below somebody's."""

from __future__ import annotations

import os
import stat
import subprocess
import sys

import pytest
from harness import ALICE, EVERYONE_NULL, MEM, Raw, descriptors_of, folder, node, outcome, running

from fdbroker.errors import PolicyError
from fdbroker.launcher import listen
from fdbroker.policy.compile import load_policy


def test_the_children_of_a_service_on_a_terminal_do_not_have_it(root):
    """Neither as their own, which /dev/tty would be, nor to read what is typed there; Ctrl-C is the launcher's."""
    master, slave = os.openpty()
    with folder() as where:
        (where / "policy.yaml").write_text(EVERYONE_NULL)
        words = ["serve", "--policy", str(where / "policy.yaml"), "--socket", str(where / "socket")]
        on_terminal = (
            "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
            "os.execv(sys.executable, [sys.executable, '-I', '-m', 'fdbroker', *sys.argv[1:]])"
        )
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", on_terminal, *words], stdin=slave, stdout=slave, stderr=slave, cwd="/"
        )
        try:
            said = b""
            while b"serving with" not in said:
                said += os.read(master, 1000)
            assert _terminal_of(process.pid) != 0
            children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
            assert len(children) == 4  # opener, keeper, inbox, witness
            for pid in map(int, children):
                assert _terminal_of(pid) == 0
                assert os.getsid(pid) == pid
                for name, what in descriptors_of(pid).items():
                    if what.startswith("/dev/pts/"):
                        flags = int(_lines(f"/proc/{pid}/fdinfo/{name}")["flags"], 8)
                        assert flags & os.O_ACCMODE == os.O_WRONLY, name
            os.write(master, b"\x03")
            assert process.wait(60) == 0
        finally:
            process.kill()
            process.wait()
            os.close(master)
            os.close(slave)


def _terminal_of(pid):
    """The number of its controlling terminal, 0 for none: proc_pid_stat(5)."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return int(file.read().rpartition(b") ")[2].split()[4])


def _lines(path):
    with open(path) as file:
        return {name: value.strip() for name, _, value in (line.partition(":") for line in file)}


@pytest.mark.parametrize("path", ["/dev/plain/x", "/dev/meant/x"])
def test_the_terminal_of_the_opener_fits_no_rule_whatever_its_name(dev, path):
    """Also where the rule says `dangerous: true`."""
    node(path, os.makedev(5, 0), 0o666, kind=stat.S_IFCHR)
    node("/dev/plain/null", MEM["null"], 0o666)
    policy = 'version: 1\neveryone: {devices: [{path: "/dev/plain/*"}, {path: "/dev/meant/*", dangerous: true}]}\n'
    with running(policy) as broker, Raw(broker.socket) as client:
        reply = client.open(path)
        assert outcome(reply) == "NotWhatItWas"
        assert "the terminal of the process that opens it" in reply["parameters"]["reason"]
        assert outcome(client.open("/dev/plain/null")) == "granted"


@pytest.mark.parametrize("rule", ["path: /dev/tty", 'path: /dev/mine, device: "5:0"'])
def test_a_rule_for_the_terminal_of_who_opens_it_is_an_error(tmp_path, rule):
    findings = _findings(tmp_path, f"everyone: {{devices: [{{{rule}, dangerous: true}}]}}")
    assert [(one.line, one.what) for one in findings] == [
        (2, "/dev/tty (5:0), which is the terminal of the process that opens it")
    ]


def test_a_deny_rule_for_it_is_none(tmp_path):
    assert not _findings(tmp_path, "deny: [{everyone: true, devices: [/dev/tty]}]")


def _findings(where, text):
    path = where / "policy.yaml"
    path.write_text(f"version: 1\n{text}\n")
    try:
        load_policy(str(path), trusted=False)
    except PolicyError as error:
        return error.findings
    return []


def test_it_is_refused_by_a_glob_as_well_and_not_listed(dev):
    node("/dev/tty", os.makedev(5, 0), 0o666)
    with running('version: 1\neveryone: {devices: [{path: "/dev/tt?", dangerous: true}]}\n') as broker:
        with Raw(broker.socket) as client:
            assert outcome(client.open("/dev/tty")) == "NotWhatItWas"
            assert client.call("io.fdbroker.Broker.List")["parameters"]["resources"] == []


def _others_folder(where):
    os.chown(where, ALICE, ALICE)


def _anybodys_folder(where):
    where.chmod(0o777)


@pytest.mark.parametrize("spoil", [_others_folder, _anybodys_folder])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_every_folder_above_the_socket_must_be_roots_alone(root, spoil, level):
    """Or its owner moves a folder away, and puts one with a socket of its own in the place."""
    with folder() as where:
        levels = [where / "a/b/c", where / "a/b", where / "a"]
        levels[0].mkdir(parents=True)
        listener = listen.bound(str(levels[0] / "socket"), 0o660, None)
        listener.remove()
        listener.sock.close()
        spoil(levels[level])
        with pytest.raises(listen.CannotListen, match=f"^{levels[level]} must .*, or others could replace the socket"):
            listen.bound(str(levels[0] / "socket"), 0o660, None)
        assert not (levels[0] / "socket").exists()


def test_in_a_sticky_folder_others_cannot_replace_it(root):
    with folder() as where:
        (where / "tmp").mkdir()
        (where / "tmp").chmod(0o1777)
        listener = listen.bound(str(where / "tmp/socket"), 0o660, None)
        listener.remove()
        listener.sock.close()


def test_a_link_on_the_way_is_refused_with_the_plain_name(root):
    """Somebody's link could lead clients elsewhere, once the service has bound its socket."""
    with folder() as where:
        (where / "real").mkdir()
        (where / "link").symlink_to("real")
        os.chown(where / "link", ALICE, ALICE, follow_symlinks=False)
        for name in ("link/socket", "link/../real/socket"):
            with pytest.raises(listen.CannotListen, match=f": write {where}/real/socket$"):
                listen.bound(f"{where}/{name}", 0o660, None)


def test_a_folder_that_is_not_there_is_said_with_the_cure(root):
    with folder() as where, pytest.raises(listen.CannotListen, match=f"make it: install -d -m 0755 {where}/none$"):
        listen.bound(f"{where}/none/socket", 0o660, None)
