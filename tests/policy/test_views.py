"""What the policy says, made once for all about whom it says the same; whom it tells apart: property/test_invariants.py."""

from __future__ import annotations

from fdbroker.policy import views as module
from fdbroker.policy.compile import load_policy
from fdbroker.policy.decide import view
from fdbroker.policy.views import Views
from fdbroker.terms import Subject


def test_all_uids_of_a_user_are_one_where_no_rule_names_them(tmp_path):
    """A user with 65,536 had a view made for each, of all rules for everyone, and what others use forgotten meanwhile."""
    path = tmp_path / "policy.yaml"
    path.write_text(
        "version: 1\neveryone: {devices: [{path: /dev/null}]}\nusers: {70001: {devices: [{path: /dev/zero}]}}\n"
    )
    made = []
    policy = load_policy(str(path), trusted=False).policy
    views = Views(policy, lambda *asked: made.append(1) or view(*asked), lambda seen: seen)
    seen = [views.of(Subject(uid, (), uid, 1, "", "", foreign=True, owner=1000)) for uid in range(70_000, 75_000)]
    assert len({id(one) for one in seen}) == 2
    assert len(made) == 2
    assert [rule.pattern for rule in seen[1].devices] == ["/dev/zero", "/dev/null"]


def test_too_many_subjects_cost_nobody_what_is_kept_of_a_view(tmp_path, monkeypatch):
    path = tmp_path / "policy.yaml"
    path.write_text("version: 1\neveryone: {devices: [{path: /dev/null}]}\n")
    monkeypatch.setattr(module, "_KEPT", 8)
    views = Views(load_policy(str(path), trusted=False).policy, view, lambda seen: seen)
    labels = [views.of(Subject(5, (), 5, 1, "", f"label{number}", foreign=True, owner=5)) for number in range(100)]
    assert len({id(one) for one in labels}) == 1
