"""Inside the machine: namespaces and sockets from the installed service, with the shipped units and their drop-in.

Who asks is a plain user: each asks in a forked process of its own, which has that uid and no capability.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import grp
import hashlib
import json
import os
import pwd
import signal
import socket
import stat
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from steps import (
    GROUP,
    MEMBER,
    OTHER,
    POLICY,
    as_user,
    exposure,
    make_node,
    open_in,
    outcome,
    records,
    report,
    role,
    run,
    said,
    show,
    start_with,
    status_of,
    wait_for,
    watched,
)

import fdbroker
from fdbroker.errors import FdbrokerError

LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_DUMPABLE = 4
CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWNET = 0x20000, 0x10000000, 0x40000000
NS_GET_USERNS = 0xB701

PYTHON = "/opt/fdbroker/bin/python3"
SOCKET = "/run/fdbroker/socket"
DROP_IN = Path("/usr/share/doc/fdbroker/namespaces.conf")
IN_FORCE = Path("/etc/systemd/system/fdbroker.service.d/namespaces.conf")
MAY_CONNECT = grp.getgrnam("fdbroker").gr_gid
LINKED = 4200  # the group whose new net namespaces are connected
ZERO = "/dev/lab/zero"

TYPES = ("net", "mnt", "pid", "user", "uts", "ipc", "cgroup", "time")
# what a new one is entered with
NSENTER = {"net": "--net", "mnt": "--mount", "uts": "--uts", "ipc": "--ipc", "cgroup": "--cgroup", "time": "--time"}

DEVICES = f"""\
version: 1
groups:
  {GROUP}:
    devices: [{{path: {ZERO}, access: rw, class: mem, device: "1:5"}}]
"""
RULES = f"""\
{DEVICES}\
    namespaces:
      - {{type: net, name: "vpn-*"}}
      - {{type: [{", ".join(TYPES)}], of: caller}}
      - {{type: [{", ".join(NSENTER)}], create: true}}
    sockets:
      - {{namespace: "vpn-*", bind: [443]}}
  {LINKED}:
    namespaces:
      - {{type: net, create: true, link: {{bridge: br0, address: 10.88.0.0/24}}}}
"""
DATA = os.urandom(1 << 20)

# In a connected namespace: says what its interfaces are, gives back to one client what that sends, and ends.
SERVER = """\
import socket, subprocess
interfaces = subprocess.run(["ip", "-j", "addr"], capture_output=True, text=True, check=True).stdout
with socket.create_server(("0.0.0.0", 8080)) as server:
    print(" ".join(interfaces.split()), flush=True)
    with server.accept()[0] as client:
        data = b"".join(iter(lambda: client.recv(65536), b""))
        client.sendall(data)
"""


# ---- the service


def children(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def processes() -> dict[str, int]:
    """The pids by name: "holder" is the child that the launcher started, "worker" the holder's own child."""
    found = {"launcher": int(show("MainPID")["MainPID"])}
    for pid in children(found["launcher"]):
        name = role(pid)
        found["holder" if name == "namespaces" else name] = pid
    if "holder" in found:
        (found["worker"],) = wait_for("the worker", lambda: children(found["holder"]))
    return found


def has_open(pid: int, what: str) -> bool:
    """Whether a process has a descriptor of that sort."""
    with contextlib.suppress(FileNotFoundError):
        return any(os.readlink(entry.path) == what for entry in os.scandir(f"/proc/{pid}/fd"))
    return False


def counts() -> dict[str, int]:
    """How many descriptors each of them has open."""
    return {name: open_in(pid) for name, pid in processes().items()}


def confined() -> dict[str, dict[str, str]]:
    return {name: status_of(pid) for name, pid in processes().items()}


def ip(*words: str) -> Any:
    """What an `ip` command says, which must succeed."""
    done = run("ip", "-json", *words, check=True)
    return json.loads(done.stdout) if done.stdout.strip() else None


# ---- those who ask


