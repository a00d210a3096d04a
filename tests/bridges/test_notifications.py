"""A foreign message can neither pose as somebody else's, nor bring markup, nor stay for ever."""

from __future__ import annotations

import html
import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdbroker.bridges.notifications import _EXPIRE_MS, Flood, _Asked, name_of, notification
from fdbroker.limits import every as limits

ENTITY = re.compile("&(amp|lt|gt);")


def made(payload, *, trusted=False):
    data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    return notification(data, "alice", trusted=trusted)


@pytest.mark.parametrize(
    ("payload", "summary", "body"),
    [
        (b"the build is done", "alice: the build is done", ""),
        (b"done\nin 5 s\nall green", "alice: done", "in 5 s\nall green"),
        (b"", "alice: ", ""),
        (b"\xff", "alice: \ufffd", ""),
        (b'{"summary":"s","body":"b"}', "alice: s", "b"),
        (b'{"summary":"s","icon":"/etc/passwd"}', 'alice: {"summary":"s","icon":"/etc/passwd"}', ""),
        (b'{"body":"b"}', 'alice: {"body":"b"}', ""),
        (b'{"summary":5}', 'alice: {"summary":5}', ""),
        (b"{done}", "alice: {done}", ""),
        (b"[" * 100000, "alice: " + "[" * 199 + "…", ""),
    ],
)
def test_text_and_objects(payload, summary, body):
    assert made(payload)[:2] == (summary, body)


def test_markup_in_the_body_is_text():
    found = made({"summary": "s", "body": '<a href="x">&amp;</a><img src="/x"/>'})
    assert found.body == '&lt;a href="x"&gt;&amp;amp;&lt;/a&gt;&lt;img src="/x"/&gt;'


def test_what_is_invisible_or_turns_the_writing_is_left_out():
    found = made({"summary": "a\u202eb\x1b[0m\nc\t\u2028d\u200b", "body": "a\u202eb\x00\n\x7fc\r\nd"})
    assert found.summary == "alice: ab[0m c d"
    assert found.body == "ab\nc\nd"


def test_lengths_are_cut():
    summary, body = limits.NOTIFICATION_SUMMARY, limits.NOTIFICATION_BODY
    assert made({"summary": "x" * summary, "body": "<" * body})[:2] == ("alice: " + "x" * summary, "&lt;" * body)
    found = made({"summary": "x" * (summary + 1), "body": "<" * (body + 1)})
    assert found[:2] == ("alice: " + "x" * (summary - 1) + "…", "&lt;" * (body - 1) + "…")


@pytest.mark.parametrize(("urgency", "number", "foreign"), [("low", 0, 0), ("normal", 1, 1), ("critical", 2, 1)])
def test_a_foreign_one_is_never_critical(urgency, number, foreign):
    assert made({"summary": "s", "urgency": urgency}).urgency == foreign
    assert made({"summary": "s", "urgency": urgency}, trusted=True).urgency == number


@pytest.mark.parametrize(
    ("asked", "given_"), [(None, -1), (0, 1000), (999, 1000), (5000, 5000), (60001, 60000), (2**62, 60000)]
)
def test_none_stays_for_ever(asked, given_):
    assert made({"summary": "s", "expire_ms": asked}).expire_ms == given_


def test_a_negative_time_is_no_such_object():
    assert made({"summary": "s", "expire_ms": -1}).summary == 'alice: {"summary": "s", "expire_ms": -1}'


@given(st.one_of(st.binary(), st.text(), st.fixed_dictionaries({"summary": st.text(), "body": st.text()})))
def test_whatever_comes_the_sender_stands_first_and_no_markup_is_left(payload):
    found = made(payload)
    assert found.summary.startswith("alice: ")
    assert found.summary.isprintable()
    assert len(found.summary) <= len("alice: ") + limits.NOTIFICATION_SUMMARY
    assert not set("<>") & set(found.body)
    assert "&" not in ENTITY.sub("", found.body)
    text = html.unescape(ENTITY.sub(lambda one: one[0], found.body))
    assert len(text) <= limits.NOTIFICATION_BODY
    assert text.replace("\n", "").isprintable()
    assert found.urgency in (0, 1)


def test_the_documentation_has_these_members_and_times():
    text = (Path(__file__).parents[2] / "docs/bridges.md").read_text()
    table = text.partition("| member | value |\n|---|---|\n")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` ", table, re.MULTILINE) == list(_Asked.__struct_fields__)
    least, most = _EXPIRE_MS
    assert f"between {least // 1000} and {most // 1000} seconds" in text


def test_names():
    assert name_of(0) == "root"
    assert name_of(50999) == "50999"
    assert os.getuid() or name_of(os.getuid()) == "root"


def test_one_user_is_held_back_and_others_are_not():
    flood = Flood(0.0)
    burst = limits.NOTIFICATIONS_PER_USER_BURST
    assert [flood.holds_back(1, 0.0) for _ in range(burst + 2)] == [False] * burst + [True] * 2
    assert not flood.holds_back(2, 0.0)
    assert not flood.holds_back(1, 1.0 / limits.NOTIFICATIONS_PER_USER)


def test_all_users_together_are_held_back():
    flood = Flood(0.0)
    burst = limits.NOTIFICATIONS_BURST
    assert [flood.holds_back(uid, 0.0) for uid in range(burst + 2)] == [False] * burst + [True] * 2
    assert not flood.holds_back(1000, 1.0 / limits.NOTIFICATIONS_PER_SECOND)


def test_so_many_users_are_known_at_once():
    flood = Flood(0.0)
    users = limits.NOTIFICATION_USERS
    for uid in range(users):
        flood.holds_back(uid, float(uid))
    assert flood.holds_back(users + 1, 0.0)
    assert not flood.holds_back(users + 1, users + 100.0)
    assert len(flood._users) <= users
