"""Every maximum of the broker, in the module of the process that keeps it.

The value passes, value + 1 does not. The comment of each says: unit | where the number comes from | what happens above
it; then which test shows it, and, where it is no maximum, what else it is. docs/limits.md is printed from these
(scripts/docs), and tests/test_limits.py goes by them.
"""