def begin(groups: list[int], action: Callable[..., Any], *arguments: Any, uid: int = MEMBER) -> Callable[[], Any]:
    """Start `action` as this user, in a process of its own; the function that is returned waits for its result."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            os.setgroups([*groups, MAY_CONNECT])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            LIBC.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # as a program that this user has started
            with os.fdopen(writing, "w") as out:
                try:
                    json.dump({"result": action(*arguments)}, out)
                except BaseException:
                    json.dump({"raised": traceback.format_exc()}, out)
        finally:
            os._exit(0)
    os.close(writing)

    def finish() -> Any:
        with os.fdopen(reading) as said:
            text = said.read()
        os.waitpid(child, 0)
        found = json.loads(text)
        if "raised" in found:
            raise RuntimeError(found["raised"])
        return found["result"]

    return finish


def member(action: Callable[..., Any], *arguments: Any) -> Any:
    """What `action` returns for the member of the group that has the rules."""
    return begin([GROUP], action, *arguments)()


def become_root_of_user_namespace(more: int = 0) -> None:
    """What `unshare -Ur` does: a user namespace of one's own, and in it all capabilities."""
    uid, gid = os.getuid(), os.getgid()
    if LIBC.unshare(CLONE_NEWUSER | more) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        Path(f"/proc/self/{name}").write_text(text)


def asked(resource: str, access: str = "ro") -> dict[str, Any]:
    """What the broker says, and which namespace the descriptor is."""
    try:
        with fdbroker.connect() as client, client.open(resource, access) as got:
            found = {"inode": os.fstat(got.fileno()).st_ino, "usable": got.usable, "why": got.why, "rule": got.rule}
            if access == "rw":
                found["read"] = os.read(got.fileno(), 8).hex()
            return found
    except FdbrokerError as error:
        return {"refused": type(error).__name__, "number": getattr(error, "number", 0)}


