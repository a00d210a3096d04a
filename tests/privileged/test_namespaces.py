"""Namespaces and sockets inside them, on the real kernel: granted to a plain uid, and every refusal."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from harness import (
    ALICE,
    BOB,
    CLONE_NEWNET,
    CLONE_NEWUSER,
    GROUP,
    LIBC,
    MS_BIND,
    Raw,
    as_user,
    become_root_of_user_namespace,
    ip,
    mount,
    need_root,
    outcome,
    own_network,
    private_dev,
    running,
    status_of,
    unmount,
)

from fdbroker.kernel import namespaces
from fdbroker.terms import NAMESPACE_TYPES, NEW_NAMESPACE_TYPES

POLICY = f"""
version: 1
everyone:
  devices: [{{path: /dev/null, access: rw}}]
  namespaces:
    - {{type: net, name: "vpn-*"}}
    - {{type: [{", ".join(NAMESPACE_TYPES)}], of: caller}}
    - {{type: [{", ".join(NEW_NAMESPACE_TYPES)}], create: true}}
  sockets:
    - {{namespace: "vpn-*", bind: [443]}}
    - {{namespace: "four", families: [inet], types: [stream]}}
groups:
  {GROUP}:
    namespaces:
      - {{type: net, create: true, link: {{bridge: br0, address: 10.88.0.0/29}}}}
deny:
  - {{users: ["{BOB}"], namespaces: [{{type: net, name: vpn-b}}], sockets: [{{namespace: vpn-b}}]}}
