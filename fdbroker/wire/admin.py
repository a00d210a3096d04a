"""What administrators ask for: the messages of it between our processes.

Runs in: launcher, witness, opener, inbox. A taken-over process controls what the others decode here.
"""

from __future__ import annotations

from typing import NamedTuple


class Reload(NamedTuple):
    """The client of `connection` asks for a reload of the policy."""

    connection: int


class Reloaded(NamedTuple):
    """A reload that the client of `connection` asked for is over: with no findings the new policy is in force.

    From the launcher to the opener, and on to the inbox, which alone reads the findings: wire/findings.py.
    """

    connection: int
    findings: bytes


class Judge(NamedTuple):
    """Say whether the process of the pidfd that comes along lives in our user namespace. To launcher and witness."""

    connection: int


class Judged(NamedTuple):
    """The answer, the same way back."""

    connection: int
    home: bool


class ReloadAsked(NamedTuple):
    """An administrator, the client of `connection`, asks for a reload."""

    connection: int
