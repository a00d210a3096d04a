"""Brokers that are none: a socket at which every client gets the same bytes."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

from harness import folder

from fdbroker.wire.connections import Came


@contextlib.contextmanager
def answering(answer: bytes, *, unread: bool) -> Iterator[str]:
    """The address where every client gets `answer` and then the end: at once, or once something of it was read.

    With `unread` the client is turned away as at accept: its bytes stay unread, whenever they come.
    """
    with folder() as where, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(where / "socket"))
        (where / "socket").chmod(0o666)
        listener.listen()

        def serve() -> None:
            while True:
                try:
                    sock, _ = listener.accept()
                except OSError:
                    return
                with sock, contextlib.suppress(OSError):
                    if not unread:
                        sock.recv(65536)
                    sock.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield str(where / "socket")
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def came(number, uid, owner=None, pid=1, foreign=False, label="", gids=(), gid=0):
    """What the opener says of a connection, whose owner is its uid unless it is said."""
    return Came(number, uid, gid, pid, uid if owner is None else owner, foreign, label, "", gids)
