"""Descriptors whose last close takes as long as their owner likes, for any user: TCP sockets with SO_LINGER."""

from __future__ import annotations

import array
import contextlib
import socket
import struct


class Lingering:
    """So many sockets whose last close waits for `seconds`, for their other ends never read, until these are closed."""

    def __init__(self, seconds: int, count: int = 1):
        self.ours: list[socket.socket] = []
        self.others: list[socket.socket] = []
        with socket.socket() as server:
            # soon full, and little of the machine's memory
            server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            server.bind(("127.0.0.1", 0))
            server.listen()
            for _ in range(count):
                one = socket.socket()
                one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
                one.connect(server.getsockname())
                self.others.append(server.accept()[0])
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, seconds))
                one.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    while True:
                        one.send(bytes(65536))
                self.ours.append(one)

    def give(self, sock: socket.socket, data: bytes, flags: int = 0) -> list[socket.socket]:
        """Send them with these bytes: from then on nobody but the receiver has them. Returns their other ends."""
        numbers = array.array("i", [one.fileno() for one in self.ours])
        sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)], flags)  # socket.send_fds forgets flags
        for one in self.ours:
            one.close()
        return self.others
