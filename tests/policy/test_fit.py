"""What gives more than its name says, and whether a node is what a rule says."""

from __future__ import annotations

import stat
import time

import pytest

from fdbroker.errors import PolicyError
from fdbroker.policy import fit, globs
from fdbroker.policy.compile import load_policy
from fdbroker.policy.fit import Facts, dangerous_node, is_dangerous, misfit
from fdbroker.policy.globs import dangerous_name
from fdbroker.terms import DeviceRule


def said(tmp_path, rule):
    """What the loader says of a policy with this one rule."""
    path = tmp_path / "policy.yaml"
    path.write_text(f"version: 1\neveryone: {{devices: [{{{rule}}}]}}\n")
    try:
        load_policy(str(path), trusted=False)
    except PolicyError as error:
        return "\n".join(one.what for one in error.findings)
    return ""


@pytest.mark.parametrize(
    ("rule", "what"),
    [
        ("path: /dev/hvc0", "/dev/hvc0 can match /dev/hvc*"),
        ("path: /dev/ng0n1", "/dev/ng0n1 can match /dev/ng*"),
        ("path: /dev/snapshot", "can match /dev/snapshot"),
        ("path: /dev/usbmon0", "can match /dev/usbmon*"),
        ("path: /dev/userio", "can match /dev/userio"),
        ("path: /dev/uhid", "can match /dev/uhid"),
        ("path: /dev/vhci", "can match /dev/vhci"),
        ("path: /dev/cuse", "can match /dev/cuse"),
        ("path: /dev/ptmx", "can match /dev/ptmx"),
        ("path: /dev/input/uinput", "/dev/input/uinput can match /dev/input/uinput"),
        ('path: "/dev/input/u*"', "/dev/input/u* can match /dev/input/uinput"),
        ("path: /dev/cpu/0/msr", "/dev/cpu/0/msr can match /dev/cpu/0/msr"),
        ('path: "/dev/cpu/*/msr"', "/dev/cpu/*/msr can match /dev/cpu/*/msr"),
        ('path: "/dev/*/mem"', "/dev/*/mem can match /dev/m"),
        ("path: /dev/a/b/c/kmsg", "can match /dev/a/b/c/kmsg"),
        ("path: /dev/mapper/x", "can match /dev/mapper"),
        ('path: "/dev/pts/*"', "can match /dev/pts"),
        ("path: /dev/x, class: tty", "class tty"),
        ("path: /dev/x, class: block", "class block"),
        ("path: /dev/x, class: nvme-generic", "class nvme-generic"),
        ("path: /dev/x, class: usbmon", "class usbmon"),
        ("path: /dev/x, class: vc", "class vc"),
        ('path: /dev/x, device: "1:1"', "device 1:1, which is mem"),
        ('path: /dev/x, device: "1:4"', "device 1:4, which is port"),
        ('path: /dev/x, device: "1:11"', "device 1:11, which is kmsg"),
        ('path: /dev/x, device: "10:223", class: misc', "device 10:223, which is uinput"),
        ('path: /dev/x, device: "4:9"', "device 4:9, which is a terminal"),
        ('path: /dev/x, device: "4:*"', "device 4:*, which is a terminal"),
        ('path: /dev/x, device: "136:*"', "device 136:*, which is a terminal"),
        ('path: /dev/x, device: "188:3"', "device 188:3, which is a terminal"),
        ('path: /dev/x, device: "7:1"', "device 7:1, which is the memory of a console"),
    ],
)
def test_a_rule_that_gives_it_needs_dangerous(tmp_path, rule, what):
    assert what in said(tmp_path, rule)
    assert "which gives power over the machine" in said(tmp_path, rule)
    assert said(tmp_path, rule + ", dangerous: true") == ""


@pytest.mark.parametrize(
    "rule",
    [
        'path: "/dev/snd/*", access: rw',  # judged when it is opened
        'path: "/dev/input/*", class: input',
        'path: "/dev/input/m*", class: input',  # mouse0; mem and msr are of other classes
        'path: "/dev/input/m*", device: "13:*"',  # and have other numbers
        'path: /dev/kvm, class: misc, device: "10:232"',
        'path: /dev/null, class: mem, device: "1:3"',
        'path: /dev/null, class: mem, device: "1:*"',
        'path: "/dev/video*", class: video4linux',
        'path: "/dev/serial/by-id/usb-*"',
    ],
)
def test_a_rule_that_need_not_give_it_does_not(tmp_path, rule):
    assert said(tmp_path, rule) == ""


