"""What the launcher says: each line on its own, with its priority, and no line that is not one."""

from __future__ import annotations

import pytest

from fdbroker.launcher.service import say


@pytest.mark.parametrize("character", ["\x1e", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\r"])
def test_a_line_ends_with_a_line_feed_and_nothing_else(capsys, monkeypatch, character):
    monkeypatch.setenv("JOURNAL_STREAM", "8:1")
    say(f"one{character}<0>still one\ntwo", priority=3)
    assert capsys.readouterr().err == f"<3>one{character}<0>still one\n<3>two\n"
