"""A client of scripts/bench that asks for new network namespaces: newnet.py SOCKET ROUNDS.

In a user namespace of its own it makes one itself, by a forked child as the broker's worker does, which brings `lo` up as
the worker does, and asks the broker for one, in turns. Prints one line a round: nanoseconds for its own, and for the broker's.
"""

import ctypes
import fcntl
import json
import os
import socket
import struct
import sys
import time
from collections.abc import Callable

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 0x1  # netdevice(7)
_ASKED = {"resources": [{"namespace": {"type": "net", "create": True}}]}
_CALL = {"method": "io.fdbroker.Broker.Open", "parameters": _ASKED}
_LIBC = ctypes.CDLL(None, use_errno=True)


def _unshare(flags: int) -> None:
    if _LIBC.unshare(flags) != 0:
        raise OSError(ctypes.get_errno(), "unshare")


def _is_up() -> bool:
    """Whether `lo` is up in the namespace of this process."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_one:
        found = fcntl.ioctl(any_one, _SIOCGIFFLAGS, struct.pack("16sh14x", b"lo", 0))
    return bool(struct.unpack("16sh14x", found)[1] & _IFF_UP)


def _bring_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_one:
        fcntl.ioctl(any_one, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP))


def _make() -> list[int]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        child = os.fork()
        if child == 0:
            _unshare(_CLONE_NEWNET)
            _bring_up()
            socket.send_fds(theirs, [b"x"], [os.open("/proc/self/ns/net", os.O_RDONLY)])
            os._exit(0)
        numbers = socket.recv_fds(ours, 1, 1)[1]
        os.waitpid(child, 0)
    return numbers


def _ask(broker: socket.socket) -> list[int]:
    broker.sendall(json.dumps(_CALL).encode() + b"\0")
    data, numbers, _, _ = socket.recv_fds(broker, 65536, 1)
    if not numbers:
        raise SystemExit(f"no descriptor: {data!r}")
    return numbers


def _timed(work: Callable[..., list[int]], *arguments: socket.socket) -> int:
    began = time.perf_counter_ns()
    numbers = work(*arguments)
    took = time.perf_counter_ns() - began
    for number in numbers:
        os.close(number)
    return took


def _same(numbers: list[int]) -> None:
    """Whether what is compared is the same: a namespace whose `lo` is up."""
    child = os.fork()
    if child == 0:
        up = _LIBC.setns(numbers[0], _CLONE_NEWNET) == 0 and _is_up()
        os._exit(0 if up else 1)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0:
        raise SystemExit("lo is not up")
    for number in numbers:
        os.close(number)


def main() -> None:
    """Measure."""
    address, rounds = sys.argv[1:]
    uid, gid = os.getuid(), os.getgid()
    _unshare(_CLONE_NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    with socket.socket(socket.AF_UNIX) as broker:
        broker.connect(address)
        _same(_make())
        _same(_ask(broker))
        for _ in range(int(rounds)):
            print(_timed(_make), _timed(_ask, broker))


main()
