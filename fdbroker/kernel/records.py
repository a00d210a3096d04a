"""Records to the journal's socket, or to standard error as JSON lines where there is none.

Runs in: opener and keeper (the audit), inbox (topics that are delivered to the journal). An attacker controls values,
never names.
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

_PIPE_BUF = select.PIPE_BUF


class NotRecorded(Exception):
    """The record could not be written now; nothing may be granted on it, or said to be delivered."""


def _quoted(text: str) -> str:
    """A text as JSON, without any character that a terminal could take for a command."""
    quoted = json.encoder.encode_basestring(text)
    if quoted.isprintable():
        return quoted
    return "".join(one if one.isprintable() else json.encoder.encode_basestring_ascii(one)[1:-1] for one in quoted)


class Records:
    """Takes `journal`, a connected datagram socket, or None."""

    def __init__(self, journal: socket.socket | None) -> None:
        self._journal = journal
        self._stderr = select.poll()
        self._stderr.register(2, select.POLLOUT)
        mode = os.fstat(2).st_mode
        self._never_full, self._is_pipe = stat.S_ISREG(mode), stat.S_ISFIFO(mode)

    @staticmethod
    def _line(values: Mapping[str, str]) -> bytes:
        members = ", ".join([f'"{name}": {_quoted(text)}' for name, text in values.items()])
        return f"{{{members}}}\n".encode()

    def _fitting(self, values: Mapping[str, str]) -> bytes:
        """A line that a pipe which is writable takes at once: of one that is longer, the longest values are cut."""
        line, cut = self._line(values), dict(values)
        while self._is_pipe and len(line) > _PIPE_BUF:
            longest = max(cut, key=lambda name: len(cut[name]))
            cut |= {longest: cut[longest][: len(cut[longest]) // 2], "FDBROKER_CUT": "1"}
            line = self._line(cut)
        return line

    def prepare(self, values: Mapping[str, str]) -> bytes:
        """A record as it is written; the same bytes may be put several times."""
        return self._fitting(values) if self._journal is None else encode_fields(values)

    def write(self, values: Mapping[str, str]) -> None:
        """Write one record. Raises NotRecorded as `put` does."""
        self.put(self.prepare(values))

    def put(self, prepared: bytes) -> None:
        """Write what was prepared. Raises NotRecorded when the journal, or standard error, takes nothing now."""
        try:
            if self._journal is not None:
                sockets.send(self._journal, prepared)
            # never wait for who reads it: others share descriptor 2, so O_NONBLOCK is not ours to set
            elif not (self._never_full or self._stderr.poll(0)) or os.write(2, prepared) != len(prepared):
                raise NotRecorded("standard error")
        except OSError as error:
            raise NotRecorded(errno.errorcode.get(error.errno or 0, "?")) from None
