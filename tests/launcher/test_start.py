"""Whose the stored messages are decides who the inbox is, and nobody else."""

from __future__ import annotations

from fdbroker.launcher import start


def test_no_other_process_gets_the_inbox_s_number(monkeypatch):
    def unknown(_name):
        raise KeyError

    monkeypatch.setattr(start.pwd, "getpwnam", unknown)  # no system users
    monkeypatch.setattr(start.pwd, "getpwuid", unknown)
    first, _ = start.identities()["opener"]  # the one that this process would choose first
    found = start.identities(first)
    assert found["inbox"] == (first, first)
    assert len(set(found.values())) == len(found) == 4
