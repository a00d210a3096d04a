"""Start the children: each by exec, with its orders, an environment of our own, and exactly its descriptors.

Runs in: launcher, as root.
"""

from __future__ import annotations

import contextlib
import grp
import importlib.util
import os
import pwd
import socket
import subprocess
import sys
import time
from typing import NamedTuple

from fdbroker.kernel import landlock, lifeline, orders
from fdbroker.kernel.confine import Order
from fdbroker.kernel.link import Link
from fdbroker.kernel.sealed import sealed_memfd
from fdbroker.launcher import own, state
from fdbroker.launcher.filters import compile_filter
from fdbroker.launcher.needs import Needs
from fdbroker.limits import launcher as limits

# the ids that systemd's DynamicUser= takes from: systemd.io, "Users, Groups, UIDs and GIDs"
_DYNAMIC_IDS = range(61184, 65520)
# what SQLite does in the folder of the stored messages
STATE_RIGHTS = landlock.READ_FILE | landlock.READ_DIR | landlock.WRITE_FILE | landlock.TRUNCATE
STATE_RIGHTS |= landlock.MAKE_REG | landlock.REMOVE_FILE
# to see in which user namespace an administrator is
WITNESS_NEEDS = frozenset({"CAP_SYS_PTRACE"})
_END_S = 1.0  # in which processes that were killed are gone
# what the children import beside the standard library and each other
_PACKAGES = ("fdbroker", "prctl", "msgspec")
_USERS = {name: f"fdbroker-{name}" for name in ("opener", "keeper", "inbox", "namespaces")}


class _Kept(NamedTuple):
    """What a child keeps; see orders.Order."""

    capabilities: frozenset[str] = frozenset()
    groups: frozenset[int] = frozenset()
    files: dict[str, int] | None = None


class Child(NamedTuple):
    """A running child, the launcher's end of the link to it, and what ends the child when it is closed."""

    name: str
    process: subprocess.Popen[bytes]
    link: Link
    life: tuple[int, ...]

    def tell(self, message: bytes) -> None:
        """Send, or queue. A child that has ended is told nothing, as is read next: a stop is none the worse for it."""
        with contextlib.suppress(OSError):
            self.link.send(message)


def end(*children: Child) -> None:
    """Kill those that still run, and close all that belongs to them."""
    for child in children:
        for descriptor in reversed(child.life):  # whoever writes first: that kills it, see lifeline.py
            os.close(descriptor)
        child.link.close()
    until_s = time.monotonic() + _END_S
    for child in children:
        with contextlib.suppress(subprocess.TimeoutExpired):  # one of its threads may wait in the kernel
            child.process.wait(max(0.0, until_s - time.monotonic()))


def identities(state_owner: int | None = None) -> dict[str, tuple[int, int]]:
    """Find uid and gid for each child: its system user, or where that does not exist an unused dynamic id.

    Where messages have been stored before by a dynamic id, the inbox gets that one again.
    """
    found = {}
    # first: the opener must not happen to get the inbox's
    taken = set() if state_owner is None else {state_owner}
    for name, user in _USERS.items():
        try:
            entry = pwd.getpwnam(user)
            found[name] = (entry.pw_uid, entry.pw_gid)
        except KeyError:
            number = _unused_id(taken)
            if name == "inbox" and state_owner is not None and state_owner in _DYNAMIC_IDS and not _known(state_owner):
                number = state_owner
            taken.add(number)
            found[name] = (number, number)
    return found


def _unused_id(taken: set[int]) -> int:
    running = set()
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(FileNotFoundError):  # it ended meanwhile
                running.add(os.stat(f"/proc/{name}").st_uid)
    # not always the first: two brokers that start together must not meet
    first = os.getpid() * 2 % len(_DYNAMIC_IDS)
    for offset in range(len(_DYNAMIC_IDS)):
        number = _DYNAMIC_IDS[(first + offset) % len(_DYNAMIC_IDS)]
        if number not in taken and number not in running and not _known(number):
            return number
    raise OSError("no unused id in systemd's dynamic range")


def _known(number: int) -> bool:
    try:
        pwd.getpwuid(number)
    except KeyError:
        try:
            grp.getgrgid(number)
        except KeyError:
            return False
    return True


