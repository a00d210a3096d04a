"""What /proc shows about another process: its name for itself, its ids, its session, its namespaces.

Runs in: opener, namespaces worker, command line. The process's owner controls `comm`, and nothing else here.
"""

from __future__ import annotations

import os
import re
import select
import time
from types import TracebackType
from typing import NamedTuple, Self

_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


def is_alive(pidfd: int) -> bool:
    """Whether the process of the borrowed `pidfd` still runs. Source: pidfd_open(2): readable once it ended."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return not poll.poll(0)


def boot_s() -> float:
    """Now, on the clock of `Process.started_s`."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _read(proc: int, name: str) -> bytes:
    descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=proc)
    try:
        data = b""
        while part := os.read(descriptor, 65536):  # a user in many groups has a long status
            data += part
        return data
    finally:
        os.close(descriptor)


def comm(proc: int, pid: int) -> str:
    """The name that process `pid` gives itself, at most 15 bytes, or "" once it is gone. `proc` is /proc, borrowed."""
    try:
        return _read(proc, f"{pid}/comm").rstrip(b"\n").decode(errors="backslashreplace")
    except OSError:
        return ""


# The line of cgroup(5) for the tree that systemd manages. Root alone puts a process into `user-UID.slice` and, right
# below it, `session-ID.scope`; a user may make whatever it likes in what is delegated to it, further below.
_SLICE = re.compile(rb"0::/user\.slice/user-(0|[1-9][0-9]{0,9})\.slice(/[^\n]*)?")
_SCOPE = re.compile(rb"/session-([A-Za-z0-9_]{1,32})\.scope")


class Place(NamedTuple):
    """Where logind put a process: in the slice of user `uid`, -1 for none, and in the user's `session`, "" for none."""

    uid: int
    session: str


NOWHERE = Place(-1, "")


def place(proc: int, pid: int) -> Place:
    """The login session of process `pid`, as logind names it, and its user, by the process's control group.

    Raises OSError when it has ended, or is hidden from us: proc(5), hidepid.
    """
    for line in _read(proc, f"{pid}/cgroup").split(b"\n"):
        if found := _SLICE.fullmatch(line):
            scope = _SCOPE.fullmatch(found[2] or b"")
            return Place(int(found[1]), scope[1].decode() if scope else "")
    return NOWHERE


def id_maps(proc: int, pid: int) -> tuple[bytes, bytes] | None:
    """The uid and gid map of the user namespace of process `pid`, None when they cannot be read.

    The namespace itself would need CAP_SYS_PTRACE. A namespace with other ids than ours has other maps; one with
    the very same maps can only be made by who may act as every one of these ids already. Source: user_namespaces(7).
    """
    try:
        return _read(proc, f"{pid}/uid_map"), _read(proc, f"{pid}/gid_map")
    except OSError:
        return None


def fields(status: bytes) -> dict[bytes, bytes]:
    """The values of /proc/PID/status by their names. A newline alone ends a line, for a process's name may have CR."""
    return dict(line.partition(b":\t")[::2] for line in status.split(b"\n"))


class Status(NamedTuple):
    """Real, effective, saved and file system ids; permitted and effective capabilities as bits."""

    uids: tuple[int, ...]
    gids: tuple[int, ...]
    permitted: int
    effective: int


class Process:
    """One process, pinned: a pidfd, and its folder of /proc, which never becomes another process's.

    Takes `pidfd`, if given. Raises ProcessLookupError when there is no such process now, or only what is left of it.
    Leave the `with` block, or call `close`.
    """

    def __init__(self, pid: int, pidfd: int | None = None) -> None:
        self.pidfd = os.pidfd_open(pid) if pidfd is None else pidfd
        try:
            self.folder = os.open(f"/proc/{pid}", _FOLDER)
        except FileNotFoundError:
            os.close(self.pidfd)
            raise ProcessLookupError(f"there is no process {pid}") from None
        except BaseException:
            os.close(self.pidfd)
            raise
        # while it lives nobody else has its number, so the folder is the same process's as the pidfd
        if not is_alive(self.pidfd):
            self.close()
            raise ProcessLookupError(f"process {pid} has ended")

    @classmethod
    def of(cls, pidfd: int) -> Self:
        """The process of a pidfd, which is taken. Raises ProcessLookupError as well when it is not in our sight."""
        with open(f"/proc/self/fdinfo/{pidfd}", "rb") as file:
            pids = [int(line[4:]) for line in file if line.startswith(b"Pid:")]
        if not pids or pids[0] <= 0:
            os.close(pidfd)
            raise ProcessLookupError("the process has ended, or is in another pid namespace")
        return cls(pids[0], pidfd)

    def euid(self) -> int:
        """Its effective uid now, however many groups it has, and whether it is dumpable or not."""
        return os.fstat(self.folder).st_uid

    def status(self) -> Status:
        """Its ids and capabilities now. Takes long for a process in many groups: `uids_of`."""
        said = fields(_read(self.folder, "status"))
        return Status(
            tuple(map(int, said[b"Uid"].split())),
            tuple(map(int, said[b"Gid"].split())),
            int(said[b"CapPrm"], 16),
            int(said[b"CapEff"], 16),
        )

    def started_s(self) -> float:
        """When it started, in seconds of CLOCK_BOOTTIME, rounded down to hundredths. Source: proc(5), "starttime"."""
        # behind its name, which may have anything in it
        words = _read(self.folder, "stat").rpartition(b")")[2].split()
        return int(words[19]) / os.sysconf("SC_CLK_TCK")

    def namespace(self, kind: str) -> int:
        """An owned descriptor of its namespace of that type. Needs CAP_SYS_PTRACE over it, or to be it."""
        return os.open(f"ns/{kind}", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.folder)

    def close(self) -> None:
        """Let go of it."""
        os.close(self.folder)
        os.close(self.pidfd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def state(pid: int) -> bytes:
    """The state of a process, such as b"T" for a stopped one, b"" when there is none. Source: proc_pid_stat(5)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b") ")[2][:1]
    except OSError:
        return b""
