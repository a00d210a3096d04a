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
        """Who called connect(2) on the other end of an accepted connection; borrows `sock`.

        SO_PEERCRED, SO_PEERGROUPS and SO_PEERSEC, frozen at that moment; foreign until `describe` shows otherwise.
        Raises OSError: then this client alone is refused.
        """
        credentials = sockets.peer_credentials(sock)
        gids = sockets.peer_groups(sock) | {credentials.gid}
        label = sockets.peer_label(sock)
        return Subject(credentials.uid, gids, credentials.gid, credentials.pid, "", label, foreign=True)

    def describe(self, sock: socket.socket, subject: Subject) -> Subject:
        """The subject with what /proc says of its process, as far as SO_PEERPIDFD shows that it is that process still.

        Before Linux 6.5, or when it is gone, it stays nameless and foreign. Raises OSError, EMFILE among others: then
        this client alone is refused.
        """
        pidfd = sockets.peer_pidfd(sock)
        if pidfd is None:
            return subject
        try:
            comm = processes.comm(self._proc, subject.pid)
            maps = processes.id_maps(self._proc, subject.pid)
            session = processes.session(self._proc, subject.pid)
            if not processes.is_alive(pidfd):  # what was read may be another process's
                return subject
        finally:
            os.close(pidfd)
        return subject._replace(comm=comm, foreign=maps is None or maps != self._own_maps, session=session)
