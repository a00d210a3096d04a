"""T5: paths that mean something else than they say."""

from __future__ import annotations

import os

import pytest
from harness import MEM, Raw, ask, node, outcome, running

# As wide as a policy can be written.
POLICY = 'version: 1\neveryone: {devices: [{path: "/dev/*", access: rw, dangerous: true}, {path: "/dev/*/*", dangerous: true}, {path: "/dev/*/*/*", dangerous: true}]}\n'

ODD = [
    "",
    "/",
    "/dev",
    "/dev/",
    "dev/null",
    "null",
    "./null",
    "/dev/../dev/null",
    "/dev/./null",
    "/dev//null",
    "//dev/null",
    "/dev/null/",
    "/dev/pool/../null",
    "/dev/pool/..",
    "/dev/..",
    "/dev/../etc/passwd",
    "/proc/self/root/dev/null",
    "/proc/self/fd/0",
    "/etc/passwd",
    "/dev/null\0",
    "/dev/null\0/x",
    "/dev/nu\nll",
    "/dev/\x1b[31mnull",
    "/dev/\u202enull",
    "/dev/" + "a" * 256,
    "/dev/" + "a/" * 2100 + "b",
    "/dev/" + "/".join(["a" * 200] * 21),
    "/DEV/null",
]


@pytest.mark.parametrize("path", ODD, ids=range(len(ODD)))
def test_they_are_denied_and_the_service_goes_on(dev, path):
    node("/dev/pool/x", MEM["zero"])
    with running(POLICY) as broker, Raw(broker.socket) as client:
        reply = client.open(path)
        assert outcome(reply) == "Denied"
        assert reply["parameters"]["resource"]["device"] == path
        assert ask(broker.socket, "/dev/null") == "granted"


@pytest.mark.parametrize("path", ["/dev/fd/0", "/dev/fd/1", "/dev/fd/3", "/dev/stdin"])
def test_links_into_proc_are_refused(dev, path):
    os.symlink("/proc/self/fd/0", "/dev/stdin")
    with running(POLICY) as broker:
        assert ask(broker.socket, path) == "NotWhatItWas"


def test_longest_names_pass_and_one_byte_more_does_not(dev):
    node("/dev/" + "a" * 255, MEM["zero"])
    with running(POLICY) as broker:
        assert ask(broker.socket, "/dev/" + "a" * 255) == "granted"
        assert ask(broker.socket, "/dev/" + "a" * 256) == "Denied"


@pytest.mark.parametrize("bytes_", [b"/dev/\xff\xfe", b"/dev/\xed\xa0\x80", rb"/dev/\ud800", rb"/dev/\ud800\u0041"])
def test_what_is_not_unicode_ends_the_connection_and_nothing_else(dev, bytes_):
    with running(POLICY) as broker:
        with Raw(broker.socket) as client:
            message = b'{"method":"io.fdbroker.Broker.Open","parameters":{"resources":[{"device":"%s"}]}}\0' % bytes_
            client.sock.sendall(message)
            assert outcome(client.reply()) in ("disconnected", "Denied", "InvalidParameter")
        assert ask(broker.socket, "/dev/null") == "granted"