"""
NOTHING_LEFT = {"error": "io.fdbroker.Broker.Denied"}


def named(name):
    return {"namespace": {"type": "net", "name": name}}


def of(pid, kind="net"):
    return {"namespace": {"type": kind, "pid": pid}}


def new(kind="net"):
    return {"namespace": {"type": kind, "create": True}}


def in_namespace(name, **more):
    return {"socket": {"namespace": name, **more}}


@pytest.fixture(scope="module")
def machine():
    need_root()
    with own_network(), private_dev():
        ip("netns", "add", "vpn-a")
        ip("netns", "add", "vpn-b")
        ip("netns", "add", "four")
        ip("link", "add", "br0", "type", "bridge")
        ip("addr", "add", "10.88.0.1/29", "dev", "br0")
        ip("link", "set", "br0", "up")
        for name in ("vpn-a", "vpn-b", "four"):
            ip("-n", name, "link", "set", "lo", "up")
        yield


@pytest.fixture(scope="module")
def shared(machine):
    with running(POLICY) as broker:
        yield broker


@pytest.fixture
def broker(shared):
    """The broker, which has afterwards the descriptors that it had before, and no child of the worker is left."""
    yield shared
    shared.wait_idle()
    end = time.monotonic() + 60
    while subprocess.run(["pgrep", "-P", str(shared.pids["worker"])], capture_output=True).stdout:
        assert time.monotonic() < end
        time.sleep(0.02)


def grant_of(reply):
    assert outcome(reply) == "granted", reply
    (grant,) = reply["parameters"]["grants"]
    return grant


def asked(address, *resources):
    """Ask once: the outcome, and of each grant what was said and which namespace it is."""
    with Raw(address) as client:
        reply = client.ask(*resources)
        inodes = [os.fstat(number).st_ino for number in client.descriptors]
        return [outcome(reply), reply["parameters"].get("grants"), inodes]


@contextlib.contextmanager
def process_of(uid, *command, groups=()):
    """A process of that user."""
    process = subprocess.Popen(command or ("sleep", "60"), user=uid, group=uid, extra_groups=list(groups))
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


# ---- by name


def test_a_named_namespace_is_that_namespace_and_said_to_be_of_no_use_to_a_plain_program(broker):
    result, grants, inodes = as_user(ALICE, [], asked, broker.socket, named("vpn-a"))
    assert result == "granted"
    assert inodes == [os.stat("/run/netns/vpn-a").st_ino]
    assert grants[0]["resource"] == {"namespace": {"type": "net", "name": "vpn-a"}, "access": "ro"}
    assert grants[0]["usable"] is False
    assert "EPERM" in grants[0]["why"]
    record = broker.records("granted")[-1]
    assert record["FDBROKER_NAMESPACE"] == f"net:[{inodes[0]}]"
    assert record["FDBROKER_RESOURCE"] == "net:vpn-a"
    assert record["FDBROKER_UID"] == str(ALICE)


def _enters(address, resource, kind):
    with Raw(address) as client:
        grant = grant_of(client.ask(resource))
        failed = LIBC.setns(client.descriptors[0], namespaces.CLONE[kind]) != 0
        return [grant["usable"], ctypes.get_errno() if failed else 0]


def test_what_is_said_of_its_use_is_what_the_kernel_says(broker):
    assert as_user(ALICE, [], _enters, broker.socket, named("vpn-a"), "net") == [False, 1]
    assert as_user(0, [], _enters, broker.socket, named("vpn-a"), "net") == [True, 0]


def test_a_name_that_no_rule_names_is_denied_whether_it_exists_or_not(broker):
    for name in ("four", "none", "../vpn-a", "vpn-a/", ".", "vpn-\n", "x" * 256, "new"):
        assert as_user(ALICE, [], asked, broker.socket, named(name))[0] == "Denied"
    assert as_user(ALICE, [], asked, broker.socket, named("vpn-none"))[0] == "NoSuchResource"


def test_a_deny_rule_wins_for_namespace_and_socket(broker):
    for resource in (named("vpn-b"), in_namespace("vpn-b"), in_namespace("vpn-b", bind=443)):
        assert as_user(BOB, [], asked, broker.socket, resource)[0] == "Denied"
        assert as_user(ALICE, [], asked, broker.socket, resource)[0] == "granted"


def listed_names(client):
    """The named namespaces that the next List offers."""
    listed = client.call("io.fdbroker.Broker.List")["parameters"]["resources"]
    return [one["resource"]["namespace"]["name"] for one in listed if "name" in one["resource"].get("namespace", ())]


@pytest.mark.parametrize("kind", ["file", "link", "uts", "fifo", "folder"])
def test_what_is_no_net_namespace_is_not_opened(broker, kind):
    path = "/run/netns/vpn-odd"
    match kind:
        case "link":
            os.symlink("/run/netns/vpn-a", path)
        case "fifo":
            os.mkfifo(path)
        case "folder":
            os.mkdir(path)
        case _:
            os.close(os.open(path, os.O_CREAT, 0))  # as ip-netns(8) makes it, and leaves it when it is interrupted
    if kind == "uts":
        mount("/proc/self/ns/uts", path, "", MS_BIND)
    reason = "it is a uts namespace, not a net namespace" if kind == "uts" else "no namespace is mounted there"
    try:
        with Raw(broker.socket) as client:
            for asked_for in (named("vpn-odd"), in_namespace("vpn-odd")):
                reply = client.ask(asked_for)
                assert outcome(reply) == "NotWhatItWas", reply
                assert reply["parameters"]["reason"] == reason
            if kind != "uts":
                assert listed_names(client) == ["vpn-a", "vpn-b"]
    finally:
        if kind == "uts":
            unmount(path)
        os.rmdir(path) if kind == "folder" else os.unlink(path)


def test_a_folder_that_others_may_write_to_is_not_believed(broker):
    os.chmod("/run/netns", 0o777)
    try:
        assert asked(broker.socket, named("vpn-a"))[0] == "NotWhatItWas"
    finally:
        os.chmod("/run/netns", 0o755)


# ---- of the caller's processes


@pytest.mark.parametrize("kind", NAMESPACE_TYPES)
def test_a_namespace_of_a_process_of_the_caller(broker, kind):
    with process_of(ALICE) as pid:
        result, grants, inodes = as_user(ALICE, [], asked, broker.socket, of(pid, kind))
        assert result == "granted"
        assert inodes == [os.stat(f"/proc/{pid}/ns/{kind}").st_ino]
        assert grants[0]["usable"] is False


def test_every_process_that_is_not_the_callers_is_denied_and_the_client_cannot_tell_why(broker):
    zombie = subprocess.Popen(["true"], user=ALICE, group=ALICE)
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    answers = []
    with process_of(BOB) as of_bob, process_of(0) as of_root:
        for pid in (of_bob, of_root, 1, 2, zombie.pid, 4194304, os.getpid()):
            with Raw(broker.socket):
                answers.append(as_user(ALICE, [], _whole_answer, broker.socket, of(pid)))
    zombie.wait()
    assert answers == [answers[0]] * len(answers)
    assert answers[0] == "io.fdbroker.Broker.Denied"
    # root's own processes are root's, but for the first one
    assert asked(broker.socket, of(1))[0] == "Denied"


def _whole_answer(address, resource):
    with Raw(address) as client:
        reply = client.ask(resource)
        assert reply["parameters"] == {"resource": {**resource, "access": "ro"}}
        return reply["error"]


@pytest.mark.parametrize(("mode", "owner"), [(0o4755, (0, 0)), (0o4755, (BOB, 0)), (0o2755, (0, 0))])
def test_a_setuid_or_setgid_program_that_the_caller_started_is_not_the_callers(broker, mode, owner):
    program = f"{broker.folder}/sleep"
    with open("/bin/sleep", "rb") as original, open(program, "wb") as copy:
        copy.write(original.read())
    os.chown(program, *owner)
    os.chmod(program, mode)
    with process_of(ALICE, program, "60") as pid:
        assert as_user(ALICE, [], asked, broker.socket, of(pid))[0] == "Denied"
    os.chmod(program, 0o755)
    with process_of(ALICE, program, "60") as pid:
        assert as_user(ALICE, [], asked, broker.socket, of(pid))[0] == "granted"


def test_a_process_with_capabilities_is_not_the_callers_but_one_in_a_user_namespace_of_its_own_is(broker):
    command = ("setpriv", "--reuid", str(ALICE), "--regid", str(ALICE), "--clear-groups")
    with process_of(0, *command, "--inh-caps=+sys_admin", "--ambient-caps=+sys_admin", "sleep", "60") as pid:
        _await_program(pid, "sleep")
        assert as_user(ALICE, [], asked, broker.socket, of(pid))[0] == "Denied"
    with process_of(ALICE, "unshare", "-Urn", "sleep", "60") as pid:
        _await_program(pid, "sleep")
        result, _, inodes = as_user(ALICE, [], asked, broker.socket, of(pid))
        assert (result, inodes) == ("granted", [os.stat(f"/proc/{pid}/ns/net").st_ino])


def test_a_process_in_many_groups_is_read_to_its_end(broker):
    groups = list(range(100_000, 102_000))
    with process_of(ALICE, groups=groups) as pid:
        assert as_user(ALICE, groups, asked, broker.socket, of(pid))[0] == "granted"


def _await_program(pid, name):
    end = time.monotonic() + 60
    while status_of(pid)["Name"] != name:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_namespace_that_belongs_to_another_user_is_not_given_out(broker):
    """A process of ALICE's uid in a network namespace that BOB's user namespace owns."""
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setresgid(BOB, BOB, BOB)
        os.setresuid(BOB, BOB, BOB)
        LIBC.prctl(4, 1, 0, 0, 0)
        LIBC.unshare(CLONE_NEWUSER | CLONE_NEWNET)
        os.write(ready[1], b"x")
        os.read(go[0], 1)
        os.setresgid(1, 1, 1)
        os.setresuid(1, 1, 1)
        LIBC.prctl(4, 1, 0, 0, 0)
        os.write(ready[1], b"x")
        signal.pause()
    try:
        os.read(ready[0], 1)
        for name in ("uid_map", "gid_map"):
            with open(f"/proc/{child}/{name}", "w") as file:
                file.write(f"0 {BOB} 1\n1 {ALICE} 1\n")
        os.write(go[1], b"x")
        os.read(ready[0], 1)
        assert status_of(child)["Uid"].split() == [str(ALICE)] * 4
        assert as_user(ALICE, [], asked, broker.socket, of(child))[0] == "Denied"
        assert as_user(ALICE, [], asked, broker.socket, of(child, "user"))[0] == "Denied"
        assert as_user(ALICE, [], asked, broker.socket, of(child, "uts"))[0] == "granted"  # the machine's own
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for descriptor in (*ready, *go):
            os.close(descriptor)


def _as_first_process(address):
    """In a pid namespace of its own, of which this process is number 1."""
    reading, writing = os.pipe()
    become_root_of_user_namespace()
    LIBC.unshare(namespaces.CLONE["pid"])
    child = os.fork()
    if child == 0:
        result = asked(address, of(os.getpid(), "pid"))
        os.write(writing, json.dumps([os.getpid(), result]).encode())
        os._exit(0)
    os.waitpid(child, 0)
    return json.loads(os.read(reading, 4096))


def test_a_pid_is_what_the_callers_own_pid_namespace_calls_it(broker):
    pid, (result, grants, inodes) = as_user(ALICE, [], _as_first_process, broker.socket)
    assert (pid, result) == (1, "granted")
    assert inodes != [os.stat("/proc/self/ns/pid").st_ino]
    assert grants[0]["usable"] is True


# ---- new ones


def _make_and_look(address, kind):
    become_root_of_user_namespace()
    with Raw(address) as client:
        grant = grant_of(client.ask(new(kind)))
        descriptor = client.descriptors[0]
        user = namespaces.owner(descriptor)
        with open("/proc/self/ns/user") as own:
            same = os.fstat(user).st_ino == os.fstat(own.fileno()).st_ino
        os.close(user)
        if kind == "mnt":  # its own root directory must be its own to change
            LIBC.unshare(0x200)
        failed = LIBC.setns(descriptor, namespaces.CLONE[kind])
        name = "time_for_children" if kind == "time" else kind
        entered = os.stat(f"/proc/self/ns/{name}").st_ino == os.fstat(descriptor).st_ino
        return [grant["usable"], same, failed, entered or ctypes.get_errno()]


@pytest.mark.parametrize("kind", NEW_NAMESPACE_TYPES)
def test_a_new_namespace_is_the_callers_own_and_it_can_go_there(broker, kind):
    assert as_user(ALICE, [], _make_and_look, broker.socket, kind) == [True, True, 0, True]


def _loopback(address):
    become_root_of_user_namespace()
    with Raw(address) as client:
        grant_of(client.ask(new()))
        assert LIBC.setns(client.descriptors[0], CLONE_NEWNET) == 0
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        return [name for _, name in socket.if_nameindex()]


def test_lo_is_up_in_a_new_net_namespace(broker):
    assert as_user(ALICE, [], _loopback, broker.socket) == ["lo"]


def _own_view(address):
    become_root_of_user_namespace()
    assert LIBC.unshare(namespaces.CLONE["mnt"]) == 0
    mount("mine", "/mnt", "tmpfs")
    open("/mnt/mine", "w").close()
    with Raw(address) as client:
        grant_of(client.ask(new("mnt")))
        assert LIBC.setns(client.descriptors[0], namespaces.CLONE["mnt"]) == 0
    return os.listdir("/mnt")


def test_a_new_mnt_namespace_is_a_copy_of_what_the_caller_sees(shared):
    # its socket is below /mnt, which the caller hides from itself: so it connects by another way
    where = "/run/fdbroker-test-socket"
    os.close(os.open(where, os.O_CREAT | os.O_EXCL))
    mount(shared.socket, where, "", MS_BIND)
    try:
        assert as_user(ALICE, [], _own_view, where) == ["mine"]
    finally:
        unmount(where)
        os.unlink(where)


def test_a_program_without_a_user_namespace_of_its_own_gets_one_that_it_cannot_use_and_is_told(broker):
    assert as_user(ALICE, [], _enters, broker.socket, new(), "net") == [False, 1]


def test_types_that_cannot_be_made_and_forms_that_mean_nothing_are_refused(broker):
    with Raw(broker.socket) as client:
        assert outcome(client.ask(new("pid"))) == "Denied"
        assert outcome(client.ask(new("user"))) == "Denied"
        assert outcome(client.ask({"namespace": {"type": "uts", "name": "vpn-a"}})) == "Denied"
        for resource in (
            {"namespace": {"type": "net"}},
            {"namespace": {"type": "net", "name": "vpn-a", "pid": 5}},
            {"namespace": {"type": "net", "name": ""}},
            {"namespace": {"type": "net", "create": False}},
            {"namespace": {"type": "net", "pid": 0}},
            {"namespace": {"type": "net", "pid": -1}},
            {"namespace": {"type": "net", "pid": True}},
            {"namespace": {"type": "net", "pid": 4194305}},
            {"namespace": {"type": "net", "uid": 0, "create": True}},
            {"namespace": {"type": "other", "create": True}},
            {"namespace": "net"},
            {"namespace": {"type": "net", "create": True}, "access": "rw"},
            {"namespace": {"type": "net", "create": True}, "device": "/dev/null"},
            {"socket": {"namespace": ""}},
            {"socket": {"namespace": "vpn-a", "bind": 0}},
            {"socket": {"namespace": "vpn-a", "bind": 65536}},
            {"socket": {"namespace": "vpn-a", "family": "unix"}},
            {"socket": {"namespace": "vpn-a", "type": "raw"}},
            {"socket": {"namespace": "vpn-a"}, "access": "ro"},
            {},
        ):
            assert client.ask(resource)["error"] == "org.varlink.service.InvalidParameter", resource


# ---- connected


def _server_inside(address, port):
    """A server in a new, connected namespace; it says its address, answers once, and ends."""
    become_root_of_user_namespace()
    with Raw(address) as client:
        grant_of(client.ask(new()))
        assert LIBC.setns(client.descriptors[0], CLONE_NEWNET) == 0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("10.88.0.1", 9))
        own = probe.getsockname()[0]
    with socket.create_server((own, 8080)) as server, socket.create_connection(("10.88.0.1", port), timeout=30) as home:
        server.settimeout(10)
        home.sendall(own.encode() + b"\n")
        connection, _ = server.accept()
        with connection:
            connection.sendall(b"hello from inside")
    return own


@pytest.mark.parametrize(("uid", "owner"), [(ALICE, str(ALICE)), (60001, "others")])
def test_a_connected_namespace_is_reached_from_the_host_and_leaves_nothing(broker, uid, owner):
    with socket.create_server(("10.88.0.1", 0)) as home:
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                as_user(uid, [GROUP], _server_inside, broker.socket, home.getsockname()[1])
                os._exit(0)
            os._exit(1)
        home.settimeout(10)
        connection, _ = home.accept()
        with connection, connection.makefile() as file:
            own = file.readline().strip()
            port = json.loads(ip("-j", "-d", "link", "show", "master", "br0"))[0]
            assert port["ifalias"] == f"fdbroker uid {owner} {own}"
            assert port["linkinfo"]["info_slave_data"]["isolated"] is True
            assert port["linkinfo"]["info_slave_data"]["guard"] is True
            assert port["linkinfo"]["info_slave_data"]["learning"] is False
            assert port["linkinfo"]["info_slave_data"]["flood"] is False
            with socket.create_connection((own, 8080), timeout=30) as inside:
                assert inside.recv(100) == b"hello from inside"
        assert os.waitpid(child, 0)[1] == 0
    end = time.monotonic() + 10
    while json.loads(ip("-j", "link", "show", "master", "br0")):
        assert time.monotonic() < end
        time.sleep(0.02)


def _fill_network(address):
    become_root_of_user_namespace()
    with Raw(address) as client:
        return [outcome(client.ask(new())) for _ in range(6)]


def test_each_has_an_address_of_its_own_until_the_network_is_full(broker):
    """10.88.0.0/29 has six, of which the bridge has one."""
    assert as_user(ALICE, [GROUP], _fill_network, broker.socket) == ["granted"] * 5 + ["OpenFailed"]


def test_a_bridge_that_believes_whoever_is_on_it_is_warned_about(machine):
    rule = "{type: net, create: true, link: {bridge: br0, address: 10.88.0.0/29}}"
    text = f"version: 1\neveryone: {{namespaces: [{rule}]}}\n"
    path = "/proc/sys/net/ipv6/conf/br0/accept_ra"
    with open(path) as file:
        before = file.read()
    try:
        for value, warned in (("1", True), ("0", False)):
            with open(path, "w") as file:
                file.write(value)
            with running(text) as broker:
                assert ("accept_ra=0" in broker.text()) is warned
    finally:
        with open(path, "w") as file:
            file.write(before)


# ---- sockets


def _talk(address, server_of, client_of):
    """A server and a client, each by a socket that this process could not have made."""
    with Raw(address) as asking:
        grant_of(asking.ask(server_of))
        grant_of(asking.ask(client_of))
        server, client = (socket.socket(fileno=number) for number in asking.descriptors)
        asking.descriptors.clear()
    with server, client:
        server.settimeout(10)
        client.settimeout(10)
        there = ("::1" if server.family == socket.AF_INET6 else "127.0.0.1", server.getsockname()[1])
        if server.type == socket.SOCK_STREAM:
            server.listen()
            client.connect(there)
            accepted, _ = server.accept()
            with accepted:
                accepted.sendall(b"through")
        else:
            client.connect(there)
            client.send(b"?")
            server.sendto(b"through", server.recvfrom(10)[1])
        return [client.recv(100).decode(), there[1]]


@pytest.mark.parametrize("family", ["inet", "inet6"])
@pytest.mark.parametrize("kind", ["stream", "dgram"])
def test_a_plain_program_talks_in_a_network_that_its_own_cannot_reach(broker, family, kind):
    resource = in_namespace("vpn-a", family=family, type=kind)
    bound = in_namespace("vpn-a", family=family, type=kind, bind=443)
    assert as_user(ALICE, [], _talk, broker.socket, bound, resource) == ["through", 443]


def _reach(address):
    """From vpn-a to a server of this process's own namespace, where nobody of vpn-a comes."""
    with socket.create_server(("127.0.0.1", 0)) as server, Raw(address) as asking:
        grant_of(asking.ask(in_namespace("vpn-a")))
        with socket.socket(fileno=asking.take()) as sock:
            sock.settimeout(30)
            return sock.connect_ex(server.getsockname())


