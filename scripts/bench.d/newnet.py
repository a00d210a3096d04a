"""A client of scripts/bench that asks for new network namespaces: newnet.py SOCKET ROUNDS.

In a user namespace of its own it makes one itself, by a forked child as the broker's worker does, and asks the broker
for one, in turns. Prints one line a round: nanoseconds for its own, and for the broker's.
"""

import ctypes
import json
import os
import socket
import sys
import time
from collections.abc import Callable

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_ASKED = {"resources": [{"namespace": {"type": "net", "create": True}}]}
_CALL = {"method": "io.fdbroker.Broker.Open", "parameters": _ASKED}
_LIBC = ctypes.CDLL(None, use_errno=True)


def _unshare(flags: int) -> None:
    if _LIBC.unshare(flags) != 0:
        raise OSError(ctypes.get_errno(), "unshare")


def _make() -> list[int]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        child = os.fork()
        if child == 0:
            _unshare(_CLONE_NEWNET)
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
        for _ in range(int(rounds)):
            print(_timed(_make), _timed(_ask, broker))


main()
