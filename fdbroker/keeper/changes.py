"""When what lists are made of has changed: one list for many changes that come together.

Runs in: keeper. Root alone changes names, modes and owners in /dev; a user with write access to a node can change its
times at any rate, which inotify tells, too.
"""

from __future__ import annotations

from fdbroker.kernel import inotify

# Several nodes come together, each is made, renamed, given its owner: one listing for all of them. After a change that
# changes no list, such as that of a node's times, the next one waits twice as long, up to the most.
_SETTLE_S, _SETTLE_MOST_S = 0.1, 2.0
# A namespace is mounted on its file a moment after the file has come, which nothing tells: one more listing for that.
_MOUNT_S = 2.0


class Changes:
    """Owns an inotify descriptor, which is polled while nothing is known to have changed."""

    def __init__(self) -> None:
        self.descriptor = inotify.create()
        self._due_s: float | None = None
        self._again = False
        self._listed_at_s = 0.0
        self._settle_s = _SETTLE_S

    @property
    def waiting(self) -> bool:
        """Whether a change is known: then further ones need not wake anybody."""
        return self._due_s is not None

    def note(self, now_s: float) -> None:
        """Something has changed."""
        if now_s - self._listed_at_s > _SETTLE_MOST_S:
            self._settle_s = _SETTLE_S
        self._due_s = now_s + self._settle_s
        self._again = True

    def timeout_s(self, now_s: float) -> float:
        """Until lists are to be made; -1 while nothing has changed."""
        return -1 if self._due_s is None else max(0.0, self._due_s - now_s)

    def take(self, now_s: float, *, news: bool) -> bool:
        """Whether lists are to be made now; `news`: the last ones had something new. Later changes are told again."""
        if self._due_s is None or now_s < self._due_s:
            return False
        self._due_s = now_s + _MOUNT_S if self._again else None
        self._again = False
        self._settle_s = _SETTLE_S if news else min(self._settle_s * 2, _SETTLE_MOST_S)
        self._listed_at_s = now_s
        inotify.drain(self.descriptor)
        return True
