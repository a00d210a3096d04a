"""Names as udev makes them, with backslashes: in a rule, in what `list` prints, and given to `open` and `explain`.

And the names of mounts, which any user who may mount by FUSE chooses.
"""

from __future__ import annotations

import json
import os
import shlex

import pytest
from harness import MEM, Raw, command, folder, mount, node, outcome, running, unmount

ODD = [r"/dev/odd/x\x20y", r"/dev/odd/a\\b", r"/dev/odd/\\\x5c", "/dev/odd/\\", r"/dev/odd/sp ace\x2f", "/dev/odd/é"]
POLICY = r"""version: 1
everyone:
  devices:
    - {path: "/dev/odd/*", class: mem, device: "1:5"}
    - {path: /dev/one/x\\x20y, class: mem, device: "1:5"}
    - {path: '/dev/one/a[\\]\\*', class: mem, device: "1:5"}
    - {path: "/dev/one/in\\\\quotes", class: mem, device: "1:5"}
"""
ONE = [r"/dev/one/x\x20y", r"/dev/one/a\\b", r"/dev/one/in\quotes"]


@pytest.fixture
def broker(dev):
    for path in (*ODD, *ONE, "/dev/one/xx20y"):
        node(path, MEM["zero"], 0o644)
    for name in (b"/dev/odd/\xff", b"/dev/odd/\xed\xa0\x80", b"/dev/odd/new\nline", b"/dev/odd/\x1b[31m"):
        os.mknod(name, 0o20644, MEM["zero"])
    with running(POLICY) as broker:
        yield broker


def test_what_list_prints_can_be_given_to_open(broker):
    """Names that are no text, or cannot be printed, are not offered."""
    code, out, err = command(broker.socket, "list")
    assert code == 0, err
    printed = [row.split("\t")[0] for row in out.rstrip("\n").split("\n")]
    assert sorted(word.replace("\\\\", "\\") for word in printed) == sorted([*ODD, *ONE])
    for word in printed:
        code, out, err = command(broker.socket, "open", "--json", word)
        assert code == 0, (word, err)
        assert json.loads(out)[0]["resource"] == word.replace("\\\\", "\\")


@pytest.mark.parametrize("path", [r"/dev/odd/x\x20y", "/dev/odd/\\", r"/dev/odd/sp ace\x2f", r"/dev/one/in\quotes"])
def test_so_can_the_name_itself_as_a_shell_completes_it(broker, path):
    """And what `list --json` has: one backslash before something else stands for itself."""
    code, out, _ = command(broker.socket, "list", "--json")
    assert code == 0
    assert path in [offer["resource"] for offer in json.loads(out)]
    assert command(broker.socket, "open", path)[0] == 0


def test_the_wire_has_the_name_and_nothing_else(broker):
    with Raw(broker.socket) as client:
        assert outcome(client.open(r"/dev/odd/x\x20y")) == "granted"
        assert outcome(client.open(r"/dev/one/x\\x20y")) == "Denied"
        assert outcome(client.open("/dev/one/xx20y")) == "Denied"


def test_explain_takes_what_list_prints_and_open_says_what_can_be_typed(broker, tmp_path):
    for word in (r"/dev/odd/x\\x20y", r"/dev/odd/x\x20y"):
        code, out, err = command(broker.socket, "policy", "explain", "--policy", str(broker.policy), word)
        assert code == 0, err
        assert r"allow: ro /dev/odd/x\\x20y for" in out
    code, _, err = command(broker.socket, "open", r"/dev/not/x\x20$(y) z")
    assert code == 77
    said = shlex.split(err.rpartition("what would allow it: ")[2])
    assert said[:3] == ["fdbroker", "policy", "explain"]
    code, out, _ = command(broker.socket, *said[1:], "--policy", str(broker.policy), "--json")
    assert code == 77
    assert json.loads(out)[0]["resource"] == r"/dev/not/x\x20$(y) z"


def test_a_test_of_the_policy_is_written_likewise(broker):
    broker.policy.write_text(POLICY + r"tests: [{as: {user: 50001}, open: /dev/one/x\\x20y, expect: allow}]" + "\n")
    assert command(broker.socket, "policy", "test", str(broker.policy))[0] == 0


def test_the_rule_that_explain_suggests_is_one(broker):
    for path in (r"/dev/not/x\x20y", "/dev/not/a*b?c[d", "/dev/not/a'b", '/dev/not/a"b', "/dev/not/a: b#c, d"):
        node(path, MEM["zero"], 0o644)
        broker.policy.write_text("version: 1\n")
        code, out, _ = command(
            broker.socket, "policy", "explain", "--policy", str(broker.policy), "--user", "50001", path, "--json"
        )
        assert code == 77
        rule = json.loads(out)[0]["change"].partition("`")[2].rpartition("`")[0]
        broker.policy.write_text(f"version: 1\nusers: {{{rule}}}\n")
        code, out, err = command(
            broker.socket, "policy", "explain", "--policy", str(broker.policy), "--user", "50001", path
        )
        assert code == 0, (rule, out, err)


def test_a_mount_whose_path_has_ends_of_lines_in_it_keeps_nobody_from_starting(dev):
    """The kernel writes a carriage return into mountinfo as it is: taken for the end of a line, it ended the launcher."""
    with folder() as where:
        path = f"{where}/a\r\rb"
        os.mkdir(path)
        mount("x", path, "tmpfs")
        try:
            node("/dev/odd/zero", MEM["zero"])
            with running(POLICY) as broker, Raw(broker.socket) as client:
                assert outcome(client.open("/dev/odd/zero")) == "granted"
        finally:
            unmount(path)
