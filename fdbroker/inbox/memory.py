"""How many bytes wait in this process for clients that do not read, and for the rest of their messages.

Runs in: inbox. An attacker controls how much waits for its own connections. Without a bound for all owners together, a
few of them could have the whole service killed for its memory.
"""

from __future__ import annotations

from fdbroker.limits import inbox as limits

_MOST, _SHARE = limits.WAITING_BYTES, limits.WAITING_SHARE_BYTES


class Memory:
    """What waits for each connection and each owner. Above WAITING_BYTES in all, who has more than a share loses.

    A share is WAITING_BYTES divided by the owners for whom anything waits, and WAITING_SHARE_BYTES at least.
    """

    def __init__(self) -> None:
        self.waiting: dict[int, int] = {}  # bytes for each connection for which any wait
        self._of_owner: dict[int, int] = {}
        self._count = 0

    def is_too_much(self, owner: int, number: int, size: int) -> bool:
        """Whether the owner's connection `number`, for which `size` bytes wait now, must be ended for that."""
        change = size - self.waiting.get(number, 0)
        if change:
            self._change(owner, number, size, change)
        if self._count <= _MOST or change <= 0:
            return False
        return self._of_owner[owner] > max(_SHARE, _MOST // len(self._of_owner))

    def forget(self, owner: int, number: int) -> None:
        """A connection has ended."""
        change = -self.waiting.get(number, 0)
        if change:
            self._change(owner, number, 0, change)

    def _change(self, owner: int, number: int, size: int, change: int) -> None:
        self._count += change
        self._of_owner[owner] = self._of_owner.get(owner, 0) + change
        if not self._of_owner[owner]:
            del self._of_owner[owner]
        if size:
            self.waiting[number] = size
        else:
            self.waiting.pop(number, None)
