"""Globs and device paths, against a plain reading of the documents: a matcher that tries everything, one name at a time."""

from __future__ import annotations

from collections.abc import Iterator

from fdbroker.limits import every as limits
from fdbroker.policy import fit, globs, paths, spelling
from fdbroker.policy.literals import is_literal

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
    b"\\\\",
    b"[[:",
)


def seeds() -> Iterator[bytes]:
    for pattern, path in (
        ("/dev/snd/pcmC*D*[pc]", "/dev/snd/pcmC0D0p"),
        ("/dev/input/event?", "/dev/input/event7"),
        ("/dev/[!a-c]*x*/[]x]", "/dev/dxx/]"),
        ("/dev/*a*a*a*b", "/dev/" + "a" * 40),
        ("/dev/tty*", "/dev/ttyUSB0"),
        ("/dev/[a-", "/dev/x/mem"),
        ("/dev/disk/by-id/x\\\\x20y[\\\\]*", "/dev/disk/by-id/x\\x20y\\"),
        ("/dev/[[:digit:]][^0]", "/dev/0"),
        ("/dev/" + "*?" * 120, "/dev/" + "a" * 250),
    ):
        yield f"{pattern}\n{path}".encode()


def fits(pattern: str, name: str) -> bool:
    """Whether one name matches the glob of one name: the places of the glob that the name so far can lead to."""
    places = beyond_stars(pattern, {0})
    for letter in name:
        places = beyond_stars(pattern, {after for at in places for after in step(pattern, at, letter)})
    return len(pattern) in places


def beyond_stars(pattern: str, places: set[int]) -> set[int]:
    """These places, and those behind the stars that stand at them, for a star may match nothing."""
    found = set(places)
    for at in places:
        end = at
        while pattern[end : end + 1] == "*":
            end += 1
            found.add(end)
    return found


def step(pattern: str, at: int, letter: str) -> set[int]:
    """Where one letter of the name leads from a place of the glob."""
    if at == len(pattern):
        return set()
    if pattern[at] == "*":
        return {at}
    if pattern[at] == "?":
        return {at + 1}
    if pattern[at] == "[":
        end, members, negated = members_of(pattern, at)
        return {end} if (letter in members) != negated else set()
    if pattern[at] == "\\":  # the second of the two is what it names
        return {at + 2} if letter == "\\" else set()
    return {at + 1} if pattern[at] == letter else set()


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
    body, members = pattern[at:end].replace("\\\\", "\\"), Members()
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
    if spelling.glob_error(pattern):
        return
    matched = paths.matcher(pattern).fullmatch(path) is not None
    wanted, asked = pattern.split("/"), path.split("/")
    assert matched == (len(wanted) == len(asked) and all(map(fits, wanted, asked)))
    if is_literal(pattern):
        assert paths.matcher(pattern).fullmatch(paths.literal(pattern))
        assert not matched or path == paths.literal(pattern)
    if paths.is_device_path(path) and len(path) < 100:  # each is a regular expression to compile
        assert paths.matcher(globs.as_glob(path)).fullmatch(path)
    if matched:
        assert path.startswith(spelling.literal_folder(pattern) + "/")
        if paths.is_device_path(path) and fit.is_dangerous(path):
            assert globs.dangerous_name(pattern) or "*" in wanted[3:]  # a star alone names nothing
