"""What scripts/bench starts, and what it reads about that in /proc; nothing that it starts outlives it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

# A uid that every user database has, daemon's or bin's: to tell whose a uid is that none has takes the service longer.
CLIENT_ID = 1
_START_S, _STOP_S = 20.0, 6.0
_PING, _PONG = b"\0\0\0\4PING", b"\0\0\0\4PONG"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Failed(Exception):
    """Something that is measured did not run; the text says what."""


def tied_to_us(cpus: Sequence[int]) -> Callable[[], None]:
    """What a child does before its exec: take these CPUs, and die with us, should we be killed."""
    libc = ctypes.CDLL(None)

    def prepare() -> None:
        os.sched_setaffinity(0, cpus)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

    return prepare


@contextlib.contextmanager
def running(
    command: Sequence[str],
    cpus: Sequence[int],
    log: IO[bytes],
    *,
    client: bool = False,
    output: bool = False,
    **options: Any,
) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own, of which nothing is left afterwards.

    A client has no rights; its output is read, and that of others with `output`. `options` are Popen's.
    """
    rights: dict[str, Any] = {"user": CLIENT_ID, "group": CLIENT_ID, "extra_groups": []} if client else {}
    process = subprocess.Popen(
        command,
        stdin=options.pop("stdin", subprocess.PIPE),
        stdout=subprocess.PIPE if client or output else subprocess.DEVNULL,
        stderr=log,
        start_new_session=True,
        preexec_fn=tied_to_us(cpus),  # noqa: PLW1509 -- we have one thread
        **rights,
        **options,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            os.kill(process.pid, signal.SIGTERM)  # not terminate(), which may reap it
            deadline_s = time.monotonic() + _STOP_S
            # without reaping it: as long as it is there, its group's number is nobody else's
            while time.monotonic() < deadline_s and not has_ended(process):
                time.sleep(0.005)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def has_ended(process: subprocess.Popen[bytes]) -> bool:
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def await_pong(process: subprocess.Popen[bytes], address: Path, log: Path) -> None:
    """Wait until the broker at `address` answers."""
    deadline_s = time.monotonic() + _START_S
    while time.monotonic() < deadline_s:
        if has_ended(process):
            raise Failed(f"{log.stem} ended: {tail(log)}")
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(_START_S)
            try:
                sock.connect(str(address))
                sock.sendall(_PING)
                if sock.recv(len(_PONG), socket.MSG_WAITALL) == _PONG:
                    return
            except OSError:
                pass
        time.sleep(0.001)
    raise Failed(f"{address} does not answer: {tail(log)}")


def tail(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:].strip() or "it said nothing"


def members(group: int) -> list[Path]:
    """The folders in /proc of a process group, and of what its members have started, in sessions of their own."""
    parents = {}
    members = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            # proc(5): after the name in parentheses come state, parent, group
            _, parent, its_group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            parents[int(folder.name)] = int(parent)
            if int(its_group) == group:
                members.add(int(folder.name))
    while more := {pid for pid, parent in parents.items() if parent in members} - members:
        members |= more
    return [Path(f"/proc/{pid}") for pid in sorted(members)]


def memory_mb(group: int) -> dict[str, float]:
    """Memory of `members` in MiB, and of how many processes: what they share counts once in "pss"."""
    found = {"pss": 0.0, "rss": 0.0, "processes": 0.0}
    for folder in members(group):
        try:
            fields = dict(line.split(":", 1) for line in (folder / "smaps_rollup").read_text().splitlines()[1:])
        except OSError:  # it ended meanwhile
            continue
        found["processes"] += 1
        for name in ("pss", "rss"):
            found[name] += int(fields[name.capitalize()].split()[0]) / 1024
    return found


def children_of(group: int) -> dict[str, int]:
    """The process ids of a broker's processes, by the module that each runs: `opener`, `inbox`."""
    found = {}
    for folder in members(group):
        with contextlib.suppress(OSError):  # it ended meanwhile
            # as fdbroker/launcher/start.py starts them, and as staged.py does
            name = re.search(rb"\bfdbroker\.(\w+)(?:\.__main__ import|\0)", (folder / "cmdline").read_bytes())
            if name:
                found[name[1].decode()] = int(folder.name)
    return found


def cpu_ns(pid: int) -> int:
    """Nanoseconds of CPU that a process of one thread has used. Source: sched-stats.rst, /proc/PID/schedstat."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0])


def switches(pid: int) -> int:
    """How often a process of one thread was switched away from, willing or not. Source: proc_pid_status(5)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)
