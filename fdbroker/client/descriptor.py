"""A descriptor with one owner.

Runs in: any program.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from fdbroker.client import closing


class Descriptor:
    """An open file descriptor that this object owns, and what was said when it was granted.

    Leave the `with` block, or call `close`, and it is closed; `detach` gives it away. Forgotten, it is closed with a
    ResourceWarning. It is non-blocking: `os.set_blocking(descriptor.fileno(), True)` if the program wants to wait.

    `resource` is what was asked for ("/dev/snd/pcmC0D0p"), `access` ro, wo or rw, `rule` the policy's "FILE:LINE",
    `rdev` the device number "MAJOR:MINOR", "" for what has none. `usable` says of a namespace whether setns(2) would
    have let this program in when it asked, with the reason in `why` if not; None where the broker does not say.

    `sender` is the user whose message it came with, None for a grant: then a thread closes it (`client/closing.py`).
    """

    def __init__(
        self,
        number: int,
        resource: str,
        access: str,
        rule: str,
        rdev: str = "",
        *,
        usable: bool | None = None,
        why: str = "",
        sender: int | None = None,
    ) -> None:
        self._number = number
        self.resource = resource
        self.access = access
        self.rule = rule
        self.rdev = rdev
        self.usable = usable
        self.why = why
        self.sender = sender

    def __repr__(self) -> str:
        state = "closed" if self._number < 0 else str(self._number)
        return f"<Descriptor {state} {self.access} {self.resource}>"

    def fileno(self) -> int:
        """The number, which stays this object's. Raises ValueError once it is closed or detached."""
        if self._number < 0:
            raise ValueError("the descriptor is closed or detached")
        return self._number

    def detach(self) -> int:
        """The number, which from now on is the caller's to close."""
        number = self.fileno()
        self._number = -1
        return number

    def close(self) -> None:
        """Close it; closing twice does nothing. What came with a message may be open a moment longer; nobody waits."""
        if self._number >= 0:
            _close([self.detach()], self.sender)

    @property
    def closed(self) -> bool:
        """Whether it was closed or detached."""
        return self._number < 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_number", -1) >= 0:
            warnings.warn(f"{self!r} was never closed", ResourceWarning, stacklevel=2, source=self)
            self.close()


def close_together(descriptors: Iterable[Descriptor]) -> None:
    """Close those of one message that are open: at once, which takes less than one by one."""
    numbers: dict[int | None, list[int]] = {}
    for descriptor in descriptors:
        if not descriptor.closed:
            numbers.setdefault(descriptor.sender, []).append(descriptor.detach())
    for sender, some in numbers.items():
        _close(some, sender)


def _close(numbers: list[int], sender: int | None) -> None:
    if sender is not None:
        closing.close_later(numbers, sender)
        return
    for number in numbers:
        os.close(number)
