"""Stored messages under a real systemd, with the shipped units."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

MEMBER = 4001


@pytest.fixture(scope="module")
def facts(nspawn: Callable[..., Any]) -> Any:
    return nspawn("messages.py")


def test_a_message_is_stored_in_the_folder_of_tmpfiles(facts):
    found = facts["started"]
    assert (found["sent"]["code"], found["to"]["code"]) == (0, 0), found
    assert found["folder"] == ["fdbroker-inbox", "0o40700"]
    assert found["files"] == ["messages.sqlite", "messages.sqlite-reserve", "messages.sqlite-wal"]


def test_it_is_in_the_journal_too(facts):
    found = facts["recorded"]
    assert (found["FDBROKER_UID"], found["FDBROKER_TOPIC"]) == (str(MEMBER), "inbox")
    assert (found["SYSLOG_IDENTIFIER"], found["_UID"]) == ("fdbroker-inbox", str(found["inbox"]))


def test_it_outlives_the_inbox(facts):
    assert facts["killed"]["received"] == ["to all", "to one"]


def test_it_outlives_the_service_until_it_is_acknowledged(facts):
    found = facts["restarted"]
    assert found["received"] == [["to all", MEMBER], ["to one", MEMBER]]
    assert found["again"] == []


def test_a_damaged_file_is_set_aside_and_the_journal_says_so(facts):
    found = facts["damaged"]
    ((text, priority),) = found["said"]
    assert (
        "the stored messages are damaged (file is not a database): kept as /var/lib/fdbroker/messages.sqlite.dam"
        in text
    )
    assert priority == "2"
    assert (found["sent"]["code"], found["received"]) == (0, ["after it"])
    assert len([name for name in found["files"] if ".damaged-" in name]) == 1


def test_without_its_folder_the_service_says_what_is_missing(facts):
    found = facts["without_folder"]
    assert "ExecMainStatus=78" in found["state"]
    assert "/var/lib/fdbroker cannot hold messages: " in found["said"]
    assert "`systemd-tmpfiles --create` makes it" in found["said"]


def test_the_inbox_may_write_there_and_nowhere_else(facts):
    assert facts["confined"]["files"] == ["/var/lib/fdbroker"]
    assert facts["confined"]["capabilities"] == []


def test_it_stops_in_order(facts):
    assert sorted(facts["stopped"]["state"]) == ["ExecMainStatus=0", "Result=success"]
