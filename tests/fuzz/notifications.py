"""A payload as a desktop notification: always one, with the sender's name first, within its limits, without markup."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator

from fdbroker.bridges.notifications import notification
from fdbroker.limits import every as limits

SENDER = "alice"
WORDS = (
    b'"summary":',
    b'"body":',
    b'"urgency":"critical"',
    b'"expire_ms":',
    b"<b>",
    b"&amp;",
    b"&#60;",
    b"\xe2\x80\xae",
)
WORDS += (
    b"\\u0007",
    b"\\ud800",
    b"\n",
    b"bob: ",
    b"<a href=",
    b"\xc2\xa0",
    b"0",
    b"99999999999999999999",
    b"-1",
    b"1e3",
)


def seeds() -> Iterator[bytes]:
    yield b'{"summary":"Backup","body":"of <b>yesterday</b> &amp; today\\nis done","urgency":"critical","expire_ms":0}'
    yield '{"summary":"größe\\u202e","expire_ms":700}'.encode()
    yield b"first line\nand the\x1b[31m rest"
    yield b"\xff\xfe" + b"x" * 300
    yield b'{"summary":"x","icon":"/etc/shadow"}'


def target(data: bytes) -> None:
    for trusted in (False, True):
        made = notification(data, SENDER, trusted=trusted)
        assert made.summary.startswith(f"{SENDER}: ")
        assert made.summary.isprintable()
        assert len(made.summary) <= len(SENDER) + 2 + limits.NOTIFICATION_SUMMARY
        assert not re.search("[<>]|&(?!amp;|lt;|gt;)", made.body)
        shown = html.unescape(made.body)
        assert len(shown) <= limits.NOTIFICATION_BODY
        assert shown.replace("\n", "").isprintable()
        assert made.urgency in ((0, 1, 2) if trusted else (0, 1))
        assert made.expire_ms == -1 or 1_000 <= made.expire_ms <= 60_000