@pytest.mark.parametrize("rule", ['path: "/dev/input/m*", class: misc', 'path: "/dev/input/m*", device: "10:*"'])
def test_classes_and_numbers_that_harmless_and_dangerous_ones_share_say_nothing(tmp_path, rule):
    assert "/dev/input/m* can match /dev/input/mem" in said(tmp_path, rule)


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        (Facts("/dev/a", stat.S_IFCHR, "4:9", "tty", "tty9"), "its number 4:9 is that of a terminal"),
        (Facts("/dev/a", stat.S_IFCHR, "250:0", "tty", "ttyMI0"), "its class is tty"),
        (Facts("/dev/a", stat.S_IFCHR, "250:0", "usbmon", "usbmon0"), "its class is usbmon"),
        (Facts("/dev/a", stat.S_IFCHR, "250:0", "new", "ng0n1"), "the kernel calls it ng0n1"),
        (Facts("/dev/a", stat.S_IFCHR, "10:120", "misc", "userio"), "the kernel calls it userio"),
        (Facts("/dev/a", stat.S_IFCHR, "10:223", "", ""), "its number 10:223 is that of uinput"),
        (Facts("/dev/a", stat.S_IFCHR, "136:0", "", ""), "its number 136:0 is that of a terminal"),
        (Facts("/dev/mem", stat.S_IFCHR, "1:3", "mem", "null"), "its name is /dev/mem"),
        (Facts("/dev/cpu/0/msr", stat.S_IFCHR, "250:0", "", ""), "its name is /dev/cpu/0/msr"),
        (Facts("/dev/a", stat.S_IFBLK, "250:0", "block", "x"), "it is a block device"),
        (Facts("/dev/snd/a", stat.S_IFCHR, "116:3", "sound", "controlC0"), ""),
        (Facts("/dev/null", stat.S_IFCHR, "1:3", "mem", "null"), ""),
        (Facts("/dev/net/tun", stat.S_IFCHR, "10:200", "misc", "tun"), ""),
        (Facts("/dev/a", stat.S_IFCHR, "250:0", "", ""), ""),
    ],
)
def test_a_node_is_judged_by_name_number_class_and_what_the_kernel_calls_it(facts, why):
    assert dangerous_node(facts) == why
    rule = DeviceRule("/dev/*", "rw", "", "", False, "everyone", "p:1")
    assert misfit(rule, facts) == (f"{why}, and the rule is not marked dangerous" if why else "")
    assert misfit(rule._replace(dangerous=True), facts) == ""


def test_a_terminal_of_a_window_has_no_class_and_the_refusal_says_so():
    rule = DeviceRule("/dev/pts/*", "rw", "tty", "", True, "everyone", "p:1")
    why = misfit(rule, Facts("/dev/pts/3", stat.S_IFCHR, "136:3", "", ""))
    assert (
        why == 'its class is unknown, not tty: the kernel names none for /dev/pts; write `device: "136:*"` in its place'
    )
    assert misfit(rule, Facts("/dev/pts/3", stat.S_IFCHR, "240:3", "", "")) == "its class is unknown, not tty"


@pytest.mark.parametrize("name", [name.replace("*", "0") for name in fit.DANGEROUS_NAMES])
def test_every_dangerous_name_at_any_depth(name):
    for path in (f"/dev/{name}", f"/dev/{name}/below", f"/dev/a/{name}", f"/dev/a/b/{name}/c"):
        assert is_dangerous(path)
        assert dangerous_name(path)
        assert dangerous_name(path.replace("/dev/a", "/dev/*"))
    assert not is_dangerous(f"/dev/x{name}x")
    assert dangerous_name("/dev/*")
    assert dangerous_name(f"/dev/?{name[1:]}")
    assert dangerous_name(f"/dev/a/?{name[1:]}")


def test_dangerous_names_have_a_star_at_the_end_or_none():
    """What globs.py reckons with."""
    assert all("*" not in name[:-1] and not set("?[\\") & set(name) for name in fit.DANGEROUS_NAMES)


def test_a_thousand_globs_are_judged_in_time():
    began = time.process_time()
    assert all(not globs.dangerous_name(f"/dev/bus{n}/x*/u?b{n}[a-f]*/?y{n}*") for n in range(1000))
    assert time.process_time() - began < 2


def test_every_number_and_class_of_the_tables_is_dangerous():
    for number in fit.DANGEROUS_NUMBERS:
        assert dangerous_node(Facts("/dev/a", stat.S_IFCHR, number.replace("*", "200"), "", ""))
    for kernel_class in fit.DANGEROUS_CLASSES:
        assert dangerous_node(Facts("/dev/a", stat.S_IFCHR, "250:0", kernel_class, "a"))


def test_what_a_path_is_asked_costs_no_more_than_its_length():
    path = "/dev" + "/m" * 2045
    assert not is_dangerous(path)
    assert not dangerous_name(path)


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
