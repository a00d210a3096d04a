"""The files of a policy: which there are, whether root alone can change them, and their text.

Runs in: launcher, command line. With `trusted`, only root can have written the files that are read; without it
(`policy check`), the author of a file controls its text.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections import deque
from collections.abc import Iterable, Iterator

from fdbroker.errors import Finding, PolicyError
from fdbroker.limits import policy as limits

# dpkg and rpm leave such files beside a file of configuration: x.dpkg-old, x.rpmsave.
_LEFTOVER = re.compile(r"\.(?:dpkg-|rpm)")
_LINKS = 40  # as many as the kernel follows: path_resolution(7)
# Landlock: a running service has given up other folders
_DENIED = "Landlock denies root this until fdbroker is restarted, or AppArmor or SELinux do by their policy"


# how a command whose policy is an option is given another one
ANOTHER = "`--policy FILE` takes another file"


def policy_files(policy: str, findings: list[Finding], *, trusted: bool = False) -> list[str]:
    """The policy file and the *.yaml of the folder policy.d beside it, in order of name, as absolute paths.

    Leftovers of editors and package managers are skipped; any other entry of policy.d is added to `findings`, for an
    admin may believe that it is in force. Raises PolicyError when there is a policy.d that cannot be listed.
    """
    policy = os.path.abspath(policy)
    folder = os.path.join(os.path.dirname(policy), "policy.d")
    try:
        names = sorted(os.listdir(folder)) if os.path.lexists(folder) else []
    except OSError as error:
        expected, hint = "a folder", "make it one, or remove it"
        if trusted and error.errno == errno.EACCES:
            expected, hint = "", _DENIED
        what = f"cannot be read: {error.strerror}"
        raise PolicyError([Finding(folder, 0, 0, what, expected, hint=hint)]) from None
    files = []
    for name in names:
        path = os.path.join(folder, name)
        if name.startswith(".") or name.endswith("~"):
            continue
        if name.endswith(".yaml"):
            if _is_text(path, findings):
                files.append(path)
        elif not _LEFTOVER.search(name):
            if os.path.isdir(path):
                findings.append(Finding(path, 0, 0, "is a folder", "files alone"))
            else:
                right = re.sub(r"\.ya?ml$", ".yaml", name, flags=re.IGNORECASE)
                # any other name may be a backup's: with .yaml behind it, it would be in force
                elsewhere = "remove it, or move it elsewhere"
                hint = elsewhere if right == name else f"rename it to {right}, or remove it"
                findings.append(Finding(path, 0, 0, "is not read", "a name that ends in .yaml", hint=hint))
    if len(files) >= limits.POLICY_FILES:
        raise PolicyError([Finding(folder, 0, 0, f"over {limits.POLICY_FILES} files")])
    return [policy, *files] if _is_text(policy, findings) else files


def _is_text(path: str, findings: list[Finding]) -> bool:
    """Whether a file's name can be said to clients and in records, which are UTF-8; else it is a finding."""
    shown = path.encode(errors="surrogateescape").decode(errors="backslashreplace")
    if shown != path:
        findings.append(Finding(shown, 0, 0, "has a name that is not UTF-8", hint="rename it"))
    return shown == path


def untrusted(status: os.stat_result, *, sticky_is_fine: bool) -> str:
    """Why somebody else than root could change what stands there, "" when nobody could."""
    if status.st_uid != 0:
        return f"must belong to root, belongs to uid {status.st_uid}"
    if status.st_mode & 0o022 and not (sticky_is_fine and status.st_mode & stat.S_ISVTX):
        return f"must not be writable by group or others, has mode {stat.S_IMODE(status.st_mode):04o}"
    return ""


def distrusted(files: Iterable[str]) -> list[Finding]:
    """One finding for each reason for which `serve` would refuse these files: root is not alone in control of them."""
    findings: list[Finding] = []
    for file in files:
        try:
            findings += _distrust(file, _way(file))
        except OSError:
            continue  # it is gone
    return findings


def _way(file: str) -> list[tuple[str, os.stat_result]]:
    """Each folder and symlink on the way to an absolute path, and last the file at its end. Raises OSError."""
    way = [("/", os.lstat("/"))]
    names = deque(file.split("/"))
    at, links = "/", 0
    while names:
        name = names.popleft()
        if name in ("", "."):
            continue
        path = os.path.dirname(at) if name == ".." else os.path.join(at, name)
        way.append((path, os.lstat(path)))
        if not stat.S_ISLNK(way[-1][1].st_mode):
            at = path
            continue
        links += 1
        if links > _LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        target = os.readlink(path)
        names.extendleft(reversed(target.split("/")))
        if target.startswith("/"):
            at = "/"
    return way


def _distrust(file: str, way: list[tuple[str, os.stat_result]]) -> Iterator[Finding]:
    """One finding for each place on the way to a file that root does not control alone."""
    last = way[-1][0]
    own = os.path.join(os.path.realpath(os.path.dirname(file)), os.path.basename(file))  # `last` unless it is a symlink
    for path, status in way:
        is_link = stat.S_ISLNK(status.st_mode)
        if is_link:  # anybody may write "to" a symlink: its mode says nothing
            trouble = "" if status.st_uid == 0 else untrusted(status, sticky_is_fine=True)
        else:
            # in a sticky folder, such as /tmp, others cannot replace what is root's
            strict = (last, os.path.dirname(last), os.path.dirname(own))
            trouble = untrusted(status, sticky_is_fine=path not in strict)
        if not trouble:
            continue
        if path == own == last:
            yield Finding(file, 0, 0, trouble, hint=f"chown root:root {file} && chmod 0644 {file}")
        elif own != last:
            where = "the link itself" if path == own else path
            yield Finding(file, 0, 0, f"is a symlink, and {where} {trouble}", hint="put the file itself there")
        elif is_link:
            yield Finding(file, 0, 0, f"{path} {trouble}", hint="it is a symlink on the way")
        else:
            yield Finding(file, 0, 0, f"its folder {path} {trouble}")


def read(file: str, findings: list[Finding], *, trusted: bool, another: str = ANOTHER) -> str | None:
    """The text of one file, or None and what is wrong in `findings`. Raises nothing.

    With `trusted`, a file that somebody else than root can change or replace is a finding, and is not even opened.
    `another` is a hint for one that cannot be read.
    """

    def wrong(what: str, expected: str = "", hint: str = "") -> None:
        findings.append(Finding(file, 0, 0, what, expected, "", hint))

    data = b""
    try:
        way = _way(file)
        place, status = way[-1]
        if not stat.S_ISREG(status.st_mode):
            wrong("is a folder" if stat.S_ISDIR(status.st_mode) else "is not a regular file")
            return None
        troubles = list(_distrust(file, way)) if trusted else []
        if troubles:  # it is not opened: by now it could be anything
            findings += troubles
            return None
        descriptor = os.open(place, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
        try:
            while len(data) <= limits.POLICY_FILE_BYTES:
                piece = os.read(descriptor, 65536)
                if not piece:
                    break
                data += piece
        finally:
            os.close(descriptor)
    except OSError as error:
        hint = _DENIED if trusted and error.errno == errno.EACCES else another
        wrong(f"cannot be read: {error.strerror}", hint=hint)
        return None
    if len(data) > limits.POLICY_FILE_BYTES:
        wrong("is too large", expected=f"at most {limits.POLICY_FILE_BYTES} bytes")
        return None
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        findings.append(Finding(file, line, column, "is not UTF-8"))
        return None
