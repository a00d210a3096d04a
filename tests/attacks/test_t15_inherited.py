"""T15: a child inherits descriptors that it does not need."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from harness import EVERYONE_NULL, Raw, descriptors_of, folder, outcome, running


def _kinds(pid):
    return sorted(what.split(":")[0] for what in descriptors_of(pid).values())


def test_the_children_have_exactly_what_they_need(dev):
    leak = os.open("/etc/passwd", os.O_RDONLY)
    os.set_inheritable(leak, True)
    try:
        with running(EVERYONE_NULL) as broker:
            opener, keeper, inbox = (descriptors_of(broker.pids[name]) for name in ("opener", "keeper", "inbox"))
            for what in (opener, keeper, inbox):
                assert not [one for one in what.values() if "passwd" in one]
            # stdin, stdout, log; three links, listener, its reserve, epoll, one for a policy's place and one for
            # what threads have opened, /dev, /proc twice, /sys/dev
            assert len(opener) == 15, opener
            assert _kinds(broker.pids["opener"]).count("socket") == 5
            # three links; no client's socket, and no policy once it is read; /dev and /sys/dev cannot be read by theirs
            log = str(broker.log)
            kept = ["/dev", "/dev/null", "/dev/null", "/sys/dev", log, "anon_inode", "anon_inode", *["socket"] * 3]
            assert _kinds(broker.pids["keeper"]) == sorted(kept)
            for number, what in keeper.items():
                assert what not in ("/dev", "/sys/dev") or _flags(broker.pids["keeper"], number) & os.O_PATH
            # stdin, stdout, log; three links, epoll
            assert len(inbox) == 7, inbox
            # stdin, stdout, log; one link
            assert _kinds(_witness(broker)) == ["/dev/null", "/dev/null", str(broker.log), "socket"]
            with Raw(broker.socket) as client:
                assert outcome(client.open("/dev/null")) == "granted"
                # who lists gives the keeper nothing more; of a connection it has no socket
                assert outcome(client.call("io.fdbroker.Broker.List")) == "granted"
                assert _kinds(broker.pids["keeper"]) == sorted(kept)
    finally:
        os.close(leak)


# a shell that has left something open, as it starts the service
LEAKING = """
import os, resource, sys
leak = os.open("/etc/passwd", os.O_RDONLY)
for number in (60, 700):
    os.dup2(leak, number)
os.close(leak)
resource.setrlimit(resource.RLIMIT_NOFILE, (100, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
from fdbroker.cli import main
sys.exit(main())
"""


def test_what_the_service_was_started_with_reaches_no_child(dev):
    """Also above the soft limit, where it had been opened before that limit was set."""
    policy = EVERYONE_NULL.replace("{devices:", "{namespaces: [{type: uts, create: true}], devices:")
    with running(policy, program=("-c", LEAKING)) as broker:
        assert set(broker.pids) == {"launcher", "opener", "keeper", "inbox", "witness", "namespaces", "worker"}
        found = {
            name: [what for what in descriptors_of(pid).values() if what == "/etc/passwd"]
            for name, pid in broker.pids.items()
        }
        assert len(found.pop("launcher")) == 2
        assert not any(found.values()), found


def _flags(pid, number):
    """How it was opened: proc_pid_fdinfo(5)."""
    lines = Path(f"/proc/{pid}/fdinfo/{number}").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("flags:")).split()[1], 8)


def _witness(broker):
    """The pid of the child that judges user namespaces."""
    command = ["pgrep", "-P", str(broker.process.pid), "-f", r"fdbroker\.witness"]
    return int(subprocess.run(command, capture_output=True, check=True).stdout)


def test_a_command_gets_the_granted_descriptors_and_no_others(dev):
    """With --close: beside them the connection alone, which is for the leases."""
    leak = os.open("/etc/passwd", os.O_RDONLY)
    os.set_inheritable(leak, True)
    try:
        with running(EVERYONE_NULL) as broker:
            result = subprocess.run(
                [
                    *(
                        sys.executable,
                        "-I",
                        "-m",
                        "fdbroker",
                        "open",
                        "--socket",
                        broker.socket,
                        "--close",
                        "/dev/null",
                        "/dev/null",
                    ),
                    *(
                        "--",
                        "sh",
                        "-c",
                        "ls /proc/$$/fd | tr '\\n' ' '; echo $LISTEN_FDS $LISTEN_FDNAMES $$ $LISTEN_PID",
                    ),
                ],
                capture_output=True,
                text=True,
                pass_fds=(leak,),
            )
        assert result.returncode == 0, result.stderr
        words = result.stdout.split()
        assert words[:5] == ["0", "1", "2", "3", "4"]
        assert "2" in words
        assert "/dev/null:/dev/null" in words
        assert words[-1] == words[-2]
        numbers = set(words[: words.index("2", 5)])
        # sh itself may keep one for its script
        assert not [one for one in numbers if one.isdecimal() and int(one) == leak]
    finally:
        os.close(leak)


def test_few_descriptors_and_a_full_standard_output_are_no_fault(dev):
    with running(EVERYONE_NULL + "limits: {unread_grants: 100}\n") as broker:
        fdbroker = [sys.executable, "-I", "-m", "fdbroker"]
        command = ["prlimit", "--nofile=60:60", *fdbroker, "open", "--socket", broker.socket, *["/dev/null"] * 30]
        result = subprocess.run([*command, "--", "sh", "-c", "echo $LISTEN_FDS"], capture_output=True, text=True)
        assert (result.returncode, result.stdout) == (0, "30\n"), result.stderr
        for arguments in (["list"], ["ping"], ["open", "/dev/null"]):
            with open("/dev/full", "w") as full:
                command = [*fdbroker, arguments[0], "--socket", broker.socket, *arguments[1:]]
                result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
            assert "Traceback" not in result.stderr
            assert result.returncode in (0, 71), (arguments, result.stderr)


def test_the_folder_helper_leaves_nothing():
    with folder() as where:
        assert where.is_dir()
    assert not where.exists()
