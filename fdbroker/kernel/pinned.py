"""One process, pinned so that nothing read about it is another process's: its ids, its capabilities, its namespaces.

Runs in: namespaces worker, witness, launcher, command line. The process's owner controls none of it.
"""

from __future__ import annotations

import os
from types import TracebackType
from typing import NamedTuple, Self

from fdbroker.kernel.processes import is_alive, read

_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


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

    def status(self) -> Status:
        """Its ids and capabilities now. Takes long for a process in many groups: `uids_of`."""
        said = fields(read(self.folder, "status"))
        return Status(
            tuple(map(int, said[b"Uid"].split())),
            tuple(map(int, said[b"Gid"].split())),
            int(said[b"CapPrm"], 16),
            int(said[b"CapEff"], 16),
        )

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
