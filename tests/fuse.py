"""A file whose close waits: of a FUSE file system of ALICE's, whose program answers everything but FLUSH."""

from __future__ import annotations

import contextlib
import os
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


def _attributes(inode: int, mode: int) -> bytes:
    return struct.pack("<6Q10I", inode, *[0] * 5, *[0] * 3, mode, 1, ALICE, ALICE, 0, 4096, 0)


def _serve(device: int) -> None:
    while True:
        asked = os.read(device, 1 << 20)
        _, what, unique, inode, *_ = _HEADER.unpack_from(asked)
        body, error = b"", 0
        if what in (FLUSH, INTERRUPT, FORGET):
            continue
        if what == INIT:
            body = struct.pack("<IIIIHHIIHHI28x", 7, 31, 65536, 0, 12, 10, 65536, 1, 16, 0, 0)
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


@contextlib.contextmanager
def unanswered(where: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """The path of such a file, which ALICE may open, and what ends its program, so that all that wait go on."""
    device_path, at = str(where / "device"), str(where / "fuse")
    harness.node(device_path, os.makedev(10, 229))
    os.mkdir(at)
    try:
        device = os.open(device_path, os.O_RDWR)
    except OSError as error:
        harness.cannot(f"no /dev/fuse: {error}")
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
