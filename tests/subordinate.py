"""What the tests of owners share: connections of many uids of one user, all made by this process."""

from __future__ import annotations

import contextlib
import os
import resource
import socket


@contextlib.contextmanager
def being(uid):
    """Root's process is a user's for a moment."""
    os.setresuid(uid, uid, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


class Many:
    """Connections of many uids, in this process: each is used as the uid that made it."""

    def __init__(self, address):
        self.address = address
        self.socks = []
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    def connect(self, uid):
        with being(uid):
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(10)
            sock.connect(self.address)
            self.socks.append(sock)
            return sock

    def send(self, sock, uid, data, descriptors=()):
        with being(uid), contextlib.suppress(BrokenPipeError, ConnectionResetError, BlockingIOError):
            socket.send_fds(sock, [data], descriptors)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for sock in self.socks:
            sock.close()
