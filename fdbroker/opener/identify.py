"""Stage identify: who asks, by the kernel alone, once per connection.

Runs in: opener. An attacker controls its program's `comm`, which goes into the audit record only, and with which of
its user's uids the program runs.
"""

from __future__ import annotations

import os
import socket

from fdbroker.kernel import processes, sockets
from fdbroker.kernel.sockets import Credentials
from fdbroker.policy.owners import Owners
from fdbroker.terms import OTHERS, Groups, Subject


class WhoseUnknown(Exception):
    """The process that connected has ended, or /proc hides it, and its uid alone does not say whose it is."""


class Identifier:
    """Owns a descriptor of /proc until `close`, and knows the id maps of our own user namespace."""

    def __init__(self) -> None:
        self._proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._own_maps = processes.id_maps(self._proc, os.getpid())

    def close(self) -> None:
        """Nobody can be identified any more."""
        os.close(self._proc)

    def owner(self, sock: socket.socket, credentials: Credentials, owners: Owners) -> int:
        """The user behind the uid of an accepted connection, for whom everything is counted; borrows `sock`.

        A uid that `owners` does not know counts for the user in whose slice its process is, else for OTHERS; that of
        a container which root started, too, for root's own account is not for others to use up. Raises OSError, and
        WhoseUnknown when nothing can be read of that process: nobody gets rid of a deny rule for its user by that.
        Before Linux 6.5 the kernel does not say which process it was, and it is OTHERS.
        """
        owner = owners.of(credentials.uid)
        if owner is not None:
            return owner
        pidfd = sockets.peer_pidfd(sock)
        if pidfd is None:
            if sockets.says_peer_pidfd(sock):
                raise WhoseUnknown
            return OTHERS
        try:
            place = processes.place(self._proc, credentials.pid)
            if not processes.is_alive(pidfd):
                raise WhoseUnknown
            return place.uid if place.uid > 0 else OTHERS
        except OSError:
            raise WhoseUnknown from None
        finally:
            os.close(pidfd)

    def identify(self, sock: socket.socket, owners: Owners) -> Subject:
        """Who called connect(2) on the other end of an accepted connection; borrows `sock`.

        SO_PEERCRED, SO_PEERGROUPS and SO_PEERSEC, frozen at that moment; foreign until `describe` shows otherwise.
        Raises OSError: then this client alone is refused.
        """
        credentials = sockets.peer_credentials(sock)
        packed = sockets.peer_groups(sock)
        packed.append(credentials.gid)
        gids = Groups(packed)
        label = sockets.peer_label(sock)
        owner = self.owner(sock, credentials, owners)
        return Subject(credentials.uid, gids, credentials.gid, credentials.pid, "", label, foreign=True, owner=owner)

    def process(self, sock: socket.socket, subject: Subject, let_in_s: float) -> int | None:
        """An owned pidfd of who called connect(2) on the other end, or None once it is gone; borrows `sock`.

        Before Linux 6.5 the kernel does not say which process that was. Then it is who has its number and its uid, and
        ran already when the connection was let in, at `let_in_s` of CLOCK_BOOTTIME. Raises OSError.
        """
        pidfd = sockets.peer_pidfd(sock)
        if pidfd is not None or sockets.says_peer_pidfd(sock):
            return pidfd
        try:
            with processes.Process(subject.pid) as process:
                same = process.euid() == subject.uid and process.started_s() <= let_in_s
                return os.dup(process.pidfd) if same else None
        except OSError:
            return None

    def describe(self, sock: socket.socket, subject: Subject) -> Subject:
        """The subject with what /proc says of its process, as far as that is its process still (`process`).

        When it is gone, it stays nameless and foreign. Raises OSError, EMFILE among others: then this client alone is
        refused.
        """
        pidfd = self.process(sock, subject, processes.boot_s())
        if pidfd is None:
            return subject
        try:
            comm = processes.comm(self._proc, subject.pid)
            maps = processes.id_maps(self._proc, subject.pid)
            try:
                place = processes.place(self._proc, subject.pid)
            except OSError:
                place = processes.NOWHERE
            if not processes.is_alive(pidfd):  # what was read may be another process's
                return subject
        finally:
            os.close(pidfd)
        session = place.session if place.uid == subject.uid else ""
        return subject._replace(comm=comm, foreign=maps is None or maps != self._own_maps, session=session)
