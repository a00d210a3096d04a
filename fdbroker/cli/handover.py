"""Descriptors for a program that is started in this one's place: sd_listen_fds(3), and a connection beside them.

Runs in: the command line.
"""

from __future__ import annotations

import fcntl
import os
import resource
import signal
from collections.abc import Mapping, Sequence
from typing import NamedTuple, NoReturn

import click

from fdbroker import errors
from fdbroker.cli import show
from fdbroker.wire.journal import escaped

_START = 3  # SD_LISTEN_FDS_START
# The connection goes to this number or above: shells and scripts choose small ones. With few descriptors: half of them.
_CONNECTION = 512


class Place(NamedTuple):
    """Where descriptors go: behind `kept` of the caller's, which begin at 3 and have these `names`."""

    kept: int
    names: list[str]


def count_passed(environment: Mapping[str, str]) -> int:
    """How many descriptors from 3 on were passed to this very process; 0 where LISTEN_FDS is for another one."""
    count = environment.get("LISTEN_FDS", "")
    if environment.get("LISTEN_PID") != str(os.getpid()) or not (count.isascii() and count.isdecimal()):
        return 0
    return int(count[:9])


def find_place(count: int, environment: Mapping[str, str], *, close: bool) -> Place:
    """Where `count` descriptors go. Raises UsageError when the caller has one of its own there, unless it may `close`.

    The caller's descriptors are inheritable, and those that this program opens are not.
    """
    kept = count_passed(environment)
    for number in range(_START, _START + kept):
        if not _is_callers(number):
            raise click.UsageError(f"LISTEN_FDS is {kept}, and descriptor {number} is not open")
    for number in range(_START + kept, _START + kept + count):
        if not close and _is_callers(number):
            raise click.UsageError(
                f"descriptor {number} is open already, and COMMAND's come there: they begin at {_START + kept}. Close "
                f"it (in a shell: {number}>&-), or let --close close all that COMMAND is not meant to have"
            )
    names = environment.get("LISTEN_FDNAMES", "").split(":")[:kept]
    return Place(kept, [name or "unknown" for name in names] + ["unknown"] * (kept - len(names)))


def _is_callers(number: int) -> bool:
    try:
        return os.get_inheritable(number)
    except OSError:
        return False


def become(
    command: Sequence[str], numbers: Sequence[int], names: Sequence[str], connection: int, place: Place, *, close: bool
) -> NoReturn:
    """Run `command` instead of this program, with the descriptors `numbers` at `place`; never returns.

    Takes `numbers` and `connection`, which stays open for as long as the command lives: FDBROKER_CONNECTION says at
    which number, for a command that starts what it does not trust. The caller's other descriptors stay as they are, or
    with `close` are closed, but for standard input, output and error.
    """
    try:
        kept = _hand_over(numbers, connection, _START + place.kept, close=close)
    except OSError as error:
        show.error(f"the descriptors cannot be passed to {escaped(command[0])}: {error.strerror}")
        os._exit(errors.EX_OSERR)
    environment = dict(os.environ)
    if not place.kept:
        environment.pop("LISTEN_PIDFDID", None)  # of systemd 257, and for another process
    environment["FDBROKER_CONNECTION"] = str(kept)
    environment["LISTEN_FDS"] = str(place.kept + len(numbers))
    environment["LISTEN_PID"] = str(os.getpid())
    environment["LISTEN_FDNAMES"] = ":".join([*place.names, *(name.replace(":", "_") for name in names)])
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores these, and exec(2) would pass that on
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvpe(command[0], list(command), environment)  # noqa: S606 -- running it is what the user asked for
    except OSError as error:
        show.error(f"{escaped(command[0])}: {error.strerror}")
        os._exit(127 if isinstance(error, FileNotFoundError) else 126)


def _hand_over(numbers: Sequence[int], connection: int, first: int, *, close: bool) -> int:
    """Put the descriptors at `first` and the following numbers; the number that the connection has then."""
    end = first + len(numbers)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    kept = fcntl.fcntl(connection, fcntl.F_DUPFD, max(end, min(_CONNECTION, most // 2)))  # inheritable
    os.close(connection)
    waiting = list(numbers)
    for offset, target in enumerate(range(first, end)):
        if target in waiting[offset + 1 :]:  # a later one has this number: out of the way
            waiting[waiting.index(target, offset + 1)] = os.dup(target)
        if waiting[offset] == target:
            os.set_inheritable(target, True)
        else:
            os.dup2(waiting[offset], target, inheritable=True)
            os.close(waiting[offset])
        os.set_blocking(target, True)
    if close:
        highest = max(map(int, os.listdir("/proc/self/fd")))  # which may be above the limit of today
        os.closerange(end, kept)  # by close_range(2)
        os.closerange(kept + 1, highest + 1)
    return kept
