"""`fdbroker open RESOURCE -- COMMAND`: what the command has open, and what its environment says of it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
from harness import MEM, command, node, running

from fdbroker.cli import handover

POLICY = 'version: 1\neveryone: {devices: [{path: "/dev/pool/*", access: rw}]}\nlimits: {connections: 1}\n'
FDBROKER = (sys.executable, "-I", "-m", "fdbroker")
SHOW = """
import json, os, sys
found = {}
for name in os.listdir("/proc/self/fd"):
    try:
        found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    except OSError:
        pass
said = {name: value for name, value in os.environ.items() if name.startswith("LISTEN_")}
connection = os.environ["FDBROKER_CONNECTION"]
print(json.dumps({"open": found, "said": said, "pid": os.getpid(), "connection": connection}), flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def broker():
    from harness import need_root, private_dev

    need_root()
    with private_dev():
        for name in ("a", "b:rw", "c"):
            node(f"/dev/pool/{name}", MEM["zero"])
        with running(POLICY) as made:
            yield made


@pytest.fixture(autouse=True)
def only_one(broker):
    """The policy lets one connection in: each test must have its command ended."""
    yield
    broker.wait_idle()


# in the process that becomes `fdbroker open`: descriptors as its caller would have left them, a limit, a pid
PREPARE = """
import json, os, resource, sys
prepare = json.loads(sys.argv[1])
for number, path in prepare["leaks"].items():
    opened = os.open(path, os.O_RDONLY)
    os.dup2(opened, int(number))
    if opened == int(number):
        os.set_inheritable(opened, True)
    else:
        os.close(opened)
if prepare["limit"]:
    resource.setrlimit(resource.RLIMIT_NOFILE, (prepare["limit"], 4096))
if os.environ.get("LISTEN_PID") == "mine":
    os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.argv[2], sys.argv[2:])
"""


def shown(broker, *words, leaks=None, limit=0, environment=(), while_it_runs=lambda: None):
    """The view of a command that is run by `fdbroker open`, or the exit code and standard error of that."""
    variables = {"PATH": os.environ["PATH"], "FDBROKER_SOCKET": broker.socket, **dict(environment)}
    prepare = json.dumps({"leaks": leaks or {}, "limit": limit})
    process = subprocess.Popen(
        [sys.executable, "-I", "-c", PREPARE, prepare, *FDBROKER, "open", *words, "--", sys.executable, "-c", SHOW],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=variables,
    )
    with process:
        line = process.stdout.readline()
        while_it_runs()
        _, err = process.communicate("")
    if process.returncode:
        return process.returncode, err
    said = json.loads(line)
    said["open"] = {int(number): what for number, what in said["open"].items() if not what.startswith("/proc/")}
    assert said["said"]["LISTEN_PID"] == str(said["pid"]) == str(process.pid)
    return said


def at(*numbers):
    """What the caller left open there: files that differ."""
    return dict(zip(numbers, ("/etc/passwd", "/etc/group", "/etc/hosts", "/etc/fstab"), strict=False))


def connection(found):
    """The number of the one socket that a command has, outside of what LISTEN_FDS counts."""
    (number,) = [number for number, what in found["open"].items() if what.startswith("socket:")]
    assert found["connection"] == str(number)
    return number


def test_the_granted_ones_come_from_3_on_and_nothing_of_the_callers_is_closed(broker):
    leaks = at(9, 40)
    found = shown(broker, "/dev/pool/a", "/dev/pool/c", leaks=leaks)
    at_3 = {3: "/dev/pool/a", 4: "/dev/pool/c"}
    standard = {number: found["open"].pop(number) for number in (0, 1, 2)}
    assert len(standard) == 3
    kept = connection(found)
    del found["open"][kept]
    assert found["open"] == {**at_3, **leaks}
    assert found["said"]["LISTEN_FDS"] == "2"
    assert found["said"]["LISTEN_FDNAMES"] == "/dev/pool/a:/dev/pool/c"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({}, "unknown:unknown"),
        ({"LISTEN_FDNAMES": "first:second"}, "first:second"),
        ({"LISTEN_FDNAMES": "first"}, "first:unknown"),
        ({"LISTEN_FDNAMES": ":second:third"}, "unknown:second"),
    ],
)
@pytest.mark.parametrize("close", [(), ("--close",)])
def test_those_that_are_passed_to_this_very_process_stay_and_ours_come_behind(broker, names, expected, close):
    environment = {"LISTEN_FDS": "2", "LISTEN_PID": "mine", "LISTEN_PIDFDID": "7", **names}
    passed = at(3, 4, 9)
    found = shown(broker, *close, "/dev/pool/a:rw", environment=environment, leaks=passed)
    assert [found["open"][number] for number in (3, 4, 5)] == [passed[3], passed[4], "/dev/pool/a"]
    assert found["open"].get(9) == (None if close else passed[9])
    assert found["said"]["LISTEN_FDS"] == "3"
    assert found["said"]["LISTEN_FDNAMES"] == f"{expected}:/dev/pool/a"
    assert found["said"]["LISTEN_PIDFDID"] == "7"


