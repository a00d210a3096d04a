"""What people see: tables and colour on a terminal, JSON where `--json` asks for it. What others wrote is escaped.

Runs in: the command line.
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from fdbroker.wire.journal import escaped

_SHOWN_BYTES = 65536


def typable(text: str) -> str:
    """Text of the policy, or of this program, made harmless for terminals.

    Backslashes stay as they are: globs are written with them, so the text can be typed again.
    """
    return "".join(one if one.isprintable() else escaped(one) for one in text)


def shown(data: bytes) -> str:
    """A message for people: text, or else base64; of a long one the beginning, and how much more there is."""
    cut = data[:_SHOWN_BYTES]
    try:
        text = cut.decode()
    except UnicodeDecodeError as error:
        # a character that is cut at the end is no reason
        is_text = len(cut) < len(data) and error.start > len(cut) - 4
        text = cut[: error.start].decode() if is_text else base64.b64encode(cut).decode()
    return text if len(cut) == len(data) else f"{text} … and {len(data) - len(cut)} bytes more: see --json"


def as_json(value: Any) -> None:
    """One JSON document on a line."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table on a terminal; elsewhere one line a row with tabs between, and no heading, for other programs."""
    if not sys.stdout.isatty():
        for row in rows:
            sys.stdout.write("\t".join(map(escaped, row)) + "\n")
        sys.stdout.flush()
        return
    from rich.console import Console  # noqa: PLC0415 -- a fifth of a second that only terminals need
    from rich.table import Table  # noqa: PLC0415 -- only terminals need it
    from rich.text import Text  # noqa: PLC0415 -- only terminals need it

    made = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        made.add_row(*(Text(escaped(cell)) for cell in row))
    Console().print(made)


def line(text: str, style: str = "") -> None:
    """One line, in colour on a terminal."""
    if style and sys.stdout.isatty():
        from rich.console import Console  # noqa: PLC0415 -- only terminals need it
        from rich.text import Text  # noqa: PLC0415 -- only terminals need it

        Console().print(Text(text, style=style), soft_wrap=True)
    else:
        sys.stdout.write(text + "\n")


def error(text: str) -> None:
    """One message for people, on standard error."""
    sys.stderr.write(f"fdbroker: {text}\n")