def test_a_socket_lives_in_the_namespace_and_nowhere_else(broker):
    assert as_user(ALICE, [], _reach, broker.socket) == 111


def test_family_type_and_port_are_what_the_rule_says(broker):
    for resource, result in (
        (in_namespace("four"), "granted"),
        (in_namespace("four", family="inet6"), "Denied"),
        (in_namespace("four", type="dgram"), "Denied"),
        (in_namespace("four", bind=443), "Denied"),
        (in_namespace("vpn-a", bind=80), "Denied"),
        (in_namespace("vpn-a", bind=443), "granted"),
        (in_namespace("vpn-none"), "NoSuchResource"),
    ):
        assert as_user(ALICE, [], asked, broker.socket, resource)[0] == result, resource


def test_a_port_that_is_taken_is_the_kernels_error(broker):
    with Raw(broker.socket) as first, Raw(broker.socket) as second:
        grant_of(first.ask(in_namespace("vpn-a", bind=443)))
        with socket.socket(fileno=first.take()) as server:
            server.listen()
            reply = second.ask(in_namespace("vpn-a", bind=443))
        assert (outcome(reply), reply["parameters"]["errno"]) == ("OpenFailed", 98)


# ---- together with others


def test_devices_namespaces_and_sockets_come_in_the_order_asked_for_or_not_at_all(broker):
    with Raw(broker.socket) as client:
        wanted = [
            {"device": "/dev/null"},
            named("vpn-a"),
            in_namespace("vpn-a"),
            {"device": "/dev/null"},
            named("vpn-b"),
        ]
        reply = client.ask(*wanted)
        what = [os.readlink(f"/proc/self/fd/{number}").split(":")[0] for number in client.descriptors]
        assert what == ["/dev/null", "/run/netns/vpn-a", "socket", "/dev/null", "/run/netns/vpn-b"]
        assert [grant["fileDescriptor"] for grant in reply["parameters"]["grants"]] == [0, 1, 2, 3, 4]
    with Raw(broker.socket) as client:
        reply = client.ask(*wanted, named("vpn-none"))
        assert (outcome(reply), client.descriptors) == ("NoSuchResource", [])
        assert reply["parameters"]["resource"]["namespace"]["name"] == "vpn-none"


