"""Paths and globs as text."""

from __future__ import annotations

import pytest

from fdbroker.policy.paths import dangerous_name, glob_error, is_dangerous, is_device_path, literal_folder, matcher


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
        ("/dev/a\\*", "no escape"),
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


@pytest.mark.parametrize(
    "name",
    [
        "mem",
        "port",
        "kmsg",
        "watchdog",
        "watchdog0",
        "tty",
        "ttyS0",
        "pts",
        "vcs",
        "vcsa1",
        "console",
        "sda",
        "nvme0n1",
        "loop0",
        "st0",
        "uinput",
    ],
)
def test_dangerous_names(name):
    assert is_dangerous(f"/dev/{name}")
    assert is_dangerous(f"/dev/{name}/below")
    assert dangerous_name(f"/dev/{name}")
    assert dangerous_name("/dev/*")
    assert dangerous_name(f"/dev/?{name[1:]}")


@pytest.mark.parametrize(
    "path",
    [
        "/dev/snd/pcmC0D0p",
        "/dev/input/event0",
        "/dev/null",
        "/dev/kvm",
        "/dev/fuse",
        "/dev/net/tun",
        "/dev/dri/card0",
        "/dev/serial/by-id/x",
        "/dev/rtc0",
        "/dev/memx",
    ],
)
def test_names_that_are_not(path):
    assert not is_dangerous(path)
    assert not dangerous_name(path)


def test_the_folder_of_a_glob():
    assert literal_folder("/dev/snd/pcm*") == "/dev/snd"
    assert literal_folder("/dev/*/x") == "/dev"
    assert literal_folder("/dev/null") == "/dev"


def test_a_path_at_the_kernels_limits():
    assert is_device_path("/dev/" + "a" * 255)
    assert not is_device_path("/dev/" + "a" * 256)
    assert not is_device_path("/dev/" + "ä" * 128)
    longest = "/dev" + "/a" * 2045
    assert len(longest) == 4094
    assert is_device_path(longest + "a")
    assert not is_device_path(longest + "aa")
