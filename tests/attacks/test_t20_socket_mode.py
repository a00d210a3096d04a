"""T20: the socket is connectable for a moment before its mode is set."""

from __future__ import annotations

import os
import socket
import stat

import pytest
from harness import ALICE, GROUP, as_user, folder

from fdbroker.launcher import listen


@pytest.mark.parametrize("mode", [0o660, 0o600, 0o666])
@pytest.mark.parametrize("group", [None, str(GROUP)])
def test_mode_and_group_are_final_when_the_name_appears(root, monkeypatch, mode, group):
    with folder() as where:
        path = str(where / "socket")
        seen = []
        real = socket.socket.bind

        class Watching(socket.socket):
            def bind(self, address):
                real(self, address)
                status = os.lstat(address)
                seen.append((stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid))

        monkeypatch.setattr(listen.socket, "socket", Watching)
        mask = os.umask(0)
        try:
            listener = listen.bound(path, mode, group)
        finally:
            os.umask(mask)
        status = os.lstat(path)
        assert seen == [(mode, 0, GROUP if group else 0)]
        assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == seen[0]
        assert os.getegid() == 0
        listener.remove()
        listener.sock.close()
        assert not os.path.exists(path)


def test_who_is_not_in_the_group_cannot_connect(root):
    def connect(path):
        with socket.socket(socket.AF_UNIX) as sock:
            try:
                sock.connect(path)
            except PermissionError:
                return "EACCES"
            return "connected"

    with folder() as where:
        listener = listen.bound(str(where / "socket"), 0o660, str(GROUP))
        assert as_user(ALICE, [], connect, listener.path) == "EACCES"
        assert as_user(ALICE, [GROUP], connect, listener.path) == "connected"
        listener.remove()
        listener.sock.close()


def test_a_socket_that_somebody_put_there_meanwhile_is_not_removed(root):
    with folder() as where:
        listener = listen.bound(str(where / "socket"), 0o660, None)
        os.unlink(listener.path)
        (where / "socket").write_text("somebody's")
        listener.remove()
        listener.sock.close()
        assert (where / "socket").read_text() == "somebody's"
