"""Stage identify: who asks, by the kernel alone, once per connection.

Runs in: opener. An attacker controls its program's `comm`, which goes into the audit record only.
"""

from __future__ import annotations

import os
import socket

from fdbroker.kernel import processes, sockets
from fdbroker.terms import Subject


class Identifier:
    """Owns a descriptor of /proc, and knows the id maps of our own user namespace."""

    def __init__(self) -> None:
        self._proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._own_maps = processes.id_maps(self._proc, os.getpid())

    def identify(self, sock: socket.socket) -> Subject:
        """The process at the other end of an accepted connection; borrows `sock`.

        Identity is that of connect(2): SO_PEERCRED and SO_PEERGROUPS. What /proc says is taken only while
        SO_PEERPIDFD shows that the pid is still that process; before Linux 6.5, or when it is gone, it counts as
        unknown and foreign. Raises OSError, EMFILE among others: then this client alone is refused.
        """
        credentials = sockets.peer_credentials(sock)
        gids = sockets.peer_groups(sock) | {credentials.gid}
        label = sockets.peer_label(sock)
        comm, shares = "", False
        pidfd = sockets.peer_pidfd(sock)
        if pidfd is not None:
            try:
                comm = processes.comm(self._proc, credentials.pid)
                maps = processes.id_maps(self._proc, credentials.pid)
                shares = maps is not None and maps == self._own_maps
                if not processes.is_alive(pidfd):  # what was read may be another process's
                    comm, shares = "", False
            finally:
                os.close(pidfd)
        return Subject(credentials.uid, gids, credentials.gid, credentials.pid, comm, label, foreign=not shares)