def test_a_client_that_goes_while_the_worker_works_leaves_nothing_behind(broker):
    for _ in range(20):
        with Raw(broker.socket) as client:
            client.send_call("io.fdbroker.Broker.Open", {"resources": [named("vpn-a"), new(), in_namespace("vpn-a")]})


def test_devices_never_wait_for_the_worker_and_what_waits_is_answered_when_it_goes_on(broker):
    os.kill(broker.pids["worker"], signal.SIGSTOP)
    try:
        with Raw(broker.socket) as client, Raw(broker.socket) as other:
            client.send_call("io.fdbroker.Broker.Open", {"resources": [named("vpn-a")]})
            for _ in range(50):
                assert outcome(other.open("/dev/null")) == "granted"
            os.kill(broker.pids["worker"], signal.SIGCONT)
            assert outcome(client.reply()) == "granted"
    finally:
        os.kill(broker.pids["worker"], signal.SIGCONT)


def test_a_killed_worker_fails_its_question_and_is_there_again(machine):
    with running(POLICY) as broker:
        for _ in range(3):
            os.kill(broker.pids["worker"], signal.SIGSTOP)
            with Raw(broker.socket) as client:
                client.send_call("io.fdbroker.Broker.Open", {"resources": [new()]})
                _until_it_is_asked(broker)
                os.kill(broker.pids["worker"], signal.SIGKILL)
                reply = client.reply()
                assert (outcome(reply), reply["parameters"]["errno"]) == ("OpenFailed", 104)
                assert outcome(client.ask(new())) == "granted"
            broker.pids["worker"] = broker.worker()
        assert broker.text().count("ended with signal 9 (SIGKILL); it is started again") == 3


