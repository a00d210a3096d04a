"""Paths and globs as text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdbroker.policy import paths
from fdbroker.policy.decide import View, decide
from fdbroker.policy.globs import as_glob
from fdbroker.policy.literals import is_literal
from fdbroker.policy.paths import Globs, is_device_path, literal, matcher
from fdbroker.policy.spelling import glob_error, literal_folder
from fdbroker.terms import DenyRule, Device, DeviceRule


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        (
            "/dev/snd/pcmC*D*[pc]",
            ["/dev/snd/pcmC0D0p", "/dev/snd/pcmC10D3c"],
            ["/dev/snd/pcmC0D0", "/dev/snd/pcmC0/D0p", "/dev/snd/xpcmC0D0p", "/dev/snd/pcmC0D0p/"],
        ),
        (
            "/dev/input/event*",
            ["/dev/input/event", "/dev/input/event99"],
            ["/dev/input/by-id/event1", "/dev/input/event1/x"],
        ),
        ("/dev/tty?", ["/dev/tty1"], ["/dev/tty", "/dev/tty10", "/dev/tty/"]),
        ("/dev/[!a-c]x", ["/dev/dx", "/dev/!x"], ["/dev/ax", "/dev//x"]),
        ("/dev/[!-c]x", ["/dev/0x", "/dev/ax", "/dev/.x"], ["/dev/-x", "/dev/cx", "/dev//x"]),
        ("/dev/[!!-]x", ["/dev/ax"], ["/dev/!x", "/dev/-x", "/dev//x"]),
        ("/dev/[-c]x", ["/dev/-x", "/dev/cx"], ["/dev/ax", "/dev//x"]),
        ("/dev/[]x]", ["/dev/]", "/dev/x"], ["/dev/[]x]"]),
        ("/dev/[a-]", ["/dev/a", "/dev/-"], ["/dev/b"]),
        ("/dev/a.b", ["/dev/a.b"], ["/dev/axb"]),
        ("/dev/x\\\\x20y", ["/dev/x\\x20y"], ["/dev/x\\\\x20y", "/dev/x y", "/dev/xx20y"]),
        ("/dev/x[\\\\a]?", ["/dev/x\\y", "/dev/xay"], ["/dev/xby", "/dev/x\\"]),
        ("/dev/\\\\*", ["/dev/\\", "/dev/\\x2f"], ["/dev/x", "/dev/*"]),
        ("/dev/*/*", ["/dev/a/b"], ["/dev/a", "/dev/a/b/c"]),
        ("/dev/a*b*c", ["/dev/abc", "/dev/axxbxbxxc"], ["/dev/ab", "/dev/acb"]),
    ],
)
def test_wildcards_match_within_a_name(pattern, yes, no):
    assert not glob_error(pattern)
    for path in yes:
        assert matcher(pattern).fullmatch(path), path
    for path in no:
        assert not matcher(pattern).fullmatch(path), path


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("/etc/x", "begins with /dev/"),
        ("/dev", "begins with /dev/"),
        ("dev/x", "begins with /dev/"),
        ("/dev/", "empty name"),
        ("/dev//x", "empty name"),
        ("/dev/x/", "empty name"),
        ("/dev/../x", ".. is not allowed"),
        ("/dev/./x", ". is not allowed"),
        ("/dev/**", "never matches a slash"),
        ("/dev/{a,b}", "write two rules"),
        ("/dev/a\\*", "a backslash is written as two"),
        ("/dev/a\\\\\\b", "a backslash is written as two"),
        ("/dev/[\\]", "a backslash is written as two"),
        ("/dev/[a", "without its ]"),
        ("/dev/[z-a]", "not a set"),
        ("/dev/[]", "not a set"),
        ("/dev/\x1b", "cannot be printed"),
        ("/dev/" + "x" * 256, "over 255 bytes"),
        ("/dev/" + "x/" * 2100 + "x", "over 4095 bytes"),
    ],
)
def test_a_glob_that_is_no_good_says_why(pattern, why):
    assert why in glob_error(pattern)


def test_the_folder_of_a_glob():
    assert literal_folder("/dev/snd/pcm*") == "/dev/snd"
    assert literal_folder("/dev/*/x") == "/dev"
    assert literal_folder("/dev/null") == "/dev"
    assert literal_folder("/dev/a\\\\b/x") == "/dev/a\\b"


def test_a_path_at_the_kernels_limits():
    assert is_device_path("/dev/" + "a" * 255)
    assert not is_device_path("/dev/" + "a" * 256)
    assert not is_device_path("/dev/" + "ä" * 128)
    longest = "/dev" + "/a" * 2045
    assert len(longest) == 4094
    assert is_device_path(longest + "a")
    assert not is_device_path(longest + "aa")


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("/dev/snd/pcm[^0]", "[^0] would match ^ itself: a set of other characters is written [!0]"),
        ("/dev/snd/pcm[^]0-9]", "a set of other characters is written [!"),
        ("/dev/[[:digit:]]", "[[:digit:]] is not known: write the characters themselves, such as [0-9]"),
        ("/dev/[![:alpha:]]x", "[![:alpha:]] is not known: write the characters themselves, such as [a-zA-Z]"),
        ("/dev/[[:frob:]]", "[[:frob:]] is not known: write the characters themselves, such as [a-z]"),
        ("/dev/[[=a=]]", "write the characters themselves"),
        ("/dev/[[.-.]]", "write the characters themselves"),
        ("/dev/[a[:digit:]b]", "write the characters themselves"),
    ],
)
def test_sets_that_mean_something_else_in_other_languages_say_how_they_are_written(pattern, why):
    assert why in glob_error(pattern)


@pytest.mark.parametrize("pattern", ["/dev/[a^]", "/dev/[!^]", "/dev/[[]", "/dev/[[a]", "/dev/[:a]", "/dev/[a:]"])
def test_and_these_do_not(pattern):
    assert not glob_error(pattern)


@pytest.mark.parametrize("path", ["/dev/a", "/dev/x\\x20y", "/dev/a*b?c[d]e", "/dev/\\/\\\\", "/dev/]"])
def test_a_path_as_a_glob_names_that_path_alone(path):
    assert not glob_error(as_glob(path))
    assert matcher(as_glob(path)).fullmatch(path)
    assert not matcher(as_glob(path)).fullmatch(path.replace("a", "b") + "c")
    if is_literal(as_glob(path)):
        assert literal(as_glob(path)) == path


def test_a_path_with_braces_is_named_as_nearly_as_globs_can():
    assert as_glob("/dev/{a}") == "/dev/?a?"


PIECES = st.sampled_from(["/dev", "/", "a", "b", "ab", "*", "?", "[ab]", "[!a]", "[?*]", "\\\\", "é"])
NAMES = st.sampled_from(["/dev", "/", "a", "b", "ab", "\\", "é", "*", "?", "["])


@given(st.lists(st.lists(PIECES, max_size=6).map("".join), max_size=9), st.lists(NAMES, max_size=6).map("".join))
def test_globs_that_are_looked_up_are_those_that_match_in_order(patterns, path):
    """Also when several are the same, and when one begins as another does."""
    wanted = [position for position, pattern in enumerate(patterns) if matcher(pattern).fullmatch(path)]
    assert Globs((pattern, position) for position, pattern in enumerate(patterns)).matching(path) == wanted


def test_of_many_rules_only_those_that_can_match_are_tried(monkeypatch):
    """What an open costs follows the rules that can be for its path, not all of them."""
    names = [f"/dev/ttyUSB{number}" for number in range(1000)] + [f"/dev/snd{number}/*" for number in range(1000)]
    rules = tuple(DeviceRule(name, "rw", "tty", "", True, "everyone", "f:1") for name in names)
    deny = tuple(DenyRule((f"{name}/no",), (), frozenset(), frozenset(), True, "everyone", "f:2") for name in names)
    seen = View(rules, (), deny, {}, administrator=False)
    tried: list[str] = []
    real = paths.matcher
    monkeypatch.setattr(paths, "matcher", lambda pattern: tried.append(pattern) or real(pattern))
    for path, rule in (("/dev/ttyUSB7", rules[7]), ("/dev/snd8/x", rules[1008])):
        tried.clear()
        assert decide(seen, Device(path, "ro")).rules == (rule,)
        assert len(tried) <= 3
