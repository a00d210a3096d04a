"""`explain`: the decision, the rule, what came near, the smallest change, and that the change really allows it."""

from __future__ import annotations

import json
import shlex
import stat
import subprocess
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fdbroker.policy import compile as compiling
from fdbroker.policy.compile import load_policy
from fdbroker.policy.explain import explain
from fdbroker.policy.fit import Facts
from fdbroker.policy.lint import Look
from fdbroker.policy.load import parse
from fdbroker.policy.paths import is_device_path
from fdbroker.terms import ACCESS_NAMES, Device, Subject
from fdbroker.typed import parse_asked

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
    ("path", "number", "kernel_class", "access", "reason", "change"),
    [
        ("/dev/tty", "5:0", "tty", "rw", "it is 5:0, the terminal of", "the program opens its own by itself"),
        ("/dev/rtc0", "253:0", "rtc", "rw", "a device of class rtc can be opened ro only", "ask for ro"),
        ("/dev/watchdog", "10:130", "watchdog", "ro", "a device of class watchdog can be opened wo only", "ask for wo"),
    ],
)
def test_what_no_rule_can_allow_is_not_suggested(policy, path, number, kernel_class, access, reason, change):
    """The rule that was suggested did not load, or was refused."""
    node = Facts(path, stat.S_IFCHR, number, kernel_class, path[5:])
    subject = Subject(9, frozenset(), 1, 0, "", "", foreign=False)
    said = explain(policy, subject, Device(path, access), "u9", Look((path,), node, ""))
    assert (said.allowed, said.near, said.change) == (False, (), change)
    assert said.reason.startswith(reason)


def test_a_path_that_cannot_be_printed_is_called_that(policy):
    said = _explain(policy, 4, [29], "/dev/snd/\u200bx")
    assert said.change == "ask for the path without what cannot be printed"


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


NAMES = st.text(
    st.one_of(st.sampled_from("\\\\*?[]!-{}:,#&'\"%@` ab01~=|>"), st.characters(exclude_categories=["C", "Zl", "Zp"])),
    min_size=1,
    max_size=12,
)


@example(["{t"], "ro")  # as a glob `?t`, which can be a dangerous name
@given(st.lists(NAMES, min_size=1, max_size=3), st.sampled_from(ACCESS_NAMES))
def test_whatever_the_path_the_suggested_rule_allows_it(names, access):
    path = "/dev/" + "/".join(names)
    asked = Device(path, access)
    if not is_device_path(path):
        return
    empty = _compiled("version: 1\n")
    subject = Subject(54321, frozenset({54321}), 54321, 0, "", "", foreign=False)
    for look in (None, Look((path,), Facts(path, stat.S_IFCHR, "116:2", "sound", "x"))):
        change = explain(empty, subject, asked, "54321", look).change
        rule = change.removeprefix("add under users: `").removesuffix("`")
        one = explain(_compiled(f"version: 1\nusers: {{{rule}}}\n"), subject, asked, "54321", look)
        assert one.allowed, rule
        assert not one.refused


def _compiled(text):
    findings = []
    work = compiling._Compiler(findings)
    tree = parse("p.yaml", text, findings)
    assert tree, (text, findings)
    work.document(tree)
    assert not findings, (text, findings)
    return work.result().policy


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
    assert _fdbroker("policy", "check", str(path)).stdout == (
        f"read: {path}\n{path}: valid, 3 rules, 1 deny rule, 0 tests\n"
    )
    assert _fdbroker("policy", "test", str(path)).stdout == "0 passed, 0 failed\n"
    assert json.loads(_fdbroker("policy", "schema").stdout)["title"] == "fdbroker policy"
    path.write_text("version: 1\nx: 1\ny: 1\n")
    result = _fdbroker("policy", "check", str(path))
    assert (result.returncode, result.stdout) == (78, "")
    assert [line.split(":")[1] for line in result.stderr.splitlines()] == ["2", "3"]
    findings = json.loads(_fdbroker("policy", "check", "--json", str(path)).stdout)
    assert [(finding["line"], finding["severity"]) for finding in findings] == [(2, "error"), (3, "error")]


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


def test_no_rule_comes_near_for_a_subject_that_nothing_is_for(tmp_path):
    """A rule for everyone was said to be for programs with an empty label."""
    path = tmp_path / "policy.yaml"
    path.write_text("version: 1\neveryone: {devices: [{path: /dev/x}]}\n")
    policy = load_policy(str(path), trusted=False).policy
    one = _explain(policy, 65534, [], "/dev/x")
    assert not one.allowed
    assert one.near == ()


@pytest.mark.parametrize(
    ("user", "advice"),
    [
        ("1", "make daemon a member: `usermod -aG audio daemon`, and log in again"),
        ("daemon", "make daemon a member: `usermod -aG audio daemon`, and log in again"),
        ("54321", "add under users: `54321: {devices: [{path: /dev/x}]}`"),
    ],
)
def test_the_advice_for_a_number_works(tmp_path, user, advice):
    """usermod(8) takes the name of an account, and there may be none."""
    path = tmp_path / "policy.yaml"
    path.write_text("version: 1\ngroups: {audio: {devices: [{path: /dev/x}]}}\n")
    policy = load_policy(str(path), trusted=False).policy
    subject = Subject(int(user) if user.isdecimal() else 1, frozenset({6}), 6, 0, "", "", foreign=False)
    assert explain(policy, subject, Device("/dev/x", "ro"), user).change == advice