def _until_it_is_asked(broker):
    """Requests are taken in turn: when one that came later is answered, the worker was asked."""
    with Raw(broker.socket) as client:
        assert outcome(client.open("/dev/null")) == "granted"


def test_the_holder_is_a_process_of_the_service_and_its_end_is_the_services(machine):
    with running(POLICY) as broker:
        broker.expected_code = None
        os.kill(broker.pids["namespaces"], signal.SIGKILL)
        assert broker.process.wait(60) == 70
        assert "the namespaces worker's holder ended with signal 9" in broker.text()


def test_without_such_rules_there_is_no_worker_and_a_reload_that_needs_one_is_refused(machine):
    with running("version: 1\neveryone: {devices: [{path: /dev/null}]}\n") as broker:
        assert "namespaces" not in broker.pids
        broker.policy.write_text(POLICY)
        broker.process.send_signal(signal.SIGHUP)
        broker.wait_for("NOT reloaded")
        assert "the namespaces worker" in broker.text()
        assert asked(broker.socket, named("vpn-a"))[0] == "Denied"


def test_a_reload_that_needs_more_of_the_worker_is_refused_and_one_that_needs_less_is_not(machine):
    some = "version: 1\neveryone: {namespaces: [{type: net, name: vpn-a}]}\n"
    with running(some) as broker:
        broker.policy.write_text(POLICY)
        broker.process.send_signal(signal.SIGHUP)
        broker.wait_for("CAP_SYS_ADMIN in the namespaces worker")
        broker.reload(some.replace("vpn-a", "vpn-b"))
        assert asked(broker.socket, named("vpn-a"))[0] == "Denied"
        assert asked(broker.socket, named("vpn-b"))[0] == "granted"


