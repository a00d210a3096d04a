"""T5: paths that mean something else than they say."""

from __future__ import annotations

import os

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


def test_they_are_denied_and_the_service_goes_on(dev):
    node("/dev/pool/x", MEM["zero"])
    with running(POLICY) as broker, Raw(broker.socket) as client:
        for path in ODD:
            reply = client.open(path)
            assert outcome(reply) == "Denied", path
            assert reply["parameters"]["resource"]["device"] == path
            assert outcome(client.open("/dev/null")) == "granted"
            os.close(client.take())


def test_links_into_proc_are_refused(dev):
    os.symlink("/proc/self/fd/0", "/dev/stdin")
    with running(POLICY) as broker:
        for path in ("/dev/fd/0", "/dev/fd/1", "/dev/fd/3", "/dev/fd/18", "/dev/stdin"):
            assert ask(broker.socket, path) == "NotWhatItWas", path


def test_longest_names_pass_and_one_byte_more_does_not(dev):
    node("/dev/" + "a" * 255, MEM["zero"])
    with running(POLICY) as broker:
        assert ask(broker.socket, "/dev/" + "a" * 255) == "granted"
        assert ask(broker.socket, "/dev/" + "a" * 256) == "Denied"


def test_what_is_not_unicode_ends_the_connection_and_nothing_else(dev):
    with running(POLICY) as broker:
        for path in (b"/dev/\xff\xfe", b"/dev/\xed\xa0\x80", rb"/dev/\ud800", rb"/dev/\ud800\u0041", b"/dev/nul\xcc"):
            with Raw(broker.socket) as client:
                message = b'{"method":"io.fdbroker.Broker.Open","parameters":{"resources":[{"device":"%s"}]}}\0' % path
                client.sock.sendall(message)
                assert outcome(client.reply()) in ("disconnected", "Denied", "InvalidParameter"), path
            assert ask(broker.socket, "/dev/null") == "granted"


def test_the_longest_path_passes_and_one_byte_more_does_not(dev):
    """4095 bytes are what PATH_MAX leaves without its NUL; the path is allowed, so it is looked for."""
    longest = "/dev" + "/" + "/".join(["b" * 200] * 20)
    longest += "/" + "c" * (4095 - len(longest) - 1)
    policy = 'version: 1\neveryone: {devices: [{path: "/dev%s", dangerous: true}]}\n' % ("/*" * 21)
    with running(policy) as broker:
        assert len(longest) == 4095
        assert ask(broker.socket, longest) == "NoSuchResource"
        assert ask(broker.socket, longest + "c") == "Denied"