@pytest.mark.parametrize(
    ("entry", "advice"),
    [
        ("daemon: {devices: [{path: /dev/other}]}", "add to `devices` of users.daemon at FILE:2: `- {path: /dev/y9}`"),
        ("1:\n    devices:\n      - path: /dev/other", "add to `devices` of users.1 at FILE:5: `- {path: /dev/y9}`"),
        ("daemon: {limits: {burst: 9}}", "add to users.daemon at FILE:2: `devices: [{path: /dev/y9}]`"),
        (
            "1: {}, daemon: {devices: [{path: /dev/other}]}",
            "add to `devices` of users.daemon at FILE:2: `- {path: /dev/y9}`",
        ),
        ("bin: {devices: [{path: /dev/other}]}", "add under users: `daemon: {devices: [{path: /dev/y9}]}`"),
    ],
)
def test_a_rule_is_to_be_added_to_the_users_entry_where_there_is_one(tmp_path, entry, advice):
    """A second entry for the user would be a duplicate key, which is an error."""
    path = tmp_path / "policy.yaml"
    path.write_text(f"version: 1\nusers: {{{entry}}}\n" if "\n" not in entry else f"version: 1\nusers:\n  {entry}\n")
    arguments = ("--policy", str(path), "--user", "daemon", "--json", "/dev/y9")
    (said,) = json.loads(_fdbroker("policy", "explain", *arguments).stdout)
    assert said["change"].replace(str(path), "FILE") == advice


def test_a_topic_is_to_be_added_to_what_the_user_may_send_to(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text("version: 1\ntopics: {news: {}, alarm: {}}\nusers: {daemon: {send: [news]}}\n")
    arguments = ("--policy", str(path), "--user", "daemon", "--json", "send:alarm")
    (said,) = json.loads(_fdbroker("policy", "explain", *arguments).stdout)
    assert said["change"] == f"add to `send` of users.daemon at {path}:3: `- alarm`"


@pytest.mark.parametrize(
    ("subject", "asked", "words"),
    [
        ("user: daemon", "open: /dev/other, expect: allow", "--user daemon /dev/other"),
        ("user: daemon, groups: [29, audio]", "open: /dev/snd/pcm0, access: rw, expect: deny", "--user daemon --groups 29,audio /dev/snd/pcm0:rw"),
        ("user: 5", "open: /dev/fives, expect: deny", "--user 5 /dev/fives"),
        ("user: 1, groups: [44], label: player (enforce)", "open: /dev/video1, expect: deny", "--user 1 --groups 44 --label 'player (enforce)' /dev/video1"),
        ("user: 1, groups: [44], label: other", "open: /dev/video1, expect: allow", "--user 1 --groups 44 --label other /dev/video1"),
        ("user: 5", "open: '/dev/a b:ro', expect: allow", "--user 5 '/dev/a b:ro:ro'"),
        ("user: 5", "open: 'send:news', expect: deny", "--user 5 send:news"),
    ],
)  # fmt: skip
def test_a_failing_test_names_the_command_that_says_why_it_came_out_so(tmp_path, subject, asked, words):
    """With all that the test says: without its groups or its label the answer is the opposite."""
    path = tmp_path / "the policy.yaml"
    more = "  44:\n    devices:\n      - {path: /dev/video1, label: player}\n"
    topics = "topics: {news: {}}\neveryone: {send: [news]}\n"
    path.write_text(
        POLICY.replace("  44:\n    devices:\n", more) + f"{topics}tests: [{{as: {{{subject}}}, {asked}}}]\n"
    )
    (failed,) = json.loads(_fdbroker("policy", "test", "--json", str(path)).stdout)["failed"]
    assert failed["hint"] == f"try `fdbroker policy explain --policy '{path}' {words}`"
    (said,) = json.loads(_fdbroker(*shlex.split(failed["hint"].split("`")[1])[1:], "--json").stdout)
    assert said["decision"] == failed["found"]


def test_only_a_command_that_takes_another_policy_by_an_option_names_that_option():
    for words, hint in (
        (("check",), "an argument names another file"),
        (("test",), "an argument names another file"),
        (("explain", "/dev/null", "--policy"), "`--policy FILE` takes another file"),
    ):
        result = _fdbroker("policy", *words, "/nonexistent/policy.yaml")
        assert result.returncode == 78
        assert result.stderr.endswith(f"cannot be read: No such file or directory; {hint}\n")


def test_no_advice_makes_anybody_a_member_of_roots_group(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text("version: 1\ngroups: {root: {devices: [{path: /dev/x}]}}\n")
    policy = load_policy(str(path), trusted=False).policy
    subject = Subject(1, frozenset({6}), 6, 0, "", "", foreign=False)
    assert explain(policy, subject, Device("/dev/x", "ro"), "daemon").change.startswith("add under users: `daemon: ")


def test_no_advice_names_a_group_that_there_is_not(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text("version: 1\ngroups: {54322: {devices: [{path: /dev/x}]}}\n")
    policy = load_policy(str(path), trusted=False).policy
    subject = Subject(1, frozenset({6}), 6, 0, "", "", foreign=False)
    assert "usermod" not in explain(policy, subject, Device("/dev/x", "ro"), "daemon").change


@pytest.mark.parametrize("word", ["bogus", "tx:news", "dev/null", ""])
def test_an_error_lists_all_that_can_be_asked_about(word):
    with pytest.raises(ValueError, match=r"net:NAME.*send:TOPIC or subscribe:TOPIC"):
        parse_asked(word, "ro")


def test_the_exit_code_tells_a_test_that_fails_from_a_policy_with_errors(tmp_path):
    path = tmp_path / "policy.yaml"
    failing = "tests: [{as: {user: daemon, groups: [daemon]}, open: /dev/null, expect: allow}]\n"
    for text, code in (("", 0), (failing, 1), ("versio: 1\n", 78)):
        path.write_text(f"version: 1\n{text}")
        result = _fdbroker("policy", "test", str(path))
        assert result.returncode == code, result.stdout + result.stderr
