"""T46: a program claims a label, or a label that is missing matches.

With labels that a real kernel says: tests/system/test_mac.py.
"""

from __future__ import annotations

import ctypes
import errno
import socket

import pytest
from harness import ALICE, MEM, Raw, as_user, ask, node, running

from fdbroker.cli.here import own_label
from fdbroker.kernel import sockets
from fdbroker.limits import every as limits
from fdbroker.policy.compile import load_policy
from fdbroker.policy.decide import decide, view
from fdbroker.terms import Device, Subject

LABEL = "t46-player"
POLICY = f"""version: 1
everyone:
  devices:
    - {{path: /dev/x, label: ["{LABEL}", "*t46*"]}}
    - {{path: /dev/y}}
deny:
  - {{everyone: true, label: "{LABEL}", devices: [/dev/y]}}
"""


def labelled(said):
    """A subject whose label is what a socket with this SO_PEERSEC has."""

    def option(sock, option, size):
        if said is None:
            raise OSError(errno.ENOPROTOOPT, "no such option")
        return said

    with pytest.MonkeyPatch.context() as patch, socket.socket(socket.AF_UNIX) as sock:
        patch.setattr(sockets, "_option_bytes", option)
        return Subject(ALICE, frozenset({ALICE}), ALICE, 0, "", sockets.peer_label(sock), foreign=True)


@pytest.fixture
def judged(tmp_path):
    """Whether a program with this SO_PEERSEC gets /dev/x, which is for a label, and /dev/y, which is denied to it."""
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY.replace('["t46-player", "*t46*"]', '["t46-player", "*"]'))
    policy = load_policy(str(path), trusted=False).policy

    def judge(said):
        seen = view(policy, labelled(said))
        return tuple(bool(decide(seen, Device(name, "ro")).rules) for name in ("/dev/x", "/dev/y"))

    return judge


@pytest.mark.parametrize("said", [None, b"", b"\0", b"\n", b"t46-player\0" * 1000])
def test_a_label_that_is_not_known_allows_nothing_and_spares_from_nothing(judged, said):
    """No security module, an empty label, one that is longer than any: never even `*`, and every deny rule."""
    assert judged(said) == (False, False)


@pytest.mark.parametrize("said", [b"t46-player (enforce)", b"t46-player (enforce)\n", b"t46-player (kill)\0"])
def test_the_label_itself_does(judged, said):
    """With the ends that kernels write."""
    assert judged(said) == (True, False)


@pytest.mark.parametrize(
    "said",
    [
        b"t46-player (complain)",
        b"t46-player (unconfined)",
        b"t46-player//&other (mixed)",
        b":mine:t46-player (enforce)",
        b":mine:x//&t46-player (enforce)",
    ],
)
def test_a_profile_that_does_not_confine_or_that_a_user_made_allows_nothing(judged, said):
    """Complain mode forbids nothing, and in a policy namespace of its own a user gives its profiles any name."""
    assert judged(said) == (False, False)


@pytest.mark.parametrize("said", [b"unconfined", b":mine:unconfined"])
def test_without_confinement_no_label_matches(judged, said):
    assert judged(said) == (False, True)


def test_a_label_is_kept_up_to_its_limit():
    """One byte more, and it counts as unknown."""
    most = limits.LABEL_BYTES
    assert labelled(b"a" * most).label == "a" * most
    assert labelled(b"a" * (most + 1)).label == ""
    assert labelled(b"\xff" * (most // 4)).label == "\\xff" * (most // 4)
    assert labelled(b"\xff" * (most // 4 + 1)).label == ""  # as it travels; it ended the service


def test_no_client_gets_in_by_what_it_says_itself(dev):
    """In its call, in its name, in its message: a label comes from the kernel alone."""
    node("/dev/x", MEM["zero"])
    node("/dev/y", MEM["zero"])
    claims = [
        b'{"method":"io.fdbroker.Broker.Open","parameters":{"resources":[{"device":"/dev/x"}],"label":"%s"}}\0',
        b'{"method":"io.fdbroker.Broker.Open","parameters":{"resources":[{"device":"/dev/x","label":"%s"}]}}\0',
        b'{"method":"io.fdbroker.Broker.Open","label":"%s","parameters":{"resources":[{"device":"/dev/x"}]}}\0',
    ]

    def claim(address):
        ctypes.CDLL(None).prctl(15, LABEL.encode())  # PR_SET_NAME
        answers = [ask(address, "/dev/x"), ask(address, "/dev/y")]
        for call in claims:
            with Raw(address) as client:
                client.sock.sendall(call % f"{LABEL} (enforce)".encode())
                reply = client.reply()
                answers.append(reply and reply.get("error", "granted").rpartition(".")[2])
        return answers

    with running(POLICY) as broker:
        label = own_label()  # of this machine: a known one is not denied
        y = "granted" if label else "Denied"
        first, second, *others = as_user(ALICE, [], claim, broker.socket)
        assert (first, second) == ("Denied", y)
        assert set(others) <= {"Denied", "InvalidParameter", None}, others
        assert not broker.records("granted") or label
