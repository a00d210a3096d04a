"""What the tests share: a private /dev, a running broker, and clients with other identities.

All of it happens in a mount namespace of the test run's own, with numeric ids: nothing stays on the machine.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fdbroker.kernel import namespaces
from fdbroker.limits import every as limits

LIBC = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNS = 0x20000
CLONE_NEWNET = 0x40000000
CLONE_NEWUSER = 0x10000000
MS_REC, MS_PRIVATE, MS_BIND, MNT_DETACH = 0x4000, 0x40000, 0x1000, 2

# How long anything is waited for that an idle machine does at once. At a load of 20 on two CPUs a broker takes 9 s to
# serve and 2 s to stop [measured]. What must be quick is tested by its own limit.
PATIENCE_S = 60.0

# uids and gids that no machine has given to anybody: below the dynamic ranges, above the users
ALICE, BOB, CAROL = 50001, 50002, 50003
# those that are users of the machine while tests run: each its own owner
USERS = range(50001, 50020)
GROUP, OTHER_GROUP = 51001, 51002


def cannot(why: str) -> None:
    """Skip, or fail where CI says that everything must run."""
    if os.environ.get("CI") == "true":
        pytest.fail(why)
    pytest.skip(why)


def need_root() -> None:
    if os.geteuid() != 0:
        cannot("needs root")


def own_mount_namespace() -> None:
    """Once: what the tests mount is seen by them alone, and gone with them."""
    if LIBC.unshare(CLONE_NEWNS) != 0 or LIBC.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) != 0:
        cannot(f"no mount namespace: {os.strerror(ctypes.get_errno())}")
    # for sockets and policies of the tests: it goes with the namespace, also when the run is killed
    mount("fdbroker-test", "/mnt", "tmpfs", 0, "mode=0755")
    lines = [f"fdbroker-test-{uid}:x:{uid}:{uid}::/nonexistent:/usr/sbin/nologin\n" for uid in USERS]
    replace_file("/etc/passwd", Path("/etc/passwd").read_text() + "".join(lines))


def replace_file(path: str, text: str) -> None:
    """Have a file with this text stand at `path`, which is there, for the tests alone."""
    place = Path(f"/mnt/{path.replace('/', '-')}-{time.monotonic_ns()}")
    place.write_text(text)
    mount(str(place), path, "none", MS_BIND)


@contextlib.contextmanager
def replaced_file(path: str, text: str) -> Iterator[None]:
    """The same for a while; where nothing is at `path`, it is made, and removed again."""
    made = not os.path.exists(path)
    if made:
        Path(path).touch()
    replace_file(path, text)
    try:
        yield
    finally:
        unmount(path)
        if made:
            os.unlink(path)


def mount(source: str, target: str, kind: str, flags: int = 0, options: str = "") -> None:
    if LIBC.mount(source.encode(), target.encode(), kind.encode(), flags, options.encode()) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"mount {source} at {target}: {os.strerror(number)}")


def unmount(target: str) -> None:
    if LIBC.umount2(target.encode(), MNT_DETACH) != 0:
        raise OSError(ctypes.get_errno(), f"umount {target}")


@contextlib.contextmanager
def private_dev() -> Iterator[Path]:
    """An own /dev with the usual harmless nodes, and `node` to make more."""
    outer_null = os.open("/dev/null", os.O_RDWR)
    mount("dev", "/dev", "tmpfs", 0, "mode=0755")
    try:
        for name, number in (("null", 3), ("zero", 5), ("full", 7), ("random", 8), ("urandom", 9)):
            node(f"/dev/{name}", os.makedev(1, number), 0o666)
        os.symlink("/proc/self/fd", "/dev/fd")
        os.mkdir("/dev/shm", 0o1777)
        os.chmod("/dev/shm", 0o1777)
        yield Path("/dev")
    finally:
        unmount("/dev")
        os.close(outer_null)


def node(path: str, rdev: int, mode: int = 0o600, kind: int = stat.S_IFCHR) -> None:
    """A device node that only root may open, unless `mode` says otherwise."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    os.mknod(path, kind | mode, rdev)
    os.chmod(path, mode)


