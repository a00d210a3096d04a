"""T50: a right that was taken away serves a request that was on its way, or a connection from before."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from harness import (
    ALICE,
    BOB,
    MEM,
    PATIENCE_S,
    Raw,
    as_user,
    ask,
    ip,
    node,
    outcome,
    own_network,
    private_dev,
    replaced_file,
    running,
)

NET = {"namespace": {"type": "net", "name": "vpn"}}
GIVEN = "{devices: [{path: /dev/x}], namespaces: [{type: net, name: vpn}]}"
POLICY = f"version: 1\nusers: {{{ALICE}: {GIVEN}, {BOB}: {GIVEN}}}\n"
WITHOUT = f"version: 1\nusers: {{{BOB}: {GIVEN}}}\n"
DENIED = POLICY + f"deny: [{{users: [{ALICE}], devices: [/dev/x], namespaces: [{{type: net, name: vpn}}]}}]\n"


@pytest.mark.parametrize("after", [WITHOUT, DENIED], ids=["no rule", "a deny rule"])
def test_what_is_asked_before_and_answered_after_the_reload_is_denied(root, after):
    """The worker stands still in between; the same for who has kept the right goes on."""

    def wait_over_reload(address, ready, go):
        with Raw(address) as client:
            assert outcome(client.open("/dev/x")) == "granted"
            os.close(client.take())
            client.send_call("io.fdbroker.Broker.Open", {"resources": [{"device": "/dev/x"}, NET]})
            with Raw(address) as second:  # answered when that one was asked
                second.open("/dev/none")
            os.write(ready, b"x")
            os.read(go, 1)
            return [outcome(client.reply()), len(client.descriptors), outcome(client.open("/dev/x"))]

    with own_network(), private_dev():
        ip("netns", "add", "vpn")
        node("/dev/x", MEM["zero"])
        for uid, expected in ((ALICE, ["Denied", 0, "Denied"]), (BOB, ["granted", 2, "granted"])):
            with running(POLICY) as broker:
                ready, go = os.pipe(), os.pipe()
                os.kill(broker.pids["worker"], signal.SIGSTOP)
                child = os.fork()
                if child == 0:
                    code = 1
                    try:
                        code = (
                            0 if as_user(uid, [], wait_over_reload, broker.socket, ready[1], go[0]) == expected else 2
                        )
                    finally:
                        os._exit(code)
                os.read(ready[0], 1)
                broker.reload(after)
                assert "is reloaded" in broker.text()
                os.kill(broker.pids["worker"], signal.SIGCONT)
                os.write(go[1], b"x")
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
                for number in (*ready, *go):
                    os.close(number)


def test_the_number_of_a_removed_user_has_nothing_of_what_the_user_had(dev):
    """Another account may get it; and a deny rule still follows the members of its group."""
    node("/dev/x", MEM["zero"])
    node("/dev/y", MEM["zero"])
    policy = "version: 1\nusers: {alba: {devices: [{path: /dev/x}]}}\neveryone: {devices: [{path: /dev/y}]}\n"
    policy += "deny: [{groups: [guests], devices: [/dev/y]}]\n"
    users, groups = Path("/etc/passwd").read_text(), Path("/etc/group").read_text()
    line = f"{{}}:x:{ALICE}:{ALICE}::/nonexistent:/bin/sh\n"

    def until(path, expected):
        end = time.monotonic() + PATIENCE_S
        while as_user(ALICE, [], ask, broker.socket, path) != expected:
            assert time.monotonic() < end, broker.text()
            time.sleep(0.1)

    with (
        replaced_file("/etc/passwd", users + line.format("alba")),
        replaced_file("/etc/group", groups + "guests:x:60009:\n"),
    ):
        with running(policy) as broker:
            until("/dev/x", "granted")
            with replaced_file("/etc/passwd", users + line.format("cleo")):
                until("/dev/x", "Denied")
                until("/dev/y", "granted")
                with replaced_file("/etc/group", groups + "guests:x:60009:cleo\n"):
                    until("/dev/y", "Denied")
            until("/dev/x", "granted")
            assert broker.text().count("unknown user 'alba'") == 1
