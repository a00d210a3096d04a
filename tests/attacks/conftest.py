"""The machines of tests/system, for what only they show."""

from __future__ import annotations

from system.conftest import boot, vm

__all__ = ["boot", "vm"]  # fixtures
