"""By when a client must have sent the rest of its message, and taken something of its answers.

Runs in: inbox. An attacker controls how slowly it sends and reads.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from fdbroker import limits

_MESSAGE_S, _ANSWER_S, _ATTACHED_S = limits.MESSAGE_SECONDS, limits.ANSWER_SECONDS, limits.ATTACHED_SECONDS
_LATE_S = 0.05  # how late it may be noticed


class Deadlines:
    """Connections by their numbers: those in the middle of a message, and those whose answers wait to be read."""

    def __init__(self) -> None:
        self._partial: dict[int, float] = {}  # since when; in order of time, and so are the other ones
        self._attached: dict[int, float] = {}  # of these, since descriptors have come with it
        self._unsent: dict[int, float] = {}

    @property
    def busy(self) -> bool:
        """Whether there is anybody with a deadline."""
        return bool(self._partial or self._unsent)

    def note(self, number: int, *, unsent: bool, partial: int) -> None:
        """Whether a connection has answers that it does not take, and what of a message: see Decoder.partial."""
        for waiting, does in ((self._unsent, unsent), (self._partial, partial > 0), (self._attached, partial > 1)):
            if does:
                waiting.setdefault(number, time.monotonic())
            elif waiting:
                waiting.pop(number, None)

    def took(self, number: int) -> None:
        """It has taken something of its answers: it has time again."""
        self._unsent.pop(number, None)

    def completed(self, number: int) -> None:
        """A message of it was complete."""
        self._partial.pop(number, None)
        self._attached.pop(number, None)

    def forget(self, number: int) -> None:
        """It has ended."""
        self._unsent.pop(number, None)
        self.completed(number)

    def timeout_s(self) -> float:
        """Until the next one is late, while there is any."""
        ends = [
            next(iter(waiting.values())) + limit_s
            for waiting, limit_s in (
                *((self._partial, _MESSAGE_S), (self._attached, _ATTACHED_S)),
                (self._unsent, _ANSWER_S),
            )
            if waiting
        ]
        return max(_LATE_S, min(ends) - time.monotonic())

    def partial(self) -> Iterator[int]:
        """Those whose message is not complete in time."""
        yield from dict.fromkeys((*_late(self._partial, _MESSAGE_S), *_late(self._attached, _ATTACHED_S)))

    def unsent(self) -> Iterator[int]:
        """Those that have taken nothing for too long."""
        return _late(self._unsent, _ANSWER_S)


def _late(waiting: dict[int, float], limit_s: float) -> Iterator[int]:
    limit = time.monotonic() - limit_s
    for number, since_s in list(waiting.items()):
        if since_s > limit:
            return
        yield number