def test_the_list_has_what_may_be_had_and_changes_with_it(broker):
    with Raw(broker.socket) as client:
        client.send_call("io.fdbroker.Broker.List", more=True)
        listed = client.reply()["parameters"]["resources"]
        names = [
            one["resource"]["namespace"]["name"] for one in listed if "name" in one["resource"].get("namespace", ())
        ]
        assert names == ["vpn-a", "vpn-b"]
        assert sum(one["resource"].get("namespace", {}).get("create", False) for one in listed) == 6
        assert {
            one["resource"]["namespace"]["pid"] for one in listed if "pid" in one["resource"].get("namespace", ())
        } == {os.getpid()}
        ip("netns", "add", "vpn-c")
        try:
            while "vpn-c" not in str(client.reply()):
                pass
        finally:
            ip("netns", "del", "vpn-c")


def test_a_name_that_the_command_line_reads_as_something_else_is_not_offered(machine):
    names = ["new", "pid:7", "one,two", "newer"]
    policy = f'version: 1\nusers: {{{os.getuid()}: {{namespaces: [{{type: net, name: "*"}}]}}}}\n'
    for name in names:
        ip("netns", "add", name)
    try:
        with running(policy) as made, Raw(made.socket) as client:
            assert listed_names(client) == ["four", "newer", "vpn-a", "vpn-b"]
    finally:
        for name in names:
            ip("netns", "del", name)


