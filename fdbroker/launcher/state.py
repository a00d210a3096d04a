"""The folder of the stored messages: there, the inbox's own, and nobody else's.

Runs in: launcher, as root. Nobody else may write to the folder that it is in; of what is inside, root touches nothing.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

from fdbroker import errors
from fdbroker.errors import FdbrokerError
from fdbroker.policy.files import untrusted

_MAKE = "`systemd-tmpfiles --create` makes it for an installed service"


class StateUnusable(FdbrokerError):
    """The folder for stored messages cannot be used: what is wrong, and what to do."""

    exit_code = errors.EX_CONFIG


def owner(folder: str) -> int | None:
    """The uid to which an existing folder belongs; None where there is none yet."""
    try:
        return os.lstat(folder).st_uid
    except FileNotFoundError:
        return None


def _parents(path: str) -> Iterator[str]:
    while path != "/":
        path = os.path.dirname(path)
        yield path


def prepare(folder: str, uid: int, gid: int) -> None:
    """See that `folder` is a folder of `uid` alone; make it where it is not there. Raises StateUnusable."""
    try:
        for parent in _parents(folder):
            status = os.lstat(parent)
            trouble = untrusted(status, sticky_is_fine=True)
            if not stat.S_ISDIR(status.st_mode):
                trouble = "must be a folder, and no link to one"
            elif not status.st_mode & stat.S_IXOTH:
                trouble = "must let the inbox in: chmod o+x"
            if trouble:
                raise StateUnusable(f"{folder} cannot hold messages: {parent} {trouble}")
        if owner(folder) is None:
            os.mkdir(folder, 0o700)
            os.chown(folder, uid, gid)
        status = os.lstat(folder)
    except OSError as error:
        raise StateUnusable(f"{folder} cannot hold messages: {error.strerror}; {_MAKE}") from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != uid or status.st_mode & 0o077:
        raise StateUnusable(f"{folder} cannot hold messages: it must be a folder of uid {uid} with mode 0700; {_MAKE}")
