"""What the keeper may do and is told: it lists the folders of the policy, and knows what the opener was given."""

from __future__ import annotations

import pytest

from fdbroker.kernel.landlock import READ_DIR, READ_FILE, WRITE_FILE
from fdbroker.launcher.needs import Needs
from fdbroker.wire.launcher import Given


@pytest.mark.parametrize(
    ("capabilities", "reads", "writes"),
    [
        ([], False, False),
        (["CAP_DAC_READ_SEARCH"], True, False),
        (["CAP_DAC_OVERRIDE"], True, True),
        (["CAP_DAC_READ_SEARCH", "CAP_DAC_OVERRIDE"], True, True),
        (["CAP_SYS_ADMIN", "CAP_SYS_PTRACE"], False, False),
    ],
)
def test_what_the_opener_can_open_follows_from_its_capabilities_and_groups(capabilities, reads, writes):
    need = Needs(frozenset(capabilities), frozenset({44, 5, 29}), {}, (), {}, None)
    assert need.given == Given(reads, writes, (5, 29, 44))


def test_the_keeper_lists_folders_and_reads_no_file(tmp_path):
    (tmp_path / "node").touch()
    folder, both = str(tmp_path), READ_FILE | WRITE_FILE
    files = {folder: READ_DIR | both, str(tmp_path / "node"): both, str(tmp_path / "none"): both, "/proc": READ_DIR}
    need = Needs(frozenset(), frozenset(), files, (), {}, None)
    assert need.listed == {folder: READ_DIR}
