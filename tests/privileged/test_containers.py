"""docs/containers.md is true: what it shows is taken from it and run, by a plain user, with the runtimes themselves."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import harness
import pytest
from harness import ALICE, CLONE_NEWNET, GROUP, LIBC, MS_BIND, Raw, as_user, mount, running, unmount

from fdbroker.wire.worker import UNUSABLE

TOP = Path(__file__).resolve().parents[2]
TEXT = (TOP / "docs" / "containers.md").read_text()
EXAMPLE = TOP / "policy" / "examples" / "containers.yaml"
# <!-- run: NAME -->, a fence's language, its text
MARKED = re.compile(r"^<!-- run: ([\w.-]+) -->\n```([a-z]+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = {name: text for name, _, text in MARKED.findall(TEXT)}
PROGRAMS = ("unshare", "nsenter", "bwrap", "crun", "runc", "busybox", "ip", "ss")
CGROUPS = "/sys/fs/cgroup"


# ---- the document, without running anything


def test_every_command_and_program_that_is_shown_is_one_of_these():
    fences = re.findall(r"^```(sh|python|console)$", TEXT, re.MULTILINE)
    marked = [name for name, _, _ in MARKED.findall(TEXT)]
    assert len(fences) == len(marked) == len(BLOCKS)
    tools = {"nsenter", "bwrap", "bundle", "crun", "crun-hybrid", "runc", "enter"}
    recipe = {"server", "alias", "get"}
    sockets = {"server.py", "socket-server", "socket-client"}
    assert set(BLOCKS) == {"explain", "admin", "drop-in"} | tools | recipe | sockets


def test_the_rules_that_are_shown_are_the_examples():
    (rules,) = re.findall(r"^```yaml\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    assert rules in EXAMPLE.read_text()


def test_the_drop_in_is_put_in_its_place_as_it_says_itself():
    drop_in = (TOP / "units" / "fdbroker.service.d" / "namespaces.conf").read_text()
    for line in BLOCKS["drop-in"].splitlines():
        assert f"#   {line}\n" in drop_in


def test_the_reasons_that_are_shown_are_the_brokers():
    assert re.findall(r"^- (setns\(2\) would .*)$", TEXT, re.MULTILINE) == [why for why in UNUSABLE if why]


# ---- a machine with a bridge and a broker, and a user's place in it


def shown(name: str, **words: object) -> str:
    """A block of the document; each of `words` gives way to what it stands for there."""
    text = BLOCKS[name]
    for word, other in words.items():
        assert word in text
        text = text.replace(word, str(other))
    return text


class Place:
    """Where a user who is no more than a member of the group works. `home` is the user's."""

    def __init__(self, folder: Path, broker: harness.Broker):
        self.folder = folder
        self.home = folder / "home"
        self.broker = broker
        self.environment = {
            "PATH": f"{folder}/bin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "FDBROKER_SOCKET": broker.socket,
            "HOME": str(self.home),
        }
        self.user = {"user": ALICE, "group": ALICE, "extra_groups": [GROUP], "cwd": self.home}

    def run(self, name: str, **words: object) -> str:
        """What a block of the document prints when the user runs it."""
        result = self.finished(["sh", "-ec", shown(name, **words)])
        assert result.returncode == 0, result.stderr
        return result.stdout

    def finished(self, command: list[object], **more: str) -> subprocess.CompletedProcess[str]:
        """A program of the user's, with `more` in its environment."""
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
            env={**self.environment, **more},
            **self.user,
        )

    @contextlib.contextmanager
    def going_on(self, *command: object):
        """A program of the user's that does not end; it is killed with all that it started."""
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
            env=self.environment,
            **self.user,
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()

    @contextlib.contextmanager
    def inside(self):
        """The pid of a process in a new, connected namespace, and its address there."""
        entered = ("nsenter", "--net=/proc/self/fd/3", "sh", "-c", "ip -4 -brief address show dev eth0; exec sleep 60")
        made = ("unshare", "--user", "--map-root-user", "fdbroker", "open", "net:new", "--", *entered)
        with self.going_on(*made) as process:
            yield process.pid, address_in(process.stdout.readline())

    def granted(self) -> str:
        """The network namespace of the last grant, as its record has it."""
        return self.broker.records("granted")[-1]["FDBROKER_NAMESPACE"]


def address_in(line: str) -> str:
    (address,) = re.findall(r"\b(10\.88\.0\.\d+)/24\b", line)
    return address


