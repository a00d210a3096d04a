"""T20: the socket is connectable for a moment before its mode is set."""

from __future__ import annotations

import errno
import os
import socket
import stat
import threading

import pytest
from harness import ALICE, EVERYONE_NULL, GROUP, Broker, as_user, folder

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


@pytest.mark.parametrize("mode", ["0660", "0600"])
def test_while_the_service_starts_nobody_else_can_connect_for_a_moment(dev, mode):
    """ALICE tries without a pause, from before the start until it serves."""

    def hammer(address, go):
        found = {}
        while True:
            with socket.socket(socket.AF_UNIX) as sock:
                number = sock.connect_ex(address)
            found[number] = found.get(number, 0) + 1
            if number == errno.EACCES and found[number] > 2000:
                return found
            if found.get(errno.ENOENT) == 1:
                os.write(go, b"x")

    reading, writing = os.pipe()
    with folder() as where:
        found = []
        thread = threading.Thread(
            target=lambda: found.append(as_user(ALICE, [], hammer, str(where / "socket"), writing))
        )
        thread.start()
        os.read(reading, 1)
        broker = Broker(where, EVERYONE_NULL, ("--mode", mode))
        try:
            broker.wait_ready()
            thread.join(60)
            assert broker.stop() == 0
        finally:
            broker.process.kill()
            broker.process.wait()
            os.close(reading)
            os.close(writing)
    assert set(found[0]) == {
        str(errno.ENOENT),
        str(errno.EACCES),
    }  # never connected, nor refused for nobody listens yet
