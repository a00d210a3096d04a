"""What a file in memory says: a policy, as kernel/sealed.py makes it.

Runs in: opener, keeper, inbox.
"""

from __future__ import annotations

import os

from fdbroker.refusals import LinkViolation


def read(descriptor: int, maximum: int) -> bytes:
    """All bytes of a memfd, which is borrowed. Raises LinkViolation above `maximum`."""
    size = os.fstat(descriptor).st_size
    if size > maximum:
        raise LinkViolation(f"a file of {size} bytes, at most {maximum}")
    return os.pread(descriptor, size, 0)
