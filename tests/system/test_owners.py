"""One user with many uids, where the broker has as many descriptors as its unit asks for: in a virtual machine.

Here the hard limit may be lower, and nothing raises that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.lab


def test_the_attacks_of_many_uids_with_the_units_descriptors(vm: Callable[..., Any]):
    found = vm("owners.py")["owners"]
    assert found["descriptors"] == 65536
    assert found["code"] == 0, found["said"]
    assert "6 passed" in found["said"]  # unread grants, held descriptors; as 99, 700 and 2,000 uids
