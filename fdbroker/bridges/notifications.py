"""A message of another user as a desktop notification that can neither pose as somebody else's nor hold markup.

Runs in: the D-Bus bridge. The sender controls the payload; who it is comes from the kernel, by the broker.
"""

from __future__ import annotations

import html
import pwd
from typing import Annotated, Literal, NamedTuple

import msgspec

from fdbroker.bucket import Bucket
from fdbroker.limits import bridges as limits

# Source: Desktop Notifications Specification 1.2, "Urgency Levels"
_URGENCY = {"low": 0, "normal": 1, "critical": 2}
_SERVER_DECIDES = -1
_EXPIRE_MS = (1_000, 60_000)  # 0 would be: never


class Notification(NamedTuple):
    """What Notify is called with. `summary` is plain text, `body` is markup without any element."""

    summary: str
    body: str
    urgency: int
    expire_ms: int


class _Asked(msgspec.Struct, forbid_unknown_fields=True):
    """What a payload may ask for. No icon, action, sound or hint: each would reach into the user's session."""

    summary: str
    body: str = ""
    urgency: Literal["low", "normal", "critical"] = "normal"
    expire_ms: Annotated[int, msgspec.Meta(ge=0)] | None = None


def notification(payload: bytes, sender: str, *, trusted: bool) -> Notification:
    """How to show this payload of `sender`, whose name stands before everything that it wrote.

    The payload is an object as in docs/bridges.md; whatever is no such object is text, its first line the summary.
    `trusted`: whether the sender may ask for a critical one, which stays on the screen until somebody closes it.
    """
    try:
        asked: _Asked = msgspec.json.decode(payload, type=_Asked)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        first, _, rest = payload.decode(errors="replace").partition("\n")
        asked = _Asked(first, rest)
    urgency = asked.urgency if trusted or asked.urgency != "critical" else "normal"
    least, most = _EXPIRE_MS
    return Notification(
        f"{sender}: {_cut(' '.join(asked.summary.split()), limits.NOTIFICATION_SUMMARY)}",
        html.escape(_cut(asked.body, limits.NOTIFICATION_BODY), quote=False),
        _URGENCY[urgency],
        _SERVER_DECIDES if asked.expire_ms is None else min(max(asked.expire_ms, least), most),
    )


def _cut(text: str, maximum: int) -> str:
    """Without what is invisible, such as control characters and marks that turn the direction of writing."""
    seen = "".join(one for one in text if one.isprintable() or one == "\n").strip()
    return seen if len(seen) <= maximum else seen[: maximum - 1] + "…"


def name_of(uid: int) -> str:
    """The user's name, or its number where it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


class Flood:
    """How many notifications are shown: of each user, and of all users together."""

    def __init__(self, now_s: float) -> None:
        self._all = Bucket(limits.NOTIFICATIONS_BURST, now_s)
        self._users: dict[int, Bucket] = {}

    def holds_back(self, owner: int, now_s: float) -> bool:
        """Whether one more of this owner is too many."""
        if owner not in self._users and len(self._users) >= limits.NOTIFICATION_USERS:
            self._users = {one: bucket for one, bucket in self._users.items() if not bucket.is_idle(now_s)}
            if len(self._users) >= limits.NOTIFICATION_USERS:
                return True
        rate, burst = limits.NOTIFICATIONS_PER_USER, limits.NOTIFICATIONS_PER_USER_BURST
        bucket = self._users.setdefault(owner, Bucket(burst, now_s))
        if bucket.take(rate, burst, now_s):
            return True
        return bool(self._all.take(limits.NOTIFICATIONS_PER_SECOND, limits.NOTIFICATIONS_BURST, now_s))
