"""A program without rights that connects again and again, and every other time does not wait for what it is told.

knock.py SECONDS
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections import Counter

SOCKET = "/run/fdbroker/socket"

heard: Counter[str] = Counter()
longest_s = 0.0
end_s = time.monotonic() + float(sys.argv[1])
while time.monotonic() < end_s:
    began_s = time.monotonic()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        try:
            sock.connect(SOCKET)
            text = b""
            while sum(heard.values()) % 2 and (data := sock.recv(4096)):
                text += data
        except OSError as error:
            text = repr(error).encode()
    heard[text.decode()] += 1
    longest_s = max(longest_s, time.monotonic() - began_s)
print(json.dumps({"heard": heard, "longest_s": longest_s}))