MEM = {"null": os.makedev(1, 3), "zero": os.makedev(1, 5), "full": os.makedev(1, 7), "urandom": os.makedev(1, 9)}


def descriptors_of(pid: int, *, every: bool = False) -> dict[str, str]:
    """What a process has open: number -> what it is. The folders of devices that it keeps (DEVICES_KEPT) if `every`."""
    found = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found[name] = os.readlink(f"/proc/{pid}/fd/{name}")
    kept = {name: what for name, what in found.items() if what.startswith("/sys/devices/")}
    assert len(kept) <= limits.DEVICES_KEPT
    return found if every else {name: what for name, what in found.items() if name not in kept}


def resident_bytes(pid: int) -> int:
    """The memory of a process that is in RAM now."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def status_of(pid: int) -> dict[str, str]:
    text = Path(f"/proc/{pid}/status").read_text()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}


class Broker:
    """A running broker as an admin starts it by hand, with the policy that a test wrote."""

    def __init__(
        self,
        folder: Path,
        policy: str,
        arguments: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
        descriptors: int = 0,
        program: tuple[str, ...] = ("-m", "fdbroker"),
    ):
        self.folder = folder
        self.policy = folder / "policy.yaml"
        self.socket = str(folder / "socket")
        self.log = folder / "log"
        self.policy.write_text(policy)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    *(("prlimit", f"--nofile={descriptors}:{descriptors}") if descriptors else ()),
                    *(sys.executable, "-I", "-W", "error", *program, "serve", "--policy", str(self.policy)),
                    *(() if "--socket" in arguments else ("--socket", self.socket)),
                    *(() if "--mode" in arguments else ("--mode", "0666")),
                    *arguments,
                ],
                stdin=subprocess.DEVNULL,
                stderr=log,
                env=environment if environment is not None else {"PATH": os.environ["PATH"]},
                cwd="/",
            )
        self.expected_code: int | None = 0
        self.pids: dict[str, int] = {}

    def wait_ready(self) -> None:
        self._wait(lambda: "serving with" in self.text(), "it did not come up", PATIENCE_S)
        children = subprocess.run(["pgrep", "-P", str(self.process.pid), "-a"], capture_output=True, text=True).stdout
        self.pids = {"launcher": self.process.pid}
        for line in children.splitlines():
            pid, _, command = line.partition(" ")
            for name in ("opener", "keeper", "inbox", "namespaces", "witness"):
                if f"fdbroker.{name}" in command:
                    self.pids[name] = int(pid)
        assert set(self.pids) - {"namespaces"} == {"launcher", "opener", "keeper", "inbox", "witness"}, children
        if "namespaces" in self.pids:
            self.pids["worker"] = self.worker()
        self.idle = self.counts()  # before the first client

    def worker(self) -> int:
        """The pid of the namespaces worker, which its holder starts again when it ends."""
        end = time.monotonic() + PATIENCE_S
        while not (found := subprocess.run(["pgrep", "-P", str(self.pids["namespaces"])], capture_output=True).stdout):
            assert time.monotonic() < end, self.text()
            time.sleep(0.02)
        return int(found)

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def records(self, kind: str = "") -> list[dict[str, str]]:
        """The audit records so far, of one kind or all; they are on standard error, for a test has no journal.

        The keeper is told of a refusal before the client is, and may write the record after that: once it sleeps, it has.
        """
        end = time.monotonic() + PATIENCE_S
        while self._keeper_runs() and time.monotonic() < end:
            time.sleep(0.001)
        records = [json.loads(line) for line in self.text().splitlines() if line.startswith("{")]
        return [record for record in records if not kind or f" {kind} " in record["MESSAGE"].replace(":", " ")]

    def _keeper_runs(self) -> bool:
        try:
            return "keeper" in self.pids and status_of(self.pids["keeper"])["State"].startswith("R")
        except (FileNotFoundError, ProcessLookupError):
            return False

    def wait_for(self, text: str, seconds: float = PATIENCE_S) -> None:
        """Until the log has that text; no longer than the broker runs."""
        self._wait(lambda: text in self.text(), f"no {text!r} in its log", seconds)

    def _wait(self, ready: Callable[[], bool], missing: str, seconds: float) -> None:
        """Until `ready`; `missing` says what is not there when the time is over, or the broker has ended before."""
        end = time.monotonic() + seconds
        while True:
            code = self.process.poll()  # before `ready`: its last words count
            if ready():
                return
            assert code is None, f"the broker ended with {code}, {missing}:\n{self.text()}"
            assert time.monotonic() < end, f"{missing}:\n{self.text()}"
            time.sleep(0.02)

    def counts(self) -> dict[str, int]:
        """How many descriptors each process has open."""
        return {name: len(descriptors_of(pid)) for name, pid in self.pids.items()}

    def wait_idle(self) -> None:
        """Every process must have the descriptors again that it had before the first client."""
        end = time.monotonic() + PATIENCE_S
        while (counts := self.counts()) != self.idle:
            assert time.monotonic() < end, f"{counts}, were {self.idle}"
            time.sleep(0.02)

    def reload(self, policy: str) -> None:
        self.policy.write_text(policy)
        before = self.text().count("reloaded")
        self.process.send_signal(signal.SIGHUP)
        self._wait(lambda: self.text().count("reloaded") > before, "no word of the reload", PATIENCE_S)

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(PATIENCE_S)


@contextlib.contextmanager
def running(
    policy: str,
    *arguments: str,
    environment: dict[str, str] | None = None,
    descriptors: int = 0,
    program: tuple[str, ...] = ("-m", "fdbroker"),
) -> Iterator[Broker]:
    """A broker with this policy; at the end it must stop in order, without a traceback."""
    with folder() as where:
        broker = Broker(where, policy, arguments, environment, descriptors, program)
        try:
            broker.wait_ready()
            yield broker
            code = broker.stop()
        finally:
            broker.process.kill()
            broker.process.wait()
        if broker.expected_code is not None:
            assert code == broker.expected_code, broker.text()
            assert "Traceback" not in broker.text(), broker.text()


def activated(address: str, then: str = "from fdbroker.cli import main; sys.exit(main())") -> tuple[str, ...]:
    """The `program` of a broker that gets its socket as the service manager gives it; `then` goes on."""
    code = f"""
