"""Landlock: what a rule does, and what no rule is needed for."""

from __future__ import annotations

import errno
import os

import prctl
from harness import ALICE, as_user, cannot, folder

from fdbroker.kernel import landlock

READ = landlock.READ_FILE | landlock.READ_DIR


def _tried(rules: list[str], files: list[str]) -> list[str]:
    """How opening each file goes behind rules for reading."""
    prctl.set_no_new_privs(1)
    assert landlock.restrict([(path, READ) for path in rules])
    found = []
    for file in files:
        try:
            os.close(os.open(file, os.O_RDONLY))
            found.append("opened")
        except OSError as error:
            found.append(errno.errorcode[error.errno])
    return found


def test_a_rule_for_what_is_gone_or_out_of_reach_is_left_out_and_the_others_hold(root):
    """Landlock allows nothing that permissions forbid, so a rule that cannot be made is none that is missed."""
    if landlock.abi() == 0:
        cannot("this kernel has no Landlock")
    with folder() as where:
        for name in ("allowed", "other", "closed"):
            (where / name / "below").mkdir(parents=True)
            (where / name / "below/file").write_text("x")
        os.chmod(where / "closed", 0o700)
        rules = [str(where / name) for name in ("closed/below", "gone", "allowed")]
        files = [str(where / name / "below/file") for name in ("allowed", "other", "closed")]
        assert as_user(ALICE, [], _tried, rules, files) == ["opened", "EACCES", "EACCES"]
