"""T59: something looks as if it were read, and is not: deny rules in policy.d, globs that mean something else."""

from __future__ import annotations

import subprocess
import sys

import pytest
from harness import EVERYONE_NULL, Raw, folder, outcome, running

from fdbroker.errors import PolicyError
from fdbroker.policy.compile import load_policy

DENY = "version: 1\ndeny: [{everyone: true, devices: [/dev/null]}]\n"


def _in(name):
    def put(where):
        (where / "policy.d").mkdir()
        (where / "policy.d" / name).write_text(DENY)
        return where / "policy.d" / name

    return put


def _in_a_folder_below(where):
    (where / "policy.d/99-deny.yaml.d").mkdir(parents=True)
    (where / "policy.d/99-deny.yaml.d/99-deny.yaml").write_text(DENY)
    return where / "policy.d/99-deny.yaml.d"


def _as_policy_d(where):
    (where / "policy.d").write_text(DENY)
    return where / "policy.d"


def _by_a_dangling_policy_d(where):
    (where / "policy.d").symlink_to("policy.d.real")
    return where / "policy.d"


def _by_a_dangling_link(where):
    (where / "policy.d").mkdir()
    (where / "policy.d" / "99-deny.yaml").symlink_to("../99-deny")
    return where / "policy.d" / "99-deny.yaml"


# each was skipped, and all that it denies was granted
SKIPPED = {
    **{name: _in(name) for name in ("99-deny.yml", "99-deny.YAML", "99-deny", "99-deny.yaml.bak", "99-deny.conf")},
    "a folder below": _in_a_folder_below,
    "policy.d is a file": _as_policy_d,
    "policy.d is a dangling link": _by_a_dangling_policy_d,
    "a dangling link": _by_a_dangling_link,
}


@pytest.mark.parametrize("kind", SKIPPED)
def test_a_deny_rule_that_would_not_count_keeps_the_service_from_starting(root, kind):
    with folder() as where:
        (where / "policy.yaml").write_text(EVERYONE_NULL)
        place = SKIPPED[kind](where)
        words = ["serve", "--policy", str(where / "policy.yaml"), "--socket", str(where / "socket")]
        result = subprocess.run(
            [sys.executable, "-I", "-m", "fdbroker", *words], capture_output=True, text=True, timeout=60
        )
        assert result.returncode == 78, result.stderr
        assert f"{place}: " in result.stderr
        assert not (where / "socket").exists()


@pytest.mark.parametrize("kind", SKIPPED)
def test_a_reload_with_one_fails_whole_and_says_where_it_is(dev, kind):
    with running(EVERYONE_NULL) as broker, Raw(broker.socket) as client:
        place = SKIPPED[kind](broker.folder)
        broker.reload("version: 1\n")  # which alone would deny everything
        assert "NOT reloaded" in broker.text()
        assert f"{place}: " in broker.text()
        assert outcome(client.open("/dev/null")) == "granted"


def test_under_the_right_name_it_counts(dev):
    with running(EVERYONE_NULL) as broker, Raw(broker.socket) as client:
        _in("99-deny.yaml")(broker.folder)
        broker.reload(EVERYONE_NULL)
        assert "NOT reloaded" not in broker.text()
        assert outcome(client.open("/dev/null")) == "Denied"


def test_what_editors_and_package_managers_leave_neither_counts_nor_stops_a_reload(dev):
    """Of an editor that has a file open, a dangling symlink: it stopped every reload."""
    with running(EVERYONE_NULL) as broker, Raw(broker.socket) as client:
        drop_ins = broker.folder / "policy.d"
        drop_ins.mkdir()
        for name in (".10.yaml.swp", "10.yaml~", "10.yaml.dpkg-old", "10.yaml.rpmsave"):
            (drop_ins / name).write_text(DENY)
        (drop_ins / ".#10.yaml").symlink_to("root@host.4242:1700000000")
        broker.reload(EVERYONE_NULL)
        assert "NOT reloaded" not in broker.text()
        assert outcome(client.open("/dev/null")) == "granted"


# what a shell, or a regular expression, means by it is not what it would match; where the mistake begins
GLOBS = {
    "/dev/tt[^y]": "would match ^ itself: a set of other characters is written [!y]",
    "/dev/event[[:digit:]]": "[[:digit:]] is not known: write the characters themselves, such as [0-9]",
    "/dev/{null,zero}": "there are no alternatives in braces; write two rules",
    "/dev/**/null": "* never matches a slash; write a rule for each level",
    "/dev/nul\\l": "a backslash is written as two",
}


@pytest.mark.parametrize("rules", ["everyone: {devices: [{path: '%s'}]}", "deny: [{everyone: true, devices: ['%s']}]"])
@pytest.mark.parametrize("glob", GLOBS)
def test_a_glob_that_means_something_else_than_it_says_is_an_error(tmp_path, glob, rules):
    path = tmp_path / "policy.yaml"
    path.write_text(f"version: 1\n{rules % glob}\n")
    with pytest.raises(PolicyError) as caught:
        load_policy(str(path), trusted=False)
    (finding,) = caught.value.findings
    assert finding.line == 2
    assert GLOBS[glob] in str(finding)
