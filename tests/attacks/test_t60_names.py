"""T60: names are judged instead of devices: power over the machine under a harmless name, or by a rule that hides it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from harness import MEM, Raw, mount, node, outcome, running, unmount

from fdbroker.errors import PolicyError
from fdbroker.policy.compile import load_policy

POLICY = """
version: 1
everyone:
  devices:
    - {path: "/dev/plain/*"}
    - {path: "/dev/meant/*", dangerous: true}
"""

# what is on every machine, and numbers that no driver here has
POWERFUL = [
    "1:1",
    "1:4",
    "1:11",
    "4:0",
    "4:9",
    "4:64",
    "5:1",
    "5:2",
    "7:0",
    "10:223",
    "10:239",
    "136:0",
    "229:0",
]


def test_power_over_the_machine_under_a_harmless_name_is_refused(dev):
    """And none of it is listed. A rule that means it says so; then it is opened."""
    for number in POWERFUL:
        for folder in ("plain", "meant"):
            node(f"/dev/{folder}/{number.replace(':', '-')}", os.makedev(*map(int, number.split(":"))), 0o666)
    os.symlink("../plain/4-9", "/dev/plain/link")
    node("/dev/plain/null", MEM["null"], 0o666)
    with running(POLICY) as broker, Raw(broker.socket) as client:
        for number in POWERFUL:
            reply = client.open(f"/dev/plain/{number.replace(':', '-')}")
            assert outcome(reply) == "NotWhatItWas", number
            assert "the rule is not marked dangerous" in reply["parameters"]["reason"]
        assert outcome(client.open("/dev/plain/link")) == "NotWhatItWas"
        assert outcome(client.open("/dev/plain/null")) == "granted"
        for number in ("1:11", "4:9", "5:2"):  # whether the kernel opens them here is another question
            assert outcome(client.open(f"/dev/meant/{number.replace(':', '-')}")) in ("granted", "OpenFailed")
        listed = {
            offer["resource"]["device"] for offer in client.call("io.fdbroker.Broker.List")["parameters"]["resources"]
        }
        assert {path for path in listed if path.startswith("/dev/plain")} == {"/dev/plain/null"}


@pytest.mark.parametrize(
    ("kernel_class", "name", "reason"),
    [("usbmon", "usbmon0", "its class is usbmon"), ("nvme-generic", "x", "class"), ("new", "ng0n1", "calls it ng0n1")],
)
def test_it_is_known_by_what_the_kernel_calls_it_whatever_its_number(dev, kernel_class, name, reason):
    """A number of the range for experiments (240 to 254), with what /sys/dev would say of it."""
    node("/dev/plain/x", os.makedev(240, 7), 0o666)
    mount("sys", "/sys/dev", "tmpfs", 0, "mode=0755")
    try:
        device = Path(f"/sys/dev/devices/{name}")
        for path in (device, Path("/sys/dev/char"), Path(f"/sys/dev/class/{kernel_class}")):
            path.mkdir(parents=True)
        (device / "subsystem").symlink_to(f"../../class/{kernel_class}")
        Path("/sys/dev/char/240:7").symlink_to(f"../devices/{name}")
        with running(POLICY) as broker, Raw(broker.socket) as client:
            reply = client.open("/dev/plain/x")
            assert outcome(reply) == "NotWhatItWas"
            assert reason in reply["parameters"]["reason"]
    finally:
        unmount("/sys/dev")


# each loaded without a word
HIDING = [
    *("path: /dev/hvc0", "path: /dev/ng0n1", "path: /dev/snapshot", "path: /dev/usbmon0", "path: /dev/userio"),
    *("path: /dev/vhci", "path: /dev/input/uinput", "path: /dev/cpu/0/msr", 'path: "/dev/cpu/*/msr"'),
    *('path: /dev/mine, device: "1:1"', 'path: /dev/mine, device: "4:9"', 'path: "/dev/mine/*", device: "4:*"'),
    *("path: /dev/mine, class: tty", "path: /dev/mine, class: block", 'path: "/dev/[u-v]input"', 'path: "/dev/?vc0"'),
]


@pytest.mark.parametrize("rule", HIDING)
def test_a_rule_that_gives_more_than_its_name_says_must_say_so(tmp_path, rule):
    """Nothing else is wrong with it: with `dangerous: true` it is loaded."""
    path = tmp_path / "policy.yaml"
    path.write_text(f"version: 1\neveryone: {{devices: [{{{rule}, dangerous: true}}]}}\n")
    assert load_policy(str(path), trusted=False).policy.everyone[0].dangerous
    path.write_text(f"version: 1\neveryone: {{devices: [{{{rule}}}]}}\n")
    with pytest.raises(PolicyError, match="dangerous"):
        load_policy(str(path), trusted=False)


def test_a_block_device_is_dangerous_whatever_it_is_called(dev):
    for folder in ("plain", "meant"):
        node(f"/dev/{folder}/mine", os.makedev(240, 0), 0o666, kind=stat.S_IFBLK)
    with running(POLICY) as broker, Raw(broker.socket) as client:
        reply = client.open("/dev/plain/mine")
        assert outcome(reply) == "NotWhatItWas"
        assert reply["parameters"]["reason"] == "it is a block device, and the rule is not marked dangerous"
        assert outcome(client.open("/dev/meant/mine")) == "OpenFailed"  # no driver has that number
