"""T2: a node whose name fits but whose device does not."""

from __future__ import annotations

import os
import stat

import pytest
from harness import MEM, Raw, node, outcome, running

POLICY = """
version: 1
everyone:
  devices:
    - {path: "/dev/input/event*", class: input}
    - {path: "/dev/number/*", device: "1:5"}
    - {path: "/dev/plain/*"}
"""


@pytest.mark.parametrize(
    ("path", "rdev", "kind", "reason"),
    [
        ("/dev/input/event99", MEM["null"], stat.S_IFCHR, "class is mem, not input"),
        ("/dev/input/event98", os.makedev(1, 1), stat.S_IFCHR, "not input"),
        ("/dev/input/event97", os.makedev(240, 77), stat.S_IFCHR, "class is unknown, not input"),
        ("/dev/number/x", MEM["null"], stat.S_IFCHR, "device number is 1:3, not 1:5"),
        ("/dev/plain/regular", 0, stat.S_IFREG, "it is a regular file, not a device node"),
        ("/dev/plain/fifo", 0, stat.S_IFIFO, "it is a FIFO, not a device node"),
        ("/dev/plain/block", os.makedev(7, 0), stat.S_IFBLK, "block device"),
    ],
)
def test_it_is_refused_with_the_reason(dev, path, rdev, kind, reason):
    node(path, rdev, kind=kind)
    with running(POLICY) as broker, Raw(broker.socket) as client:
        reply = client.open(path)
        assert outcome(reply) == "NotWhatItWas"
        assert reason in reply["parameters"]["reason"]
        assert not client.descriptors
        assert broker.records("refused")[-1]["FDBROKER_STAGE"] == "open"