def start_children(
    listener: socket.socket, policy: bytes, need: Needs, folder: str, journal: socket.socket | None
) -> list[Child]:
    """Start opener and inbox, and the namespaces worker where needed; the caller owns them, and keeps the sockets.

    `folder` is for stored messages. Raises StateUnusable before anything is started.
    """
    ids = identities(state.owner(folder) if need.store else None)
    inbox_files: dict[str, int] = {}
    if need.store:
        state.prepare(folder, *ids["inbox"])
        inbox_files = {folder: STATE_RIGHTS}
    with contextlib.ExitStack() as ours:  # closed here, once the children have them

        def pair() -> tuple[socket.socket, socket.socket]:
            ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            ours.enter_context(ends[1])
            return ends

        to_opener, opener_end = pair()
        to_inbox, inbox_end = pair()
        to_keeper, keeper_end = pair()
        opener_inbox, inbox_opener = map(ours.enter_context, pair())
        opener_keeper, keeper_opener = map(ours.enter_context, pair())
        inbox_keeper, keeper_inbox = map(ours.enter_context, pair())
        policy_fd = sealed_memfd("policy", policy)
        ours.callback(os.close, policy_fd)
        opener = {
            "listener": listener.fileno(),
            "launcher": opener_end.fileno(),
            "inbox": opener_inbox.fileno(),
            "keeper": opener_keeper.fileno(),
            "policy": policy_fd,
        }
        inbox = {
            "launcher": inbox_end.fileno(),
            "opener": inbox_opener.fileno(),
            "keeper": inbox_keeper.fileno(),
            "policy": policy_fd,
        }
        keeper = {
            "launcher": keeper_end.fileno(),
            "opener": keeper_opener.fileno(),
            "inbox": keeper_inbox.fileno(),
            "policy": policy_fd,
        }
        if journal is not None:
            opener["journal"] = inbox["journal"] = keeper["journal"] = journal.fileno()
        children = []
        if need.worker is not None:
            to_worker, worker_end = pair()
            opener_worker, worker_opener = pair()
            opener["worker"] = ours.enter_context(opener_worker).fileno()
            worker = {"launcher": worker_end.fileno(), "opener": worker_opener.fileno()}
            started = _start("namespaces", ids["namespaces"], worker, _Kept(need.worker))
            children.append(_child("namespaces", started, to_worker))
        kept = _Kept(need.capabilities, need.groups, need.files)
        to_witness, witness_end = pair()
        held = own.effective()
        started = _start(
            "witness", (os.getuid(), os.getgid()), {"launcher": witness_end.fileno()}, _Kept(WITNESS_NEEDS & held)
        )
        children.append(_child("witness", started, to_witness))
        return [
            _child("opener", _start("opener", ids["opener"], opener, kept), to_opener),
            _child("inbox", _start("inbox", ids["inbox"], inbox, _Kept(files=inbox_files)), to_inbox),
            _child("keeper", _start("keeper", ids["keeper"], keeper, _Kept(files=need.listed)), to_keeper),
            *children,
        ]


def start_refuser(listener: socket.socket) -> Child:
    """Start what refuses everybody while there is no valid policy; the caller owns it, and keeps the listener."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        descriptors = {"listener": listener.fileno(), "launcher": theirs.fileno()}
        return _child("refuser", _start("refuser", identities()["opener"], descriptors, _Kept(files={})), ours)


def _child(name: str, process: subprocess.Popen[bytes], end: socket.socket) -> Child:
    return Child(name, process, Link(end), lifeline.bind(process.pid))


def command(name: str, order: str) -> list[str]:
    """How a child is started.

    -I takes nothing from the environment or the current folder. -S runs no `site`: no .pth file and no folder of
    /usr/local counts. The path is the standard library's, and behind it the folders where the launcher itself found its
    packages: one where the service is installed, two for an editable checkout.
    """
    code = f"import sys; sys.path += {_folders()!r}; from fdbroker.{name}.__main__ import main; sys.exit(main())"
    return [sys.executable, "-I", "-S", "-B", "-c", code, order]


def _folders() -> list[str]:
    found = []
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"{package} is not installed beside {sys.executable}", name=package)
        # a package's file is FOLDER/NAME/__init__.py, a module's FOLDER/NAME.py
        found.append(os.path.dirname(os.path.dirname(spec.origin) if spec.submodule_search_locations else spec.origin))
    return list(dict.fromkeys(found))


def _start(name: str, ids: tuple[int, int], descriptors: dict[str, int], kept: _Kept) -> subprocess.Popen[bytes]:
    stores = name == "inbox" and bool(kept.files)
    filter_fd = compile_filter("inbox-store" if stores else name)
    order = Order(
        f"{name} worker" if name == "namespaces" else name,
        *ids,
        sorted(kept.groups),
        sorted(kept.capabilities),
        None if kept.files is None else sorted(kept.files.items()),
        {**descriptors, "filter": filter_fd},
        limits.DESCRIPTORS,
        os.getpid(),
    )
    error_fd = _standard_error()
    try:
        return subprocess.Popen(
            command(name, orders.write(order)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=error_fd,
            start_new_session=True,  # without a controlling terminal: /dev/tty is nothing to a child
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"},
            pass_fds=tuple(order.descriptors.values()),
            cwd="/",
        )
    finally:
        os.close(error_fd)
        os.close(filter_fd)


def _standard_error() -> int:
    """An owned descriptor for what a child says: our standard error; where that is a terminal, for writing alone."""
    if os.isatty(2):
        return os.open("/proc/self/fd/2", os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC)
    return os.dup(2)