import os, socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind({address!r})
os.chmod({address!r}, 0o666)
listener.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
listener.listen()
os.dup2(listener.detach(), 3)
os.environ["LISTEN_FDS"], os.environ["LISTEN_PID"] = "1", str(os.getpid())
{then}
"""
    return ("-c", code)


@contextlib.contextmanager
def refusing(
    place: Path, then: str = "from fdbroker.cli import main; sys.exit(main())"
) -> Iterator[tuple[Broker, int]]:
    """A broker whose policy is broken, at `place`/socket, and the pid of its refuser; it lives until the block ends."""
    broker = Broker(place, "version: 1\nbroken: here\n", program=activated(f"{place}/socket", then))
    try:
        broker.wait_for("nobody is served", PATIENCE_S)
        end = time.monotonic() + PATIENCE_S
        while ask(broker.socket, "/dev/null") != "PolicyBroken":  # it serves, so it is confined
            assert time.monotonic() < end, broker.text()
        (pid,) = subprocess.run(["pgrep", "-P", str(broker.process.pid)], capture_output=True).stdout.split()
        yield broker, int(pid)
        assert broker.process.poll() is None, broker.text()
        assert broker.stop() == 0, broker.text()
    finally:
        broker.process.kill()
        broker.process.wait()


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A folder that everybody may enter and only root may write to."""
    where = Path(f"/mnt/{os.getpid()}-{time.monotonic_ns()}")
    where.mkdir(mode=0o755)
    os.chmod(where, 0o755)
    try:
        yield where
    finally:
        for path in sorted(where.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        where.rmdir()


# a child that another thread forks just now must not have the end of our pipe, or we would wait for its end as well
_forking = threading.Lock()


def as_user(uid: int, groups: list[int], action: Callable[..., Any], *arguments: Any, gid: int | None = None) -> Any:
    """Run `action` in a child with that identity and no capability; its result comes back as JSON."""
    with _forking:
        reading, writing = os.pipe()
        child = os.fork()
        if child != 0:
            os.close(writing)
    if child == 0:
        code = 1
        try:
            os.close(reading)
            os.setgroups(groups)
            primary = uid if gid is None else gid
            os.setresgid(primary, primary, primary)
            os.setresuid(uid, uid, uid)
            LIBC.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE, as a program is that was executed by that user
            with os.fdopen(writing, "w") as out:
                json.dump(action(*arguments), out)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    with os.fdopen(reading) as result:
        text = result.read()
    _, status = os.waitpid(child, 0)
    assert status == 0, f"the child ended with {status}"
    return json.loads(text)


def command(address: str, *words: str) -> list[Any]:
    """`fdbroker` with these words in a child of this process, for a user may not enter the checkout: code, out, err."""
    out, err = (os.memfd_create(name) for name in ("out", "err"))
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.dup2(out, 1)
            os.dup2(err, 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)
            sys.argv = ["fdbroker", *words]
            os.environ["FDBROKER_SOCKET"] = address
            from fdbroker.cli import commands

            code = commands.run()
            sys.stdout.flush()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    texts = []
    for number in (out, err):
        with open(number, "rb") as file:
            file.seek(0)
            texts.append(file.read().decode())
    return [code, *texts]


@contextlib.contextmanager
def own_network() -> Iterator[None]:
    """This process, and what it starts, in a network namespace of its own, with an empty /run/netns."""
    before = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    new = not os.path.isdir("/run/netns")
    if new:
        os.mkdir("/run/netns", 0o755)
    try:
        if LIBC.unshare(CLONE_NEWNET) != 0:
            cannot(f"no network namespace: {os.strerror(ctypes.get_errno())}")
        mount("netns", "/run/netns", "tmpfs", 0, "mode=0755")
        try:
            ip("link", "set", "lo", "up")
            yield
        finally:
            unmount("/run/netns")
    finally:
        if new:
            os.rmdir("/run/netns")
        assert LIBC.setns(before, CLONE_NEWNET) == 0
        os.close(before)


def ip(*words: str) -> str:
    """What an `ip` command prints; it must succeed."""
    result = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def become_root_of_user_namespace(uid: int | None = None) -> None:
    """This process, which must be a plain user's, gets a user namespace of its own and all capabilities in it."""
    uid = os.getuid() if uid is None else uid
    gid = os.getgid()
    LIBC.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: else the maps are root's to write
    assert LIBC.unshare(CLONE_NEWUSER) == 0, os.strerror(ctypes.get_errno())
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        Path(f"/proc/self/{name}").write_text(text)


def need_count_of_mounts() -> None:
    """This test needs a kernel that says how many mounts a mount namespace has."""
    own = os.open("/proc/self/ns/mnt", os.O_RDONLY)
    try:
        if namespaces.mounts_in(own) is None:
            cannot("Linux 6.12 is the first that counts mounts")
    finally:
        os.close(own)


class Raw:
    """A client that speaks bytes, for what the library would never send."""

    def __init__(self, address: str):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.sock.connect(address)  # before there is a timeout, or a full queue would be an error: unix(7), EAGAIN
        except OSError:
            self.sock.close()
            raise
        self.sock.settimeout(PATIENCE_S)
        self.buffer = b""
        self.descriptors: list[int] = []

    def send_call(self, method: str, parameters: dict[str, Any] | None = None, **more: Any) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # `reply` finds why, or the end
            self.sock.sendall(json.dumps({"method": method, "parameters": parameters or {}, **more}).encode() + b"\0")

    def reply(self) -> dict[str, Any] | None:
        """The next reply, or None when the broker hung up."""
        while b"\0" not in self.buffer:
            try:
                data, numbers, _, _ = socket.recv_fds(self.sock, 65536, 253)
            except ConnectionResetError:
                return None
            self.descriptors += numbers
            if not data:
                return None
            self.buffer += data
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def call(self, method: str, parameters: dict[str, Any] | None = None, **more: Any) -> dict[str, Any] | None:
        self.send_call(method, parameters, **more)
        return self.reply()

    def open(self, *paths: str, access: str = "ro") -> dict[str, Any] | None:
        return self.call(
            "io.fdbroker.Broker.Open", {"resources": [{"device": path, "access": access} for path in paths]}
        )

    def ask(self, *resources: dict[str, Any]) -> dict[str, Any] | None:
        """Open whatever these say."""
        return self.call("io.fdbroker.Broker.Open", {"resources": list(resources)})

    def take(self) -> int:
        return self.descriptors.pop(0)

    def close(self) -> None:
        for number in self.descriptors:
            os.close(number)
        self.descriptors.clear()
        self.sock.close()

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def taken_over(module: str, program: str) -> Iterator[None]:
    """Brokers that are started in here have this program in the place of a module, such as `inbox/service.py`.

    All else is as it ships: how the process is started, and what it may do. `console` is there for the program: it
    does what a client tells it.
    """
    place = Path(__file__).resolve().parents[1] / "fdbroker" / module
    with folder() as where:
        evil = where / "evil.py"
        evil.write_text(_CONSOLE + program)
        mount(str(evil), str(place), "none", MS_BIND)
        try:
            yield
        finally:
            unmount(str(place))


_CONSOLE = """
import array, ctypes, errno, fcntl, mmap, os, select, signal, socket, struct, sys, threading, time
from fdbroker.kernel import capabilities, libc, openat
from fdbroker.terms import Device, Namespace, Socket
from fdbroker.wire import keeper, link, lists, resources, worker
from fdbroker.wire.connections import Came, Use

def console(sock, names):
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    buffer = b""
    while True:
        while b"\\0" not in buffer:
            poll.poll()
            data = sock.recv(65536, socket.MSG_DONTWAIT)
            if not data:
                return
            buffer += data
        text, _, buffer = buffer.partition(b"\\0")
        try:
            said = repr(eval(text, {**globals(), **names}))
        except OSError as error:
            said = errno.errorcode.get(error.errno, str(error.errno))
        except Exception as error:
            said = repr(error)
        sock.sendall(said.encode() + b"\\0")
"""


class Console(Raw):
    """A client of a process that was taken over: what it says there is evaluated there."""

    def say(self, text: str) -> str | None:
        """The value as text, an error's name, or None when the process is gone."""
        try:
            self.sock.sendall(text.encode() + b"\0")
            while b"\0" not in self.buffer:
                data = self.sock.recv(65536)
                if not data:
                    return None
                self.buffer += data
        except (BrokenPipeError, ConnectionResetError):
            return None
        said, _, self.buffer = self.buffer.partition(b"\0")
        return said.decode()


def outcome(reply: dict[str, Any] | None) -> str:
    """A reply in a word: the short name of its error, "granted", or "disconnected"."""
    if reply is None:
        return "disconnected"
    return str(reply.get("error", "granted")).rpartition(".")[2]


def ask(address: str, *paths: str, access: str = "ro") -> str:
    """Open these once, close what came, and say how it ended."""
    with Raw(address) as client:
        return outcome(client.open(*paths, access=access))


# For tests that ask as often as they can: also that many records, or a quick machine is refused for these.
RATES = "requests_per_second: 100000, burst: 100000, records_per_second: 100000, record_burst: 100000"
NO_RATES = f"limits: {{{RATES}}}\n"
EVERYONE_NULL = 'version: 1\neveryone: {devices: [{path: /dev/null, access: rw, class: mem, device: "1:3"}]}\n'