def wait_until(condition):
    """The first result of `condition` that is true."""
    end = time.monotonic() + 10
    while not (result := condition()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return result


@contextlib.contextmanager
def only_cgroup2():
    """/sys/fs/cgroup as most machines have it."""
    if os.path.exists(f"{CGROUPS}/cgroup.controllers"):
        yield
        return
    mount("cgroup2", CGROUPS, "cgroup2")
    try:
        yield
    finally:
        unmount(CGROUPS)


@pytest.fixture(scope="module")
def place():
    harness.need_root()
    for program in PROGRAMS:
        if subprocess.run(["sh", "-c", f"command -v {program}"], capture_output=True).returncode != 0:
            harness.cannot(f"no {program}: sh scripts/test installs it")
    folder = Path(f"/mnt/containers-{os.getpid()}")
    folder.mkdir()
    mount("containers", str(folder), "tmpfs", 0, "mode=0755")
    try:
        # where every user can read it, wherever the checkout lies
        for source, name in ((TOP / "fdbroker", "program/fdbroker"), (sys.prefix, "environment")):
            (folder / name).mkdir(parents=True)
            mount(str(source), str(folder / name), "", MS_BIND)
        (folder / "bin").mkdir()
        command = folder / "bin/fdbroker"
        python = f"PYTHONPATH={folder}/program PYTHONDONTWRITEBYTECODE=1 exec {folder}/environment/bin/python"
        command.write_text(f'#!/bin/sh\n{python} -m fdbroker "$@"\n')
        command.chmod(0o755)
        (folder / "home").mkdir()
        os.chown(folder / "home", ALICE, ALICE)
        with harness.own_network(), only_cgroup2():
            subprocess.run(["sh", "-ec", BLOCKS["admin"]], check=True)
            policy = re.sub(r"\bcontainers(?=[:\]])", str(GROUP), EXAMPLE.read_text())
            with running(policy) as broker:
                one = Place(folder, broker)
                for needed in (["fdbroker", "--version"], ["unshare", "--user", "--map-root-user", "true"]):
                    result = one.finished(needed)
                    if result.returncode != 0:
                        harness.cannot(f"a plain user cannot run {' '.join(needed)}: {result.stderr}")
                yield one
    finally:
        unmount(str(folder))  # with what is mounted below
        folder.rmdir()


@pytest.fixture(scope="module")
def bundle(place):
    """The bundle, made as the document says, but from the checkout."""
    sample = place.home / "config.json"
    sample.write_bytes((TOP / "docs/bundle/config.json").read_bytes())
    place.run("bundle", **{"/usr/share/doc/fdbroker/docs/bundle/config.json": sample})


# ---- who can use what


def _could(address, resource, own):
    """Whether setns(2) works, and whether the broker said so."""
    if own:
        harness.become_root_of_user_namespace()
    with Raw(address) as client:
        (grant,) = client.ask(resource)["parameters"]["grants"]
        failed = LIBC.setns(client.descriptors[0], CLONE_NEWNET) != 0
        assert not failed or ctypes.get_errno() == errno.EPERM
        return [not failed, grant["usable"]]


@pytest.mark.parametrize("row", ["`net:NAME`", "`TYPE:pid:PID`, process in the machine's user namespace", "`TYPE:new`"])
def test_who_can_use_a_namespace_is_as_the_table_says(place, row):
    (line,) = re.findall(rf"^\| {re.escape(row)} \|.*\|$", TEXT, re.MULTILINE)
    cells = [cell.strip() for cell in line.strip("|").split("|")][2:]
    for cell, uid, own in zip(cells, (ALICE, ALICE, 0), (False, True, False), strict=True):
        process = subprocess.Popen(["sleep", "60"], user=uid, group=uid, extra_groups=[])
        which = {"name": "vpn-a"} if "NAME" in row else {"pid": process.pid} if "PID" in row else {"create": True}
        try:
            resource = {"namespace": {"type": "net", **which}}
            assert as_user(uid, [GROUP], _could, place.broker.socket, resource, own) == [cell == "yes"] * 2
        finally:
            process.kill()
            process.wait()


def test_explain_says_that_a_plain_program_cannot_use_it_and_what_it_could(place):
    said = place.run("explain", alice=ALICE, explain=f"explain --policy {place.broker.policy} --groups {GROUP}")
    assert f"usable: false: {UNUSABLE[1]}" in said
    assert "socket:net:vpn-a" in said


# ---- the runtimes


@pytest.mark.parametrize(
    ("tool", "leaks"), [("nsenter", True), ("bwrap", False), ("crun", False), ("crun-hybrid", False), ("runc", True)]
)
def test_a_runtimes_program_is_in_the_namespace_that_was_granted(place, bundle, tool, leaks):
    with contextlib.ExitStack() as mounts:
        if tool == "crun-hybrid":
            mount("hybrid", CGROUPS, "tmpfs")
            mounts.callback(unmount, CGROUPS)
            os.mkdir(f"{CGROUPS}/unified")
            mount("cgroup2", f"{CGROUPS}/unified", "cgroup2")
        *descriptors, entered = place.run(tool).splitlines()
    assert entered == place.granted()
    assert entered != os.readlink("/proc/self/ns/net")
    # what the document says of descriptors is what the program has, and no other one; no sandbox has the connection
    found = dict(re.findall(r" (\d+) -> (.*)$", "\n".join(descriptors), re.MULTILINE))
    connection = {number for number, what in found.items() if what.startswith("socket:")}
    assert len(connection) == (tool == "nsenter")
    assert found.keys() == {"0", "1", "2"} | ({"3"} if leaks else set()) | connection
    assert found.get("3", entered) == entered
    assert os.listdir(place.home / "state") == []


def test_a_container_of_ones_own_that_runs_is_entered(place):
    with place.inside() as (pid, _):
        assert place.run("enter", PID=pid).strip() == os.readlink(f"/proc/{pid}/ns/net")


# ---- end to end


def test_a_users_server_in_a_network_of_its_own_is_reached_from_the_host(place):
    with place.going_on("sh", "-ec", BLOCKS["server"]) as server:
        address = address_in(server.stdout.readline())
        assert f"alias fdbroker uid {ALICE} {address}" in host("alias").stdout
        answer = wait_until(lambda: host("get", ADDRESS=address).stdout)
        assert answer == "hello from inside\n"
    wait_until(lambda: not host("alias").stdout)


def host(name, **words):
    """A block of the document, run by the machine's root."""
    return subprocess.run(["sh", "-ec", shown(name, **words)], capture_output=True, text=True, timeout=30)


def listening():
    """The sockets in vpn-a that wait for connections, with what the kernel knows of each."""
    command = ["nsenter", "--net=/run/netns/vpn-a", "ss", "-Hltne"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_server_and_a_client_in_a_network_that_their_own_does_not_reach(place):
    (place.home / "server.py").write_text(BLOCKS["server.py"])
    with place.going_on("sh", "-ec", BLOCKS["socket-server"]):
        line = wait_until(listening)
        with socket.socket() as outside:
            assert outside.connect_ex(("127.0.0.1", 80)) == errno.ECONNREFUSED
        assert "0.0.0.0:80 " in line
        # "Whose traffic it is"
        worker = harness.status_of(place.broker.pids["worker"])["Uid"].split()[0]
        assert f" uid:{worker} " in line
        client = [place.folder / "environment/bin/python", "-B", "-c", BLOCKS["socket-client"]]
        result = place.finished(client, PYTHONPATH=f"{place.folder}/program")
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith("HTTP/1.0 200 ")
        assert result.stdout.replace("\r", "").endswith(BLOCKS["server.py"])


# ---- what is not promised


def _speaks_ipv4(address):
    with Raw(address) as client, socket.create_server(("127.0.0.1", 0)):
        client.ask({"socket": {"namespace": "vpn-a", "family": "inet6"}})
        with socket.socket(fileno=client.take()) as sock:
            return sock.connect_ex(("::ffff:127.0.0.1", 9))


def test_an_inet6_socket_carries_ipv4(place):
    assert as_user(ALICE, [GROUP], _speaks_ipv4, place.broker.socket) in (errno.ECONNREFUSED, errno.EINPROGRESS)


def test_a_new_uts_namespace_has_the_brokers_host_name(place):
    inner = "hostname inside; fdbroker open uts:new -- nsenter --uts=/proc/self/fd/3 hostname"
    result = place.finished(["unshare", "--user", "--map-root-user", "--uts", "sh", "-ec", inner])
    assert result.stdout.strip() == socket.gethostname(), result.stderr


def _within(pid):
    descriptor = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
    assert LIBC.setns(descriptor, CLONE_NEWNET) == 0
    os.close(descriptor)


def _reach(sender, receiver, address):
    """What TCP gets from one to the other at once, and whether a datagram arrives by way of the host."""
    _within(receiver)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server, socket.create_server((address, 9)):
        server.bind((address, 9))
        server.settimeout(10)
        _within(sender)
        # who does not answer at once is not there
        for name, value in (("mcast_solicit", 1), ("retrans_time_ms", 50)):
            Path(f"/proc/sys/net/ipv4/neigh/eth0/{name}").write_text(str(value))
        with socket.socket() as client:
            at_once = client.connect_ex((address, 9))
        harness.ip("route", "add", f"{address}/32", "via", "10.88.0.1")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.sendto(b"by the host", (address, 9))
        return [at_once, server.recv(100).decode()]


def test_isolated_namespaces_do_not_reach_each_other_but_by_a_host_that_forwards(place):
    forward = Path("/proc/sys/net/ipv4/ip_forward")
    before = forward.read_text()
    forward.write_text("1")
    try:
        with place.inside() as (sender, _), place.inside() as (receiver, address):
            found = as_user(0, [], _reach, sender, receiver, address)
            assert found == [errno.EHOSTUNREACH, "by the host"]
    finally:
        forward.write_text(before)


def test_who_owns_a_namespace_may_take_the_bridges_address(place):
    with place.inside() as (pid, _):
        enter = ["nsenter", f"--user=/proc/{pid}/ns/user", f"--net=/proc/{pid}/ns/net", "--preserve-credentials"]
        result = place.finished([*enter, "ip", "address", "add", "10.88.0.1/24", "dev", "eth0"])
        assert result.returncode == 0, result.stderr
