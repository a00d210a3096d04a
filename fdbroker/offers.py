"""What a List shows, as keeper, inbox and clients have it.

Pure: no I/O.
"""

from __future__ import annotations

from typing import NamedTuple

from fdbroker.terms import Resource


class Offer(NamedTuple):
    """One resource that a subject may open now, with the most access it may ask for, and the rule that says so.

    `generation`, 0 to 2**53 - 1, is another number once the node at a device's path is another one, or has another
    mode or owner; 0 for what is no device.
    """

    resource: Resource
    where: str
    generation: int = 0
