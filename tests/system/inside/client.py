"""A program without rights: tries to open a node itself, then by the broker, and says what it can do with it.

client.py PATH ACCESS
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import struct
import sys

import fdbroker
from fdbroker.errors import FdbrokerError

TUNGETFEATURES = 0x800454CF  # linux/if_tun.h

path, access = sys.argv[1:]
said: dict[str, object] = {}
try:
    os.close(os.open(path, os.O_RDWR if access == "rw" else os.O_RDONLY))
    said["itself"] = "opened"
except OSError as error:
    said["itself"] = errno.errorcode[error.errno]
try:
    with fdbroker.connect() as client, client.open(path, access) as node:
        said["granted"] = [node.rdev, node.access, node.rule]
        said["flags"] = fcntl.fcntl(node, fcntl.F_GETFL) & os.O_ACCMODE
        said["inherited"] = os.get_inheritable(node.fileno())
        with contextlib.suppress(OSError):
            said["read"] = os.read(node.fileno(), 8).hex()
        try:
            said["written"] = os.write(node.fileno(), b"12345678")
        except OSError as error:
            said["written"] = errno.errorcode[error.errno]
        with contextlib.suppress(OSError):
            said["features"] = struct.unpack("I", fcntl.ioctl(node, TUNGETFEATURES, bytes(4)))[0]
except FdbrokerError as error:
    said["refused"] = type(error).__name__
print(json.dumps(said))
