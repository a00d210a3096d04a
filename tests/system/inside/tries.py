"""What a taken-over process might try, each by name; prints what came of it, 0 or the number of the error.

tries.py PID, which is another process; started as root
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys

libc = ctypes.CDLL(None, use_errno=True)


def call(name, *arguments):
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)


def executes():
    child = os.posix_spawn("/bin/true", ["true"], {})
    if os.waitpid(child, 0)[1]:
        raise OSError(0, "it ended otherwise")


other = int(sys.argv[1])
tries = {
    "read": lambda: open("/etc/shadow").close(),
    "write": lambda: open("/etc/fdbroker/policy.yaml", "a").close(),
    "make": lambda: open("/usr/bin/planted", "w").close(),
    "library": lambda: open("/opt/fdbroker/lib/planted.so", "w").close(),
    "folder": lambda: os.mkdir("/dev/planted"),
    "node": lambda: os.mknod("/var/lib/fdbroker/planted", 0o020600, os.makedev(1, 5)),
    "chown": lambda: os.chown("/var/lib/fdbroker", 1, 1),
    "exec": executes,
    "mount": lambda: call("mount", b"none", b"/mnt", b"tmpfs", 0, None),
    "packet": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close(),
    "trace": lambda: (
        call("ptrace", 16, other, None, None),
        os.waitpid(other, 0),
        call("ptrace", 17, other, None, None),
    ),
    "signal": lambda: os.kill(other, signal.SIGUSR1),
}
found = {}
for name, attempt in tries.items():
    try:
        attempt()
        found[name] = 0
    except OSError as error:
        found[name] = error.errno
print(json.dumps(found))
