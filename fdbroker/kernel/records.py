"""Records to the journal's socket, or to standard error as JSON lines where there is none.

Runs in: opener (the audit), inbox (topics that are delivered to the journal). An attacker controls values, never names.
"""

from __future__ import annotations

import errno
import json
import os
import select
import socket
import stat
from collections.abc import Mapping

from fdbroker.kernel import sockets
from fdbroker.wire.journal import encode_fields

_quoted = json.encoder.encode_basestring  # a text as JSON, and nothing around it: that takes five times as long


class NotRecorded(Exception):
    """The record could not be written now; nothing may be granted on it, or said to be delivered."""


class Records:
    """Takes `journal`, a connected datagram socket, or None."""

    def __init__(self, journal: socket.socket | None) -> None:
        self._journal = journal
        self._stderr = select.poll()
        self._stderr.register(2, select.POLLOUT)
        self._never_full = stat.S_ISREG(os.fstat(2).st_mode)

    def write(self, values: Mapping[str, str]) -> None:
        """Write one record. Raises NotRecorded when the journal, or standard error, takes nothing now."""
        try:
            if self._journal is not None:
                sockets.send(self._journal, encode_fields(values))
            else:
                # never wait for who reads it; it is not ours to make non-blocking, others share it
                members = ", ".join([f'"{name}": {_quoted(text)}' for name, text in values.items()])
                line = f"{{{members}}}\n".encode(errors="backslashreplace")
                if not (self._never_full or self._stderr.poll(0)) or os.write(2, line) != len(line):
                    raise NotRecorded("standard error")
        except OSError as error:
            raise NotRecorded(errno.errorcode.get(error.errno or 0, "?")) from None
