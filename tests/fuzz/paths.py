"""Globs and device paths, against a plain reading of the documents: a matcher that tries everything, one name at a time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from fdbroker import limits
from fdbroker.policy import paths

WORDS = (
    b"/dev/",
    b"\n/dev/",
    b"*",
    b"[!",
    b"[]",
    b"]",
    b"a-c",
    b"tty",
    b"/..",
    b"//",
    b"/./",
    b"[^",
    b"\xe2\x80\xae",
    b"nvme",
)


def seeds() -> Iterator[bytes]:
    for pattern, path in (
        ("/dev/snd/pcmC*D*[pc]", "/dev/snd/pcmC0D0p"),
        ("/dev/input/event?", "/dev/input/event7"),
        ("/dev/[!a-c]*x*/[]x]", "/dev/dxx/]"),
        ("/dev/*a*a*a*b", "/dev/" + "a" * 40),
        ("/dev/tty*", "/dev/ttyUSB0"),
        ("/dev/[a-", "/dev/x/mem"),
    ):
        yield f"{pattern}\n{path}".encode()


def fits(pattern: str, name: str) -> bool:
    """Whether one name matches the glob of one name."""

    @cache
    def rest(i: int, j: int) -> bool:
        if i == len(pattern):
            return j == len(name)
        if pattern[i] == "*":
            return rest(i + 1, j) or (j < len(name) and rest(i, j + 1))
        if j == len(name):
            return False
        if pattern[i] == "?":
            return rest(i + 1, j + 1)
        if pattern[i] == "[":
            end, members, negated = members_of(pattern, i)
            return ((name[j] in members) != negated) and rest(end, j + 1)
        return pattern[i] == name[j] and rest(i + 1, j + 1)

    return rest(0, 0)


class Members(list[tuple[str, str]]):
    """The ranges of a set, from and to."""

    def __contains__(self, letter: object) -> bool:
        return any(first <= str(letter) <= last for first, last in self)


def members_of(pattern: str, at: int) -> tuple[int, Members, bool]:
    """The set that begins there: where it ends, what is in it, and whether it is meant the other way round."""
    at += 1
    negated = pattern[at] == "!"
    at += negated
    end = pattern.index("]", at + 1)  # one that comes first is a member
    body, members = pattern[at:end], Members()
    while body:
        if body[1:2] == "-" and len(body) > 2:
            members.append((body[0], body[2]))
            body = body[3:]
        else:
            members.append((body[0], body[0]))
            body = body[1:]
    return end + 1, members, negated


def target(data: bytes) -> None:
    pattern, _, path = data.decode(errors="surrogateescape").partition("\n")
    judge_path(path)
    if pattern.isprintable():  # a policy is UTF-8
        judge_pattern(pattern, path)


def judge_path(path: str) -> None:
    if not paths.is_device_path(path):
        return
    names = path.split("/")
    assert names[:2] == ["", "dev"]
    assert len(names) > 2
    assert not {"", ".", ".."} & set(names[1:])
    assert len(path.encode()) <= limits.PATH_BYTES
    assert path.isprintable()


def judge_pattern(pattern: str, path: str) -> None:
    if paths.glob_error(pattern):
        return
    matched = paths.matcher(pattern).fullmatch(path) is not None
    wanted, asked = pattern.split("/"), path.split("/")
    assert matched == (len(wanted) == len(asked) and all(map(fits, wanted, asked)))
    if paths.is_literal(pattern):
        assert paths.matcher(pattern).fullmatch(pattern)
    assert paths.is_literal(paths.literal_folder(pattern))
    if matched:
        assert path.startswith(paths.literal_folder(pattern) + "/")
        if paths.is_device_path(path) and paths.is_dangerous(path):
            assert paths.dangerous_name(pattern)
