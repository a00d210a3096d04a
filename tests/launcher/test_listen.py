"""The socket that the launcher binds by itself."""

from __future__ import annotations

import pytest

from fdbroker.launcher import listen


@pytest.mark.parametrize("group", ["00000000000999999999999", "4294967295", "9" * 5000, "fdbroker-none", "\u0663"])
def test_a_group_that_cannot_be_is_refused_before_anything_is_bound(tmp_path, monkeypatch, group):
    monkeypatch.setattr(listen, "_judge_folders", lambda _: None)
    with pytest.raises(listen.CannotListen, match=f"there is no group '{group}': groupadd --system"):
        listen.bound(str(tmp_path / "socket"), 0o660, group)
    assert not (tmp_path / "socket").exists()
