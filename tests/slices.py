"""Control groups as logind makes them, real ones: in a control group namespace of the test's own, whose root is empty."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

from harness import LIBC, cannot, folder, mount, unmount

_CLONE_NEWCGROUP = 0x0200_0000


class Slices:
    """The control groups below `root`, which in the namespace is the root of all."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @contextlib.contextmanager
    def within(self, place: str) -> Iterator[None]:
        """This process, and what it starts, in the group of that path; "" for where it was before."""
        group = self.root / place
        group.mkdir(parents=True, exist_ok=True)
        (group / "cgroup.procs").write_text("0")
        try:
            yield
        finally:
            (self.root / "cgroup.procs").write_text("0")


@contextlib.contextmanager
def own_slices() -> Iterator[Slices]:
    """This process, and a broker that it starts, see these groups only, and name them from their root on."""
    before = os.open("/proc/self/ns/cgroup", os.O_RDONLY | os.O_CLOEXEC)
    with folder() as where:
        mount("cgroup2", str(where), "cgroup2")
        own = where / _path().lstrip("/")
        root = own / f"fdbroker-test-{os.getpid()}"
        try:
            root.mkdir()
            (root / "cgroup.procs").write_text("0")
            if LIBC.unshare(_CLONE_NEWCGROUP) != 0:
                cannot(f"no control group namespace: {os.strerror(ctypes.get_errno())}")
            assert _path() == "/"
            yield Slices(root)
        finally:
            assert LIBC.setns(before, _CLONE_NEWCGROUP) == 0
            os.close(before)
            (own / "cgroup.procs").write_text("0")
            for group in sorted((path for path in (root, *root.rglob("*")) if path.is_dir()), reverse=True):
                group.rmdir()
            unmount(str(where))


def _path() -> str:
    """The group that this process is in, of the one tree of version 2."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    return next(line[3:] for line in lines if line.startswith("0::"))