@pytest.mark.parametrize("pid", ["1", "", "x"])
def test_a_stray_listen_fds_is_ignored_and_removed(broker, pid):
    environment = {"LISTEN_FDS": "2", "LISTEN_PID": pid, "LISTEN_FDNAMES": "first:second", "LISTEN_PIDFDID": "7"}
    found = shown(broker, "/dev/pool/a", environment=environment)
    assert found["open"][3] == "/dev/pool/a"
    del found["said"]["LISTEN_PID"]
    assert found["said"] == {"LISTEN_FDS": "1", "LISTEN_FDNAMES": "/dev/pool/a"}


def test_a_number_that_is_the_callers_is_not_taken_from_it(broker):
    code, err = shown(broker, "/dev/pool/a", "/dev/pool/c", leaks=at(4))
    assert code == 64
    assert "descriptor 4 is open already, and COMMAND's come there: they begin at 3" in err
    found = shown(broker, "--close", "/dev/pool/a", "/dev/pool/c", leaks=at(4))
    assert found["open"][4] == "/dev/pool/c"
    code, err = shown(broker, "/dev/pool/a", environment={"LISTEN_FDS": "1", "LISTEN_PID": "mine"})
    assert code == 64
    assert "LISTEN_FDS is 1, and descriptor 3 is not open" in err


def test_close_closes_all_else_also_above_the_limit(broker):
    leaks = at(9, 40, 99, 700)
    found = shown(broker, "--close", "/dev/pool/a", limit=100, leaks=leaks)
    kept = connection(found)
    assert sorted(found["open"]) == [0, 1, 2, 3, kept]
    assert 10 < kept < 100
    found = shown(broker, "/dev/pool/a", limit=100, leaks=leaks)
    assert {number: found["open"][number] for number in leaks} == leaks


def test_the_connection_lives_as_long_as_the_command_and_is_none_that_scripts_choose(broker):
    def refused():
        assert command(broker.socket, "ping")[0] == 75

    found = shown(broker, "/dev/pool/a", while_it_runs=refused)
    assert connection(found) >= 512
    broker.wait_idle()
    assert command(broker.socket, "ping")[0] == 0
    found = shown(broker, "--close", "/dev/pool/a", while_it_runs=refused)
    assert connection(found) >= 512


def test_the_command_gets_the_signals_that_python_ignores(broker):
    words = (*FDBROKER, "open", "--socket", broker.socket, "/dev/pool/a", "--", "grep", "SigIgn", "/proc/self/status")
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    ignored = int(said.split()[1], 16)
    assert not [number for number in (signal.SIGPIPE, signal.SIGXFSZ) if ignored >> (number - 1) & 1]


def test_a_command_that_cannot_be_run_is_126_or_127(broker):
    for program, code in (("/nonexistent", 127), ("/etc/passwd", 126)):
        words = (*FDBROKER, "open", "--socket", broker.socket, "/dev/pool/a", "--", program)
        result = subprocess.run(words, capture_output=True, text=True, check=False)
        assert (result.returncode, result.stdout) == (code, ""), result.stderr
        assert program in result.stderr


def test_what_is_passed_is_counted_for_this_very_process_alone():
    own = str(os.getpid())
    for count, pid, expected in (("3", own, 3), ("3", "1", 0), ("x", own, 0), ("-1", own, 0), ("\u0663", own, 0)):
        assert handover.count_passed({"LISTEN_FDS": count, "LISTEN_PID": pid}) == expected
    assert handover.count_passed({"LISTEN_FDS": "3"}) == handover.count_passed({"LISTEN_PID": own}) == 0


def test_serve_warns_of_a_missing_group_also_with_a_stray_listen_fds(broker, monkeypatch, tmp_path):
    """Only a socket that was really passed to it has its group already."""
    group = tmp_path / "group"
    group.write_text("root:x:0:\n")
    from harness import MS_BIND, mount, unmount

    mount(str(group), "/etc/group", "none", MS_BIND)
    try:
        with running(POLICY, environment={"PATH": os.environ["PATH"], "LISTEN_FDS": "1", "LISTEN_PID": "1"}) as stray:
            assert "there is no group fdbroker" in stray.text()
    finally:
        unmount("/etc/group")


def test_a_detached_connection_is_the_callers(broker):
    import fdbroker

    client = fdbroker.connect(broker.socket)
    with client, socket.socket(fileno=client.detach()) as kept:
        assert kept.getpeername() == broker.socket