def test_a_namespace_that_is_mounted_a_while_after_its_file_came_is_offered_then(broker):
    """And one that is left without its mount is not, nor are names that mean something else on the command line."""
    paths = [f"/run/netns/{name}" for name in ("vpn-late", "vpn-one,two")]
    with Raw(broker.socket) as client, Raw(broker.socket) as watching:
        watching.send_call("io.fdbroker.Broker.List", more=True)
        watching.reply()
        for path in paths:
            os.close(os.open(path, os.O_CREAT, 0))
        try:
            time.sleep(0.5)  # the first listing after the change is over
            assert listed_names(client) == ["vpn-a", "vpn-b"]
            for path in paths:
                mount("/run/netns/vpn-a", path, "", MS_BIND)
            assert "vpn-late" in str(watching.reply())
            assert listed_names(client) == ["vpn-a", "vpn-b", "vpn-late"]
            for path in paths:
                unmount(path)
            assert listed_names(client) == ["vpn-a", "vpn-b"]
        finally:
            for path in paths:
                os.unlink(path)


# ---- by the command line


def _explained(policy, resource):
    result = subprocess.run(
        [sys.executable, "-I", "-m", "fdbroker", "policy", "explain", "--json", "--policy", policy, resource],
        capture_output=True,
        text=True,
    )
    return [result.returncode, json.loads(result.stdout)[0] if result.stdout else result.stderr]


def test_explain_says_whether_it_would_be_of_use(shared):
    code, said = _explained(str(shared.policy), "net:vpn-a")
    assert (code, said["usable"], said["why"]) == (0, True, "")
    result = subprocess.run(
        [
            *(sys.executable, "-I", "-m", "fdbroker", "policy", "explain", "--policy", str(shared.policy)),
            *("--user", str(ALICE), "net:vpn-a", "net:new", "socket:net:vpn-a"),
        ],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("usable: false: setns(2) would fail with EPERM") == 2
    assert "a socket inside it needs no right: socket:net:vpn-a" in result.stdout
    for resource, change in (
        ("net:other", 'namespaces: [{type: net, name: "other"}]'),
        ("socket:net:vpn-a,bind=80", "`families`, `types` or `bind`"),
        ("socket:net:other,inet6", 'sockets: [{namespace: "other", families: [inet6], types: [stream]}]'),
    ):
        code, said = _explained(str(shared.policy), resource)
        assert code == 77
        assert change in said["change"]
