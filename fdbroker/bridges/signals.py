"""A D-Bus signal as JSON text.

Runs in: the D-Bus bridge. Whoever may send signals on that bus controls every value in it, but not the sender's name.
"""

from __future__ import annotations

from typing import Any

import msgspec


def signal_text(sender: str, path: str, interface: str, member: str, signature: str, body: list[Any]) -> str:
    """One object with these members. NaN and infinities, which JSON has not, become null."""
    values = [plain(value) for value in body]
    said = {"sender": sender, "path": path, "interface": interface, "member": member, "signature": signature}
    return msgspec.json.encode({**said, "body": values}).decode()


def plain(value: Any) -> Any:
    """A D-Bus value in JSON's words: a variant is its value, bytes are a list of numbers, a key is text.

    So does `busctl --json`, but that it keeps the type of a variant.
    """
    match value:
        case dict():
            return {_key(key): plain(one) for key, one in value.items()}
        case list() | tuple():
            return [plain(one) for one in value]
        case bytes() | bytearray():
            return list(value)
        case bool() | int() | float() | str() | None:
            return value
    return plain(value.value)  # a Variant: dbus-fast is not imported here


def _key(key: object) -> str:
    """A key of a D-Bus dictionary is text, a number or a boolean; JSON's are text."""
    return str(key).lower() if isinstance(key, bool) else str(key)
