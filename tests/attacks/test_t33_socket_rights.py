"""T33: a socket that was made elsewhere brings its maker's rights."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct

from harness import ALICE, Raw, as_user, ip, outcome, own_network, private_dev, running

# with a port below 1024, the worker has CAP_NET_BIND_SERVICE beside CAP_SYS_ADMIN
POLICY = "version: 1\neveryone: {sockets: [{namespace: vpn, bind: [443]}]}\n"


def _rights_of_socket(address):
    with Raw(address) as asking:
        assert outcome(asking.ask({"socket": {"namespace": "vpn"}})) == "granted"
        with socket.socket(fileno=asking.take()) as sock:
            refused = []
            for level, option, value in (
                (socket.SOL_SOCKET, 36, 1),  # SO_MARK
                (socket.SOL_SOCKET, 33, 1 << 30),  # SO_RCVBUFFORCE
                (socket.IPPROTO_IP, 19, 1),  # IP_TRANSPARENT
                (socket.SOL_SOCKET, 12, 7),  # SO_PRIORITY
            ):
                try:
                    sock.setsockopt(level, option, value)
                except PermissionError:
                    refused.append(option)
            with contextlib.suppress(PermissionError):
                fcntl.ioctl(sock, 0x894C)  # SIOCGSKNS: the namespace itself
                refused.append("SIOCGSKNS worked")
            up = struct.pack("16sH14x", b"lo", 0)
            try:
                fcntl.ioctl(sock, 0x8914, up)  # SIOCSIFFLAGS
            except PermissionError:
                refused.append("SIOCSIFFLAGS")
            return refused


def test_a_socket_brings_none_of_the_rights_of_who_made_it(root):
    with own_network(), private_dev():
        ip("netns", "add", "vpn")
        with running(POLICY) as broker:
            assert as_user(ALICE, [], _rights_of_socket, broker.socket) == [36, 33, 19, 12, "SIOCSIFFLAGS"]
