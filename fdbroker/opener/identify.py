"""Stage identify: who asks, by the kernel alone, once per connection.

Runs in: opener. An attacker controls its program's `comm`, which goes into the audit record only, and with which of
its user's uids the program runs.
"""

from __future__ import annotations

import os
import socket

from fdbroker.kernel import processes, sockets
from fdbroker.policy.owners import Owners
from fdbroker.terms import OTHERS, Groups, Subject


class WhoseUnknown(Exception):
    """The process that connected has ended, or /proc hides it, and its uid alone does not say whose it is.

    The one argument is the subject without its owner.
    """


class Identifier:
    """Owns a descriptor of /proc until `close`, and knows the id maps of our own user namespace."""

    def __init__(self) -> None:
        self._proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._own_maps = processes.id_maps(self._proc, os.getpid())

    def close(self) -> None:
        """Nobody can be identified any more."""
        os.close(self._proc)

    def arrived(self, sock: socket.socket, owners: Owners) -> Subject:
        """Who called connect(2) on the other end of an accepted connection, by SO_PEERCRED alone; borrows `sock`.

        Without its groups and its label, and foreign, until `identify` and `describe` say otherwise. Raises OSError:
        then this client alone is refused; and WhoseUnknown.
        """
        pid, uid, gid = sockets.peer_credentials(sock)
        subject = Subject(uid, (), gid, pid, "", "", foreign=True)
        owner = owners.of(uid)
        return subject._replace(owner=self._owner(sock, subject) if owner is None else owner)

    def _owner(self, sock: socket.socket, subject: Subject) -> int:
        """The owner of a uid that no database knows: the user in whose slice its process is, else OTHERS.

        It is OTHERS for what runs in root's slice, too, as a container of root's does: such programs must not use up
        root's account. Raises WhoseUnknown when nothing can be read of that process: nobody gets rid of a deny rule for
        its user by that. Before Linux 6.5 the kernel does not say which process it was, and it is OTHERS.
        """
        pidfd = sockets.peer_pidfd(sock)
        if pidfd is None:
            if sockets.says_peer_pidfd(sock):
                raise WhoseUnknown(subject)
            return OTHERS
        try:
            place = processes.place(self._proc, subject.pid)
            if not processes.is_alive(pidfd):
                raise WhoseUnknown(subject)
            return place.uid if place.uid > 0 else OTHERS
        except OSError:
            raise WhoseUnknown(subject) from None
        finally:
            os.close(pidfd)

    def identify(self, sock: socket.socket, subject: Subject) -> Subject:
        """The subject with its groups and label, SO_PEERGROUPS and SO_PEERSEC, as when it connected. Raises OSError."""
        packed = sockets.peer_groups(sock)
        packed.append(subject.gid)
        return subject._replace(gids=Groups(packed), label=sockets.peer_label(sock))

    def process(self, sock: socket.socket, subject: Subject, let_in_s: float) -> int | None:
        """An owned pidfd of who called connect(2) on the other end, or None once it is gone; borrows `sock`.

        Before Linux 6.5 the kernel does not say which process that was. Then it is who has its number and its uid, and
        ran already when the connection was let in, at `let_in_s` of CLOCK_BOOTTIME. Raises OSError.
        """
        pidfd = sockets.peer_pidfd(sock)
        if pidfd is not None or sockets.says_peer_pidfd(sock):
            return pidfd
        try:
            return processes.like(self._proc, subject.pid, subject.uid, let_in_s)
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
