"""`explain`: the decision, the rule, what came near, the smallest change, and that the change really allows it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from fdbroker.policy.compile import load_policy
from fdbroker.policy.explain import explain
from fdbroker.terms import Device, Subject

POLICY = """version: 1
groups:
  29:
    devices:
      - {path: "/dev/snd/pcm*", access: rw, class: sound}
  44:
    devices:
      - {path: /dev/video0}
users:
  5:
    devices:
      - {path: /dev/fives}
deny:
  - {users: [6], devices: ["/dev/snd/*"]}
"""


@pytest.fixture
def policy(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY)
    return load_policy(str(path), trusted=False).policy


def _explain(policy, uid, gids, path, access="ro"):
    return explain(policy, Subject(uid, frozenset(gids), 1, 0, "", "", foreign=False), Device(path, access), f"u{uid}")


def test_allowed_names_the_rule_and_its_conditions(policy):
    one = _explain(policy, 4, [29], "/dev/snd/pcmC0D0p", "rw")
    assert one.allowed
    assert one.reason.endswith("policy.yaml:5 (group 29) allows it, if the node has class sound")


@pytest.mark.parametrize(
    ("uid", "gids", "path", "access", "reason", "change"),
    [
        (
            4,
            [],
            "/dev/snd/pcmC0D0p",
            "ro",
            "no rule allows ro",
            "make u4 a member: `usermod -aG 29 u4`, and log in again",
        ),
        (4, [44], "/dev/video0", "rw", "no rule allows rw", "set `access: rw`"),
        (4, [44], "/dev/video0", "wo", "no rule allows wo", "set `access: rw`"),
        (6, [29], "/dev/snd/pcmC0D0p", "ro", "policy.yaml:14 denies it to user 6", "narrow or remove the deny rule at"),
        (6, [], "/dev/snd/pcmC0D0p", "ro", "denies it", ", and make u6 a member"),
        (4, [], "/dev/fives", "ro", "no rule allows", "add under users: `u4: {devices: [{path: /dev/fives}]}`"),
        (4, [29], "/dev/snd/pmcC0D0p", "ro", "no rule allows", "widen the path"),
        (
            4,
            [],
            "/dev/nothing",
            "rw",
            "no rule names this path",
            "add under users: `u4: {devices: [{path: /dev/nothing, access: rw}]}`",
        ),
        (4, [], "/dev/../x", "ro", "not the plain spelling", "without .."),
        (65534, [29], "/dev/snd/pcmC0D0p", "ro", "cannot map", "run the program as a user"),
    ],
)
def test_denied_says_why_and_what_would_change_it(policy, uid, gids, path, access, reason, change):
    one = _explain(policy, uid, gids, path, access)
    assert not one.allowed
    assert reason in one.reason
    assert change in one.change


def _fdbroker(*arguments):
    return subprocess.run([sys.executable, "-I", "-m", "fdbroker", *arguments], capture_output=True, text=True)


def test_the_command_answers_without_a_service_and_without_opening_anything(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY)
    explained = ("policy", "explain", "--policy", str(path), "--user", "4")
    result = _fdbroker(*explained, "--groups", "29", "--access", "rw", "/dev/snd/pcmC9D9p", "--json")
    assert result.returncode == 0, result.stderr
    (answer,) = json.loads(result.stdout)
    assert answer["decision"] == "allow"
    assert answer["rules"] == [f"{path}:5"]
    result = _fdbroker(*explained, "/dev/snd/pcmC9D9p", "/dev/null")
    assert result.returncode == 77
    assert "deny: ro /dev/null for 4" in result.stdout
    assert "near: " in result.stdout
    assert _fdbroker(*explained[:-1], "nosuchuser", "/dev/null").returncode == 64
    assert _fdbroker("policy", "explain", "--policy", "/nonexistent", "/dev/null").returncode == 78


def test_check_test_and_schema(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text(POLICY)
    assert _fdbroker("policy", "check", str(path)).stdout == f"{path}: valid, 3 rules, 0 tests\n"
    assert _fdbroker("policy", "test", str(path)).stdout == "0 passed, 0 failed\n"
    assert json.loads(_fdbroker("policy", "schema").stdout)["title"] == "fdbroker policy"
    path.write_text("version: 1\nx: 1\ny: 1\n")
    result = _fdbroker("policy", "check", str(path))
    assert (result.returncode, result.stdout) == (78, "")
    assert [line.split(":")[1] for line in result.stderr.splitlines()] == ["2", "3"]
    findings = json.loads(_fdbroker("policy", "check", "--json", str(path)).stdout)
    assert [finding["line"] for finding in findings] == [2, 3]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("open",), 64),
        (("open", "relative"), 64),
        (("open", "/dev/null", "--access", "x"), 64),
        (("open", "--socket", "/nonexistent", "/dev/null"), 69),
        (("list", "--socket", "/nonexistent"), 69),
        (("ping", "--socket", "/nonexistent"), 69),
        (("bogus",), 64),
        (("--version",), 0),
        (("--help",), 0),
        (("serve", "--mode", "9", "--check"), 64),
        (("serve", "--mode", "0_6", "--check"), 64),
    ],
)
def test_exit_codes(arguments, code):
    result = _fdbroker(*arguments)
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
