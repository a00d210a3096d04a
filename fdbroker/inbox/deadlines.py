"""By when a client must have sent the rest of its message, and taken something of its answers.

Runs in: inbox. An attacker controls how slowly it sends and reads, and how much it has us do before.

Descriptors that came with a message have ATTACHED_SECONDS until it is taken, whatever comes before it and however long
its user rests: one of them can be the connection's own other end, or another connection's, and then neither ends by
itself. This ends no honest connection. Descriptors are read while nothing is owed to their client, so whoever waits for
its answers has nothing before them: their message is taken as soon as it is whole, or after a rest, which is
DEBT_SECONDS at most; who stalled the loop rests longer, and its descriptors are closed meanwhile. Whoever sends ahead
has that time for all that was read with them, and each message with descriptors that is taken begins the time of the
next one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from fdbroker.limits import inbox as limits

_MESSAGE_S, _ANSWER_S, _ATTACHED_S = limits.MESSAGE_SECONDS, limits.ANSWER_SECONDS, limits.ATTACHED_SECONDS
_LATE_S = 0.05  # how late it may be noticed


class Deadlines:
    """Connections by their numbers: in the middle of a message, with descriptors, and with answers that wait."""

    def __init__(self) -> None:
        self._partial: dict[int, float] = {}  # since when; in order of time, and so are the other ones
        self._attached: dict[int, float] = {}  # since descriptors have come
        self._unsent: dict[int, float] = {}

    def note(self, number: int, *, unsent: bool, partial: bool, attached: bool) -> None:
        """Whether a connection has answers that it does not take, a part of a message, descriptors not yet taken."""
        for waiting, does in ((self._unsent, unsent), (self._partial, partial), (self._attached, attached)):
            if does:
                waiting.setdefault(number, time.monotonic())
            elif waiting:
                waiting.pop(number, None)

    def took(self, number: int) -> None:
        """It has taken something of its answers: it has time again."""
        self._unsent.pop(number, None)

    def completed(self, number: int, *, attached: bool = False) -> None:
        """A message of it was complete; whether it was one with descriptors."""
        self._partial.pop(number, None)
        if attached:
            self._attached.pop(number, None)

    def forget(self, number: int) -> None:
        """It has ended."""
        self._unsent.pop(number, None)
        self.completed(number, attached=True)

    def timeouts_s(self) -> list[float]:
        """Until the next one of each kind is late, as far as there is any."""
        kinds = ((self._partial, _MESSAGE_S), (self._attached, _ATTACHED_S), (self._unsent, _ANSWER_S))
        now_s = time.monotonic()
        return [max(_LATE_S, next(iter(one.values())) + limit_s - now_s) for one, limit_s in kinds if one]

    def partial(self) -> Iterator[int]:
        """Those whose message is not complete in time."""
        return _late(self._partial, _MESSAGE_S)

    def attached(self) -> Iterator[int]:
        """Those whose descriptors were not taken in time."""
        return _late(self._attached, _ATTACHED_S)

    def unsent(self) -> Iterator[int]:
        """Those that have taken nothing for too long."""
        return _late(self._unsent, _ANSWER_S)


def _late(waiting: dict[int, float], limit_s: float) -> Iterator[int]:
    limit = time.monotonic() - limit_s
    for number, since_s in list(waiting.items()):
        if since_s > limit:
            return
        yield number
