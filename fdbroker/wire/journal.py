"""The journal's native protocol: fields to one datagram.

Runs in: opener, keeper, inbox. An attacker controls field values, never names.
Source: systemd.io, "Native Journal Protocol".
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

_SIZE = struct.Struct("<Q")


def escaped(text: str) -> str:
    r"""What a client wrote, made harmless for logs and terminals and still unambiguous.

    Everything that Unicode does not call printable, and the backslash, becomes \\, \xNN, \uNNNN or \UNNNNNNNN:
    newlines, escape sequences and direction marks among them.
    """
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(
        one if one.isprintable() and one != "\\" else one.encode("unicode_escape").decode("ascii") for one in text
    )


escaped("\n")  # loads the codec now: a confined process can load nothing later


def encode_fields(fields: Mapping[str, str]) -> bytes:
    """One datagram. A value with a newline takes the protocol's binary form, so it cannot begin a field."""
    lines = "".join([f"{name}={text}\n" for name, text in fields.items()])
    if lines.count("\n") != len(fields):  # a value has one
        return b"".join(_binary(name, text.encode(errors="backslashreplace")) for name, text in fields.items())
    return lines.encode(errors="backslashreplace")


def _binary(name: str, value: bytes) -> bytes:
    return b"%s\n%s%s\n" % (name.encode(), _SIZE.pack(len(value)), value)