class Raw:
    """A connection that shows the answer as it comes; whatever descriptor comes with it is closed."""

    def __init__(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(30)
        self.sock.connect(SOCKET)

    def send(self, resource: dict[str, Any]) -> None:
        call = {"method": "io.fdbroker.Broker.Open", "parameters": {"resources": [resource]}}
        self.sock.sendall(json.dumps(call).encode() + b"\0")

    def answer(self) -> dict[str, Any]:
        data = b""
        while not data.endswith(b"\0"):
            piece, numbers, _, _ = socket.recv_fds(self.sock, 65536, 8)
            for number in numbers:
                os.close(number)
            if not piece:
                raise ConnectionError("the broker hung up")
            data += piece
        return json.loads(data[:-1])

    def ask(self, resource: dict[str, Any]) -> dict[str, Any]:
        self.send(resource)
        return self.answer()


def give_back(sock: socket.socket) -> None:
    """Send whatever comes back to where it comes from."""
    with sock:
        sock.settimeout(20)
        data = b"".join(iter(lambda: sock.recv(65536), b""))
        sock.sendall(data)


def exchange(sock: socket.socket) -> bool:
    """Send DATA; whether the same comes back."""
    sock.settimeout(20)
    sock.sendall(DATA)
    sock.shutdown(socket.SHUT_WR)
    back = b"".join(iter(lambda: sock.recv(65536), b""))
    return hashlib.sha256(back).digest() == hashlib.sha256(DATA).digest()


@contextlib.contextmanager
def inside(name: str) -> Iterator[None]:
    """Root in that network namespace: what it opens there stays there."""
    with open("/proc/self/ns/net") as before, open(f"/run/netns/{name}") as there:
        LIBC.setns(there.fileno(), CLONE_NEWNET)
        try:
            yield
        finally:
            LIBC.setns(before.fileno(), CLONE_NEWNET)


# ---- the steps, in their order


def without_drop_in() -> dict[str, Any]:
    make_node(ZERO, 1, 5)
    run("systemctl", "enable", "--now", "fdbroker.socket", check=True)
    started = start_with(DEVICES)
    found = {"started": started, "plain": confined(), "asked": member(asked, ZERO, "rw"), "exposure": exposure()}
    code = start_with(RULES)
    shown = show("ActiveState", "Result", "ExecMainStatus", "NRestarts")
    lines = [text for text in said() if "CAP_SYS_ADMIN" in text]
    # a client tries it as well: then what refuses everybody still runs when the admin comes
    ping = run(*as_user(MEMBER, [GROUP, MAY_CONNECT]), "fdbroker", "ping")
    refusing = show("ActiveState", "StatusText")
    return {**found, "code": code, **shown, "said": lines, "client": ping.returncode, "refusing": refusing}


def drop_in() -> dict[str, Any]:
    """What its comment says is all that the admin does."""
    commands = [line[4:] for line in DROP_IN.read_text().splitlines() if line.startswith("#   ")]
    done = [outcome(run("sh", "-c", command)) for command in commands]
    made = os.stat(IN_FORCE)
    return {
        "commands": commands,
        "done": done,
        "file": [made.st_uid, oct(stat.S_IMODE(made.st_mode)), IN_FORCE.read_text() == DROP_IN.read_text()],
        **show("ActiveState", "StatusText", "DropInPaths"),
        "asked": member(asked, "uts:new"),
    }


def without_rules() -> dict[str, Any]:
    """The drop-in is there, and the policy needs no worker."""
    return {"started": start_with(DEVICES), "plain": confined(), "asked": member(asked, ZERO, "rw")}


idle: dict[str, int] = {}
first: dict[str, int] = {}


def begun() -> dict[str, Any]:
    """From here on the one service, until one of its processes is killed that it cannot do without."""
    code = start_with(RULES)
    first.update(processes())
    # the worker has begun to listen, and its holder to watch it
    wait_for("the worker", lambda: has_open(first["worker"], "anon_inode:[eventpoll]"))
    wait_for("its holder", lambda: has_open(first["holder"], "anon_inode:[pidfd]"))
    idle.update(counts())
    return {"started": code, "folder": os.path.exists("/run/netns"), "exposure": exposure()}


def _enters(resource: str) -> list[Any]:
    """Whether the broker says that it is usable, and what setns(2) says."""
    with fdbroker.connect() as client, client.open(resource) as got:
        failed = LIBC.setns(got.fileno(), 0) != 0
        return [got.usable, errno.errorcode[ctypes.get_errno()] if failed else "entered"]


def named() -> dict[str, Any]:
    """The first one is made after the service has started, and so is the folder."""
    before = member(asked, "net:vpn-a")
    listed = watched(as_user(MEMBER, [GROUP, MAY_CONNECT]), lambda: ip("netns", "add", "vpn-a"))
    return {
        "before": before,
        "listed": listed,
        "asked": member(asked, "net:vpn-a"),
        "inode": os.stat("/run/netns/vpn-a").st_ino,
        "own": os.stat("/proc/self/ns/net").st_ino,
        "enters": member(_enters, "net:vpn-a"),
        "no_rule": member(asked, "net:other"),
        "other": begin([], asked, "net:vpn-a", uid=OTHER)(),
    }


def _of(kind: str, pid: int) -> dict[str, Any]:
    """The whole answer, but for the number that was asked for."""
    answer = Raw().ask({"namespace": {"type": kind, "pid": pid}})
    text = json.dumps(answer).replace(f'"pid": {pid}', '"pid": "…"')
    return json.loads(text)


@contextlib.contextmanager
def of_user(uid: int, *command: str) -> Iterator[int]:
    """A process of that user."""
    with subprocess.Popen((*as_user(uid, [uid]), *command)) as process:
        try:
            yield process.pid
        finally:
            process.kill()


def of_caller() -> dict[str, Any]:
    """Of a plain process of the member's, and of one that has a namespace of its own of every type."""
    own = ("unshare", "-Urmnpiu", "--cgroup", "--time", "--fork", "--kill-child", "sleep", "60")
    found: dict[str, Any] = {}
    with of_user(MEMBER, "sleep", "60") as plain, of_user(MEMBER, *own) as parent:
        (child,) = wait_for("the child", lambda: children(parent))
        for pid in (plain, child):
            wait_for("its program", lambda pid=pid: status_of(pid)["Name"] == "sleep")
        for name, pid in (("plain", plain), ("child", child)):
            got = {kind: member(asked, f"{kind}:pid:{pid}") for kind in TYPES}
            found[name] = {
                kind: [one.get("inode"), os.stat(f"/proc/{pid}/ns/{kind}").st_ino, one] for kind, one in got.items()
            }
        found["entered"] = member(_user_and_net_of, child)
    found["ours"] = {kind: os.stat(f"/proc/self/ns/{kind}").st_ino for kind in TYPES}
    return found


def _user_and_net_of(pid: int) -> list[str]:
    """Into both by nsenter: its own user namespace first, so that the other one may be entered."""
    with fdbroker.connect() as client, contextlib.ExitStack() as owned:
        user, net = (
            owned.enter_context(one).fileno() for one in client.open_all([f"user:pid:{pid}", f"net:pid:{pid}"])
        )
        enter = (f"--user=/proc/self/fd/{user}", f"--net=/proc/self/fd/{net}")
        done = subprocess.run(
            ("nsenter", "--preserve-credentials", *enter, "readlink", "/proc/self/ns/net"),
            pass_fds=(user, net),
            capture_output=True,
            text=True,
            check=False,
        )
        return [done.stdout.strip(), f"net:[{os.fstat(net).st_ino}]", done.stderr]


def not_the_callers() -> dict[str, Any]:
    """The whole answers for processes that are not the caller's, and for what is none."""
    with of_user(MEMBER, "true") as zombie, of_user(OTHER, "sleep", "60") as other, of_user(0, "sleep", "60") as root:
        os.waitid(os.P_PID, zombie, os.WEXITED | os.WNOWAIT)
        with of_user(MEMBER, "true") as gone:
            os.waitpid(gone, 0)
        pids = {"other": other, "root": root, "init": 1, "zombie": zombie, "gone": gone, "opener": first["opener"]}
        found = {name: {kind: member(_of, kind, pid) for kind in TYPES} for name, pid in pids.items()}
        found["state"] = status_of(zombie)["State"]
    deny = records("FDBROKER_DECISION=deny", f"FDBROKER_RESOURCE=net:pid:{other}")
    return {**found, "reasons": [record["FDBROKER_REASON"] for record in deny]}


def _create() -> dict[str, Any]:
    become_root_of_user_namespace()
    user = os.stat("/proc/self/ns/user").st_ino
    found: dict[str, Any] = {}
    with fdbroker.connect() as client:
        for kind, option in NSENTER.items():
            with client.open(f"{kind}:new") as got:
                owning = LIBC.ioctl(got.fileno(), NS_GET_USERNS)
                look = f"readlink /proc/self/ns/{kind}" + ("; ip -json link" if kind == "net" else "")
                entered = subprocess.run(
                    ("nsenter", f"{option}=/proc/self/fd/{got.fileno()}", "sh", "-c", look),
                    pass_fds=(got.fileno(),),
                    capture_output=True,
                    text=True,
                    check=False,
                )
                found[kind] = {
                    "usable": got.usable,
                    "why": got.why,
                    "mine": os.fstat(owning).st_ino == user,
                    "is": f"{kind}:[{os.fstat(got.fileno()).st_ino}]",
                    "own": os.readlink(f"/proc/self/ns/{kind}"),
                    "entered": entered.stdout.splitlines(),
                    "stderr": entered.stderr,
                }
                os.close(owning)
    return found


def created() -> dict[str, Any]:
    # without a user namespace of one's own it can be had, and not be used
    return {"made": member(_create), "plain": {kind: member(asked, f"{kind}:new") for kind in NSENTER}}


def _seen(text: str) -> list[list[str]]:
    """Of each line of mountinfo(5): root, mount point, options, and what is mounted."""
    lines = [line.split(" - ") for line in text.splitlines()]
    return [[*left.split()[3:6], *right.split()[:2]] for left, right in lines]


def _copy_mounts(folder: str) -> dict[str, Any]:
    become_root_of_user_namespace(CLONE_NEWNS)
    subprocess.run(("mount", "--bind", folder, "/mnt"), check=True)
    with fdbroker.connect() as client, client.open("mnt:new") as got:
        enter = ("nsenter", f"--mount=/proc/self/fd/{got.fileno()}", "sh", "-c")
        script = f"cat {folder}/file /mnt/file; LC_ALL=C ls -A /home; mount -t tmpfs tmpfs /mnt && touch /mnt/inside"
        changed, mounts = (
            subprocess.run((*enter, words), pass_fds=(got.fileno(),), capture_output=True, text=True, check=False)
            for words in (script, "umount /mnt; cat /proc/self/mountinfo")
        )
        return {
            "read": outcome(changed),
            "home": sorted(os.listdir("/home")),
            "inside": _seen(mounts.stdout),
            "outside": _seen(Path("/proc/self/mountinfo").read_text()),
            "mine": os.listdir("/mnt"),
        }


def copied_mounts() -> dict[str, Any]:
    """What a caller sees: a file in its /tmp, and what it has mounted itself."""
    folder = "/tmp/fdbroker-lab"
    os.makedirs("/home/somebody", exist_ok=True)
    os.mkdir(folder)
    Path(folder, "file").write_text("the caller's\n")
    service = [os.path.exists(f"/proc/{first['worker']}/root{place}") for place in (folder, "/home/somebody")]
    return {**member(_copy_mounts, folder), "seen_by_service": service}


def linked() -> dict[str, Any]:
    """The recipe for a user without rights, by the command line alone: a server that the machine reaches."""
    ip("link", "add", "br0", "type", "bridge")
    ip("addr", "add", "10.88.0.1/24", "dev", "br0")
    ip("link", "set", "br0", "up")
    recipe = ("unshare", "-Ur", "fdbroker", "open", "net:new", "--")
    command = (*as_user(OTHER, [LINKED, MAY_CONNECT]), *recipe, "nsenter", "--net=/proc/self/fd/3")
    with subprocess.Popen((*command, PYTHON, "-I", "-c", SERVER), stdout=subprocess.PIPE, text=True) as server:
        interfaces = {one["ifname"]: one for one in json.loads(server.stdout.readline() or "[]")}
        ports = ip("-details", "link", "show", "master", "br0")
        (address,) = [one["local"] for one in interfaces["eth0"]["addr_info"] if one["family"] == "inet"]
        with socket.create_connection((address, 8080), timeout=10) as sock:
            same = exchange(sock)
    code = server.wait(60)
    wait_for("the end of the pair", lambda: not ip("link", "show", "master", "br0"), 10)
    names = [link["ifname"] for link in ip("link")]
    return {"interfaces": interfaces, "ports": ports, "address": address, "same": same, "code": code, "left": names}


def _connect(resource: str, address: tuple[str, int]) -> dict[str, Any]:
    """By one's own socket, and by one from the broker."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    found: dict[str, Any] = {"rights": status_of(os.getpid())["CapEff"]}
    with fdbroker.connect() as client, socket.socket(fileno=client.open(resource).detach()) as sock:
        with socket.socket(family, sock.type) as own:
            own.settimeout(5)
            found["own"] = errno.errorcode[own.connect_ex(address)]
        sock.settimeout(10)
        sock.connect(address)
        if sock.type == socket.SOCK_DGRAM:
            sock.send(DATA[:1400])
            found["same"] = sock.recv(2000) == DATA[:1400]
        else:
            found["same"] = exchange(sock)
        found["name"] = sock.getsockname()[0]
    return found


def _serve(resource: str) -> dict[str, Any]:
    with fdbroker.connect() as client, socket.socket(fileno=client.open(resource).detach()) as server:
        server.settimeout(10)
        server.listen()
        accepted, peer = server.accept()
        give_back(accepted)
        return {"name": server.getsockname()[1], "peer": peer[0]}


def sockets() -> dict[str, Any]:
    """vpn-x and vpn-far are connected to each other, and the machine's own network to neither."""
    for name in ("vpn-x", "vpn-far"):
        ip("netns", "add", name)
    ip("-netns", "vpn-x", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", "vpn-far")
    for name, last in (("vpn-x", 1), ("vpn-far", 2)):
        ip("-netns", name, "addr", "add", f"10.99.0.{last}/24", "dev", "eth0")
        ip("-netns", name, "addr", "add", f"fd99::{last}/64", "dev", "eth0", "nodad")
        ip("-netns", name, "link", "set", "eth0", "up")
    found: dict[str, Any] = {"connect": {}, "serve": {}}
    for words, host in (("", "10.99.0.2"), (",inet6", "fd99::2")):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with inside("vpn-far"):
            server = socket.create_server((host, 8080), family=family)
            datagrams = socket.socket(family, socket.SOCK_DGRAM)
            datagrams.bind((host, 8080))
        with server, datagrams:
            server.settimeout(10)
            datagrams.settimeout(10)
            finish = begin([GROUP], _connect, f"socket:net:vpn-x{words}", (host, 8080))
            give_back(server.accept()[0])
            found["connect"][f"stream{words}"] = finish()
            finish = begin([GROUP], _connect, f"socket:net:vpn-x{words},dgram", (host, 8080))
            datagrams.sendto(*datagrams.recvfrom(2000))
            found["connect"][f"dgram{words}"] = finish()
    for words, host in (("", "10.99.0.1"), (",inet6", "fd99::1")):
        finish = begin([GROUP], _serve, f"socket:net:vpn-x{words},bind=443")

        def connected(host: str = host) -> socket.socket | None:
            with inside("vpn-far"), contextlib.suppress(ConnectionRefusedError):
                return socket.create_connection((host, 443), timeout=10)

        with wait_for("the server", connected) as sock:
            found["serve"][f"stream{words}"] = {"same": exchange(sock), **finish()}
    refused = {words: member(asked, f"socket:net:{words}") for words in ("vpn-x,bind=80", "other")}
    return {**found, "refused": refused}


def journal() -> dict[str, Any]:
    wanted = ("net:vpn-a", "mnt:new", "socket:net:vpn-x,bind=443")
    return {
        "granted": {one: records("FDBROKER_DECISION=allow", f"FDBROKER_RESOURCE={one}") for one in wanted},
        "opener": first["opener"],
        "rules": POLICY.read_text().splitlines(),
        "inode": os.stat("/run/netns/vpn-a").st_ino,
    }


def confinement() -> dict[str, Any]:
    words = {"opener": "opener", "keeper": "keeper", "inbox": "inbox", "holder": "namespaces", "worker": "namespaces"}
    return {
        "processes": confined(),
        "uids": {name: pwd.getpwnam(f"fdbroker-{word}").pw_uid for name, word in words.items()},
        "said": "\n".join(said()),
    }


def left() -> dict[str, Any]:
    """What the one service has now, after all of this."""
    with contextlib.suppress(TimeoutError):
        wait_for("the descriptors", lambda: counts() == idle, 5)
    now = processes()
    return {
        "before": idle,
        "after": counts(),
        "same": [name for name in first if first[name] == now[name]],
        "children": children(now["worker"]),
    }


def killed_worker() -> dict[str, Any]:
    before = processes()
    moments, answers = [], []
    for _ in range(3):
        worker = processes()["worker"]
        os.kill(worker, signal.SIGKILL)
        began_s = time.monotonic()
        moments.append([member(asked, "net:vpn-a"), time.monotonic() - began_s])
        wait_for("the next one", lambda old=worker: children(before["holder"]) not in ([], [old]))
        answers.append(member(asked, "net:vpn-a"))
    after = processes()
    return {
        "moments": moments,
        "answers": answers,
        "same": [name for name in before if before[name] == after[name]],
        "said": [text for text in said() if "started again" in text],
        **show("NRestarts", "ActiveState"),
    }


def _while_stopped() -> dict[str, Any]:
    waiting, other = Raw(), Raw()
    began_s = time.monotonic()
    waiting.send({"namespace": {"type": "net", "name": "vpn-a"}})
    device = []
    for _ in range(20):
        asked_s = time.monotonic()
        answer = other.ask({"device": ZERO, "access": "rw"})
        device.append(["error" in answer, time.monotonic() - asked_s])
    answer = waiting.answer()
    return {"device": device, "answer": answer, "after_s": time.monotonic() - began_s}


def stopped_worker() -> dict[str, Any]:
    before = processes()
    os.kill(before["worker"], signal.SIGSTOP)
    found = member(_while_stopped)
    began_s = time.monotonic()
    wait_for("the next worker", lambda: children(before["holder"]) not in ([], [before["worker"]]))
    after_s = time.monotonic() - began_s
    asked_again = member(asked, "net:vpn-a")
    after = processes()
    return {
        **found,
        "again_s": after_s,
        "asked": asked_again,
        "same": [name for name in before if before[name] == after[name]],
        "said": [text for text in said() if "does not answer" in text],
        **show("NRestarts", "ActiveState"),
    }


def killed_holder() -> dict[str, Any]:
    before = processes()
    began_s = time.monotonic()
    os.kill(before["holder"], signal.SIGKILL)
    # nobody connects meanwhile: systemd alone brings it back
    wait_for("the next one", lambda: show("MainPID")["MainPID"] not in ("0", str(before["launcher"])))
    wait_for("its start", lambda: show("ActiveState")["ActiveState"] == "active")
    return {
        "after_s": time.monotonic() - began_s,
        "left": [name for name, pid in before.items() if os.path.exists(f"/proc/{pid}")],
        "asked": member(asked, "net:vpn-a"),  # the folder was there when this one started
        "zero": member(asked, ZERO, "rw"),
        "said": [text for text in said() if "holder" in text],
        **show("NRestarts"),
    }


def stop(pids: dict[str, int]) -> dict[str, Any]:
    began_s = time.monotonic()
    run("systemctl", "stop", "fdbroker.service")
    return {
        "took_s": time.monotonic() - began_s,
        "left": [name for name, pid in pids.items() if os.path.exists(f"/proc/{pid}")],
        **show("ActiveState", "Result", "ExecMainStatus"),
    }


def stopped() -> dict[str, Any]:
    return stop(processes())


def _wait_to_the_end(ready: int) -> dict[str, Any]:
    waiting = Raw()
    waiting.send({"namespace": {"type": "net", "name": "vpn-a"}})
    # requests are taken in turn: when this one is answered, the worker was asked
    Raw().ask({"device": ZERO, "access": "rw"})
    os.write(ready, b"x")
    return waiting.answer()


def stopped_when_stuck() -> dict[str, Any]:
    """The worker does nothing any more, and somebody waits for it."""
    run("systemctl", "start", "fdbroker.service", check=True)
    pids = processes()
    os.kill(pids["worker"], signal.SIGSTOP)
    reading, writing = os.pipe()
    finish = begin([GROUP], _wait_to_the_end, writing)
    os.close(writing)
    os.read(reading, 1)
    os.close(reading)
    return {**stop(pids), "answer": finish(), "said": "\n".join(said())}


report(
    [
        without_drop_in,
        drop_in,
        without_rules,
        begun,
        named,
        of_caller,
        not_the_callers,
        created,
        copied_mounts,
        linked,
        sockets,
        journal,
        confinement,
        killed_worker,
        stopped_worker,
        left,
        killed_holder,
        stopped,
        stopped_when_stuck,
    ]
)
