"""A program without rights asks for namespaces and sockets on a kernel that does not say which process it is.

oldkernel.py PID, which is another user's process
"""

from __future__ import annotations

import json
import os
import socket
import sys

import fdbroker
from fdbroker.errors import FdbrokerError, OpenFailed

said: dict[str, object] = {}
with fdbroker.connect() as client:
    for name, word in (
        ("named", "net:vpn-a"),
        ("absent", "net:vpn-none"),
        ("mine", f"uts:pid:{os.getpid()}"),
        ("foreign", f"net:pid:{sys.argv[1]}"),
        ("new", "net:new"),
    ):
        try:
            with client.open(word) as descriptor:
                said[name] = [os.fstat(descriptor.fileno()).st_ino, descriptor.usable]
        except FdbrokerError as error:
            said[name] = [type(error).__name__, error.number if isinstance(error, OpenFailed) else 0]
    server, sock = (
        socket.socket(fileno=client.open(word).detach()) for word in ("socket:net:vpn-a,bind=80", "socket:net:vpn-a")
    )
with server, sock:
    server.settimeout(10)
    server.listen()
    sock.settimeout(10)
    sock.connect(("127.0.0.1", 80))
    accepted, _ = server.accept()
    with accepted:
        accepted.sendall(b"through")
    said["through"] = sock.recv(10).decode()
said["own"] = os.stat("/proc/self/ns/uts").st_ino
print(json.dumps(said))
