"""What waits for the program of a FUSE file system: a file of ALICE's whose close does, a node of root's whose opening does."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
from harness import ALICE

# Source: linux/fuse.h
LOOKUP, GETATTR, FORGET, OPEN, RELEASE, FLUSH, INIT, INTERRUPT = 1, 3, 2, 14, 18, 25, 26, 36
_HEADER = struct.Struct("<IIQQIIII")  # struct fuse_in_header


_INIT = struct.pack("<IIIIHHIIHHI28x", 7, 31, 65536, 0, 12, 10, 65536, 1, 16, 0, 0)
FUSE = os.makedev(10, 229)


def _attributes(inode: int, mode: int, owner: int = ALICE, rdev: int = 0) -> bytes:
    return struct.pack("<6Q10I", inode, *[0] * 5, *[0] * 3, mode, 1, owner, owner, rdev, 4096, 0)


def _serve(device: int) -> None:
    while True:
        asked = os.read(device, 1 << 20)
        _, what, unique, inode, *_ = _HEADER.unpack_from(asked)
        body, error = b"", 0
        if what in (FLUSH, INTERRUPT, FORGET):
            continue
        if what == INIT:
            body = _INIT
        elif what == LOOKUP:
            body = struct.pack("<QQQQII", 2, 0, 1, 1, 0, 0) + _attributes(2, 0o100666)
        elif what == GETATTR:
            body = struct.pack("<QII", 1, 0, 0) + _attributes(inode, 0o40755 if inode == 1 else 0o100666)
        elif what == OPEN:
            body = struct.pack("<QII", 7, 0, 0)
        elif what != RELEASE:
            error = -38  # ENOSYS
        os.write(device, struct.pack("<IiQ", 16 + len(body), error, unique) + body)


def forked(action: Callable[..., Any], *arguments: Any) -> int:
    """The pid of a child that does this and ends."""
    child = os.fork()
    if child == 0:
        try:
            action(*arguments)
        finally:
            os._exit(0)
    return child


def become(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def _device(where: Path) -> int:
    harness.node(str(where / "device"), FUSE)
    try:
        return os.open(where / "device", os.O_RDWR)
    except OSError as error:
        harness.cannot(f"no /dev/fuse: {error}")
        raise


@contextlib.contextmanager
def unanswered(where: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """The path of such a file, which ALICE may open, and what ends its program, so that all that wait go on."""
    device, at = _device(where), str(where / "fuse")
    os.mkdir(at)
    harness.mount("unanswered", at, "fuse", 0, f"fd={device},rootmode=40000,user_id={ALICE},group_id={ALICE}")
    server = forked(_serve, device)
    os.close(device)
    ended: list[int] = []

    def end() -> None:
        if not ended:
            os.kill(server, signal.SIGKILL)
            ended.append(os.waitpid(server, 0)[0])

    try:
        yield at + "/file", end
    finally:
        end()
        harness.unmount(at)


@contextlib.contextmanager
def holder(path: str, send: Callable[[int], None]) -> Iterator[None]:
    """A process of ALICE's has the file open, which `send` has sent, until the block ends, and the program before."""
    reading, writing = os.pipe()

    def hold() -> None:
        become(ALICE)
        send(os.open(path, os.O_RDWR))
        os.write(writing, b"x")
        signal.pause()

    child = forked(hold)
    os.close(writing)
    try:
        assert os.read(reading, 1) == b"x"
        yield
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


class Held:
    """A node, at `path`, whose opening waits: for that the kernel asks its program who may, after a look has asked it.

    The node is a device of root's, mode 0600, that itself never waits, and another one than those of drivers/char/mem.c.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._says, self._tells = os.pipe()
        self._waits, self._goes = os.pipe()

    def serve(self, device: int) -> None:
        """Be the program: the second question about the node's attributes after `hold` waits for `go_on`."""
        armed = -1
        while True:
            asked = os.read(device, 1 << 20)
            _, what, unique, inode, _, _, thread, _ = _HEADER.unpack_from(asked)
            if what in (INTERRUPT, FORGET):
                continue
            body, error = b"", 0
            node = _attributes(2, 0o020600, 0, FUSE)
            if what == INIT:
                body = _INIT
            elif what == LOOKUP:  # the name holds for ever, the attributes not a moment
                body = struct.pack("<QQQQII", 2, 0, 3600, 0, 0, 0) + node
            elif what == GETATTR and inode == 1:
                body = struct.pack("<QII", 3600, 0, 0) + _attributes(1, 0o40755, 0)
            elif what == GETATTR:
                if select.select([self._waits], [], [], 0)[0]:
                    os.read(self._waits, 1)
                    armed = 2
                armed -= 1
                if armed == 0:
                    os.write(self._tells, struct.pack("<I", thread))
                    os.read(self._waits, 1)
                body = struct.pack("<QII", 0, 0, 0) + node
            else:
                error = -38  # ENOSYS
            os.write(device, struct.pack("<IiQ", 16 + len(body), error, unique) + body)

    def hold(self) -> None:
        """Let the next opening wait, once the node was looked at."""
        os.write(self._goes, b"x")

    def by(self) -> int:
        """The number of the thread that waits in there, or 0 when none has begun to in PATIENCE_S."""
        if not select.select([self._says], [], [], harness.PATIENCE_S)[0]:
            return 0
        (thread,) = struct.unpack("<I", os.read(self._says, 4))
        return int(thread)

    def go_on(self) -> None:
        """It waits no longer."""
        os.write(self._goes, b"x")

    def close(self) -> None:
        for number in (self._says, self._tells, self._waits, self._goes):
            os.close(number)


@contextlib.contextmanager
def held(where: Path, at: str) -> Iterator[Held]:
    """Such a node in the folder `at`, which is made."""
    device = _device(where)
    os.mkdir(at)
    harness.mount(
        "held", at, "fuse", 0, f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions"
    )
    one = Held(f"{at}/node")
    server = forked(one.serve, device)
    os.close(device)
    try:
        yield one
    finally:
        os.kill(server, signal.SIGKILL)  # whoever waits goes on, with an error
        os.waitpid(server, 0)
        one.close()
        harness.unmount(at)
