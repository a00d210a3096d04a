"""What a child of the worker does: find or make one namespace, or a socket in one, and judge it.

Runs in: a child of the namespaces worker, one for each question. A client controls the name or the pid that is asked
for, and the processes of its own user; nothing that they say of themselves is believed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import time

from fdbroker.errors import Denied, NoSuchResource, NotWhatItWas, OpenFailed, QuotaExceeded, Refused
from fdbroker.kernel import confine, namespaces, sockets
from fdbroker.kernel.capabilities import Bracket
from fdbroker.kernel.namespaces import CLONE, Caller, NotANamespace
from fdbroker.kernel.pinned import Process, state
from fdbroker.kernel.processes import is_alive
from fdbroker.kernel.rtnetlink import RtNetlink
from fdbroker.limits import namespaces as limits
from fdbroker.namespaces.connect import connect
from fdbroker.namespaces.living import in_own_user_namespaces, living
from fdbroker.terms import UNMAPPED_ID, Namespace, Socket
from fdbroker.wire.worker import UNKNOWN, Ask, Made, Opened

_MARGIN_S = 1.0  # before the worker ends this process, its own child must have ended
_STOPPED, _STOPPED_MS, _LOOK_MS = (b"T", b"t"), limits.NAMESPACE_STOPPED_MS, 50
_MOUNTS = limits.MOUNTS
_OWN = "/proc/self/ns"
_FAMILIES = {"inet": socket.AF_INET, "inet6": socket.AF_INET6}
_TYPES = {"stream": socket.SOCK_STREAM, "dgram": socket.SOCK_DGRAM}
# where a new namespace of the process that made it stands: its children are the first in a time namespace
_NEW_LINKS = {"time": "time_for_children"}


def answer(
    ask: Ask, pidfd: int | None, permitted: frozenset[str], until_s: float, held: frozenset[int] = frozenset()
) -> tuple[Made, list[int]]:
    """The answer to a question for one resource, and its descriptors. The process ends after this.

    `pidfd`, borrowed, is the process that asks. At `until_s` the worker ends this one. `held` are inode numbers of what
    was opened for the owner's requests that are not answered yet: nobody but the worker holds these.

    Raises Denied, NoSuchResource, NotWhatItWas, OpenFailed, QuotaExceeded, OSError for what the kernel refuses, and
    Unfinished.
    """
    work = _Work(ask, pidfd, permitted, until_s - _MARGIN_S, held)
    match ask.wanted[0].resource:
        case Socket() as asked:
            return Made(ask.request, (Opened(0, UNKNOWN),)), [work.socket(asked)]
        case Namespace(kind, name) if name:
            return work.by_name(kind, name)
        case Namespace(kind, _, pid) if pid:
            return work.of_process(kind, pid)
        case Namespace(kind):
            return work.new(kind)


class Unfinished(Exception):
    """A new mount namespace is not given, and its caller may have it all the same: `known` counts from now on."""

    def __init__(self, why: Refused | OSError, known: tuple[int, ...]) -> None:
        super().__init__(why)
        self.why = why
        self.known = known


class _Work:
    """One question, and the capabilities that may be raised for it. What it opens is closed by the process's end."""

    def __init__(
        self, ask: Ask, pidfd: int | None, permitted: frozenset[str], until_s: float, held: frozenset[int]
    ) -> None:
        self.held = held
        self.until_s = until_s
        self.ask = ask
        self.pidfd = pidfd
        self.permitted = permitted

    def raised(self, *names: str) -> Bracket:
        """These, as far as the worker was given them."""
        return Bracket(self.permitted.intersection(names), self.permitted)

    def caller(self) -> tuple[Process, Caller] | None:
        """The process that asks, None when the kernel does not say which it is (before Linux 6.5)."""
        if self.pidfd is None:
            return None
        try:
            with self.raised("CAP_SYS_PTRACE"):
                process = Process.of(os.dup(self.pidfd))
                return process, namespaces.caller_of(process)
        except (ProcessLookupError, FileNotFoundError):
            raise Denied("the program that asked has ended") from None

    def made(self, descriptor: int, kind: str, caller: Caller | None, known: tuple[int, ...] = ()) -> Made:
        """The answer for a namespace's descriptor."""
        unusable = UNKNOWN if caller is None else namespaces.why_unusable(descriptor, kind, caller)
        return Made(self.ask.request, (Opened(os.fstat(descriptor).st_ino, unusable),), known)

    # ---- existing ones

    def by_name(self, kind: str, name: str) -> tuple[Made, list[int]]:
        descriptor = _open_named(name)
        asking = self.caller()
        return self.made(descriptor, kind, asking[1] if asking else None), [descriptor]

    def of_process(self, kind: str, pid: int) -> tuple[Made, list[int]]:
        """Of a process of the caller's; every other one, or none, is the same to the client."""
        asking = self.caller()
        try:
            with self.raised("CAP_SYS_PTRACE"):
                target = Process(self.pid_here(pid, asking))
                self.judge(target)
                descriptor = target.namespace(kind)
                if namespaces.type_of(descriptor) != kind:
                    raise NotWhatItWas(f"it is no {kind} namespace")
                if not self.belongs(descriptor, kind, asking[1].user if asking else None):
                    raise Denied("its namespace belongs to another user")
                self.judge(target)  # it may have become somebody else meanwhile
        except (ProcessLookupError, PermissionError, FileNotFoundError) as error:
            raise Denied(f"no process of the caller's: {error}") from None
        if not is_alive(target.pidfd):
            raise Denied("the process has ended")
        return self.made(descriptor, kind, asking[1] if asking else None), [descriptor, target.pidfd]

    def pid_here(self, pid: int, asking: tuple[Process, Caller] | None) -> int:
        """The client's number for a process in our own pid namespace."""
        if asking is not None:
            theirs = asking[0].namespace("pid")
            ours = os.stat(f"{_OWN}/pid")
            if namespaces.identity(theirs) != (ours.st_dev, ours.st_ino):
                pid = namespaces.pid_here(theirs, pid)
        if pid == 1:
            raise Denied("it is process 1")
        return pid

    def judge(self, target: Process) -> None:
        """Whether a process is the user's own in every respect: not one that a setuid program runs in, for one."""
        status = target.status()
        uid = self.ask.uid
        if set(status.uids) != {uid} or uid == UNMAPPED_ID:
            raise Denied("it does not belong to the caller's uid alone")
        if len(set(status.gids)) != 1:
            raise Denied("it runs a setgid program")
        user = target.namespace("user")
        ours = os.stat(f"{_OWN}/user")
        is_in_ours = namespaces.identity(user) == (ours.st_dev, ours.st_ino)
        os.close(user)
        # in a user namespace of its own, capabilities are the user's to have
        if uid and status.permitted and is_in_ours:
            raise Denied("it has capabilities")
        # What a setuid program leaves when it drops its rights: it is not dumpable, and to the user itself closed. Its
        # files are then root's of the user namespace that its program was started in; those of a container the user's.
        holder = os.stat("status", dir_fd=target.folder).st_uid
        if holder != uid and (is_in_ours or holder in (0, UNMAPPED_ID)):
            raise Denied("it is not dumpable")

    def belongs(self, descriptor: int, kind: str, user: int | None) -> bool:
        """Whether a namespace is the user's own, or one that the caller lives in or below: never somebody else's."""
        owning = os.dup(descriptor) if kind == "user" else namespaces.owner(descriptor)
        own = os.open(f"{_OWN}/user", os.O_RDONLY | os.O_CLOEXEC) if user is None else user
        return namespaces.owner_uid(owning) == self.ask.uid or namespaces.is_at_or_above(owning, own)

    # ---- new ones

    def new(self, kind: str) -> tuple[Made, list[int]]:
        asking = self.caller()
        if asking is None:
            raise OpenFailed(errno.EOPNOTSUPP)
        process, caller = asking
        if process.status().uids[0] != self.ask.uid:
            raise Denied("the program is not who it was when it connected")
        living, before = self.count_living(), self.listed(kind, sure=False)
        try:
            descriptor = self.make(kind, process, caller)
            if namespaces.type_of(descriptor) != kind:
                raise NotWhatItWas(f"it is no {kind} namespace")
            if namespaces.identity(namespaces.owner(descriptor)) != namespaces.identity(caller.user):
                raise NotWhatItWas("it does not belong to the caller's user namespace")
        except (Refused, OSError) as error:
            raise Unfinished(error, (*living, *(self.listed(kind, sure=True) - before))) from None
        inode = os.fstat(descriptor).st_ino  # of one that was, perhaps: the kernel gives numbers again
        made = self.made(descriptor, kind, caller, (*(one for one in living if one != inode), inode))
        if kind == "net":
            self.set_up(descriptor)
        return made, [descriptor]

    def count_living(self) -> tuple[int, ...]:
        """Those that were made for this owner and may be living. Raises QuotaExceeded when there is no room."""
        known, maximum = self.ask.known, self.ask.maximum
        if len(known) < maximum:
            return known
        with self.raised("CAP_SYS_PTRACE", "CAP_DAC_READ_SEARCH", "CAP_SYS_ADMIN"):
            still = living(self.ask, time.monotonic() + limits.LIVING_SECONDS).union(self.held.intersection(known))
        if len(still) >= maximum:
            raise QuotaExceeded("namespaces", maximum)
        return tuple(inode for inode in known if inode in still)

    def listed(self, kind: str, *, sure: bool) -> set[int]:
        """The owner's own mount namespaces, to be compared: before one is made, and after that has failed.

        From Linux 6.18 on root of a user namespace can open a new one by its file handle while it is made there, and
        kill the process that makes it.
        """
        if kind != "mnt":  # the others are not listed, and are small
            return set()
        with self.raised("CAP_SYS_ADMIN", "CAP_SYS_PTRACE"):
            return in_own_user_namespaces(self.ask, sure=sure)

    def make(self, kind: str, process: Process, caller: Caller) -> int:
        """A new namespace in the caller's user namespace, by a child that goes there and does not come back."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent = os.getpid()
        child = os.fork()
        if child == 0:
            try:
                confine.die_with(parent)
                ours.close()
                sockets.send(theirs, bytes(4), [self.make_there(kind, process, caller, parent)])
            except OSError as error:
                sockets.send(theirs, (error.errno or errno.EIO).to_bytes(4, "big"))
            finally:
                os._exit(0)
        theirs.close()
        answer = bytearray(4)
        # The caller may have stopped or killed it. It must not outlive us: stopped just behind setns(2), where the
        # kernel clears the signal of a parent's death, it would.
        poll = select.poll()
        poll.register(ours, select.POLLIN)
        try:
            stopped_ms = 0
            while time.monotonic() < self.until_s:
                if poll.poll(_LOOK_MS):
                    break
                stopped_ms += _LOOK_MS if state(child) in _STOPPED else 0
                if stopped_ms >= _STOPPED_MS:  # by its caller alone: others wait for this place
                    raise OpenFailed(errno.ETIMEDOUT)
            else:
                raise OpenFailed(errno.ETIMEDOUT)
            size, descriptors = sockets.receive_into(ours, answer, 1)
        finally:
            ours.close()
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        if not descriptors:
            raise OpenFailed(int.from_bytes(answer, "big") if size else errno.EIO)
        return descriptors[0]

    def make_there(self, kind: str, process: Process, caller: Caller, parent: int) -> int:
        own = os.open("/proc/self", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        status = os.stat("ns/user", dir_fd=own)
        with self.raised("CAP_SYS_ADMIN", "CAP_SYS_CHROOT", "CAP_SYS_PTRACE"):
            if kind == "mnt":  # a copy of what the caller sees, not of what we do
                theirs = process.namespace("mnt")
                _check_mounts(process.folder, theirs)
                namespaces.setns(theirs, CLONE["mnt"])
            if namespaces.identity(caller.user) != (status.st_dev, status.st_ino):
                # From here on the caller may signal this process. It cannot trace it: its memory is still ours.
                namespaces.setns(caller.user, CLONE["user"])
                confine.die_with(parent)
            namespaces.unshare(CLONE[kind])
            made = os.open(f"ns/{_NEW_LINKS.get(kind, kind)}", os.O_RDONLY | os.O_CLOEXEC, dir_fd=own)
            if kind == "mnt":  # once more: the caller may have stopped this process, and mounted meanwhile
                _check_mounts(own, made)
            return made

    def set_up(self, namespace: int) -> None:
        """Bring `lo` up, and connect it, if the rule says so."""
        enter, change = self.raised("CAP_SYS_ADMIN"), self.raised("CAP_NET_ADMIN")
        uplink = self.ask.wanted[0].uplink
        if uplink is not None:
            connect(namespace, uplink, self.ask.owner, self.ask.maximum, enter, change)
            return
        with enter:
            namespaces.setns(namespace, CLONE["net"])
        with change, RtNetlink() as inside:
            inside.set_up(inside.link("lo").number)

    # ---- sockets

    def socket(self, asked: Socket) -> int:
        """An owned socket that lives in the namespace; without a capability raised, but to enter, and to bind."""
        with self.raised("CAP_SYS_ADMIN"):
            namespaces.setns(_open_named(asked.namespace), CLONE["net"])
        sock = socket.socket(_FAMILIES[asked.family], _TYPES[asked.type] | socket.SOCK_NONBLOCK)
        if asked.port:
            if asked.type == "stream":  # a server that is started again finds its port free
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if asked.family == "inet6":  # or it would take the IPv4 port too, which nobody asked for
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            with self.raised("CAP_NET_BIND_SERVICE"):
                sock.bind(("::" if asked.family == "inet6" else "0.0.0.0", asked.port))  # noqa: S104 -- as documented
        return sock.detach()


def _open_named(name: str) -> int:
    try:
        return namespaces.open_named(name)
    except FileNotFoundError:
        raise NoSuchResource("there is no such namespace now") from None
    except NotANamespace as error:
        raise NotWhatItWas(str(error)) from None


def _check_mounts(folder: int, namespace: int) -> None:
    """Raises OSError, ENOSPC, for a mount namespace with too many: each copy's memory counts for this service."""
    if count_mounts(folder, namespace, _MOUNTS) > _MOUNTS:
        raise OSError(errno.ENOSPC, "too many mounts")


def count_mounts(folder: int, namespace: int, most: int) -> int:
    """How many mounts are in a mount namespace, of which the borrowed `namespace` is a descriptor.

    `folder` is that of a process in it, below /proc, borrowed. Before Linux 6.12, which does not say how many there
    are, those that the process sees, all below its root; of more than `most`, some number above that. Needs
    CAP_SYS_PTRACE over it.
    """
    there = namespaces.mounts_in(namespace)
    if there is not None:
        return there
    descriptor, count = os.open("mountinfo", os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder), 0
    try:
        while count <= most and (part := os.read(descriptor, 65536)):
            count += part.count(b"\n")
        return count
    finally:
        os.close(descriptor)
