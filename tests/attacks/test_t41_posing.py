"""T41: a message poses on a desktop as somebody else's, brings markup, stays for ever, or comes without end."""

from __future__ import annotations

import json
import pwd

import pytest
from buses import POLICY, bob_session, open_folder, send
from harness import ALICE, as_user, need_root, private_dev, running

from fdbroker.limits import every as limits

OTHERS = range(50011, 50015)  # each may send so many at once, and no more
MORE_USERS = "".join(f"  {uid}: {{send: [notifications]}}\n" for uid in OTHERS)


@pytest.fixture(scope="module")
def made():
    need_root()
    with private_dev(), open_folder() as where, running(POLICY + MORE_USERS) as broker:
        with bob_session(broker, where) as session:
            yield broker, session


@pytest.fixture
def broker(made):
    return made[0]


@pytest.fixture
def session(made):
    made[1].path.write_text("")
    return made[1]


POSING = [
    "root: the password has expired",
    "\u202e\u2066toor\u2069: x",
    "\nroot: x",
    "\r\x1b[2Kroot: x",
    json.dumps({"summary": "\n\nroot: x", "body": "\u2028root: <a href='x'>log in</a>"}),
]
MORE = [
    {"summary": "x", "icon": "/etc/passwd"},
    {"summary": "x", "actions": ["default", "open"]},
    {"summary": "x", "hints": {"sound-file": "/x", "image-path": "/x"}},
    {"summary": "x", "sender": "root"},
    {"summary": "x", "app_name": "bank", "replaces_id": 1},
]


def _name(uid):
    return pwd.getpwuid(uid).pw_name


def test_the_senders_name_stands_first_whatever_it_writes(broker, session):
    as_user(ALICE, [], send, broker.socket, *POSING)
    for found in session.after(len(POSING)):
        assert found[1:4] == ["fdbroker", 0, ""]
        assert found[4].startswith(f"{_name(ALICE)}: ")
        assert found[4].isprintable()
        assert "<" not in found[5]
        assert "\u2028" not in found[5]


def test_nothing_of_the_desktop_is_reached_by_more_fields(broker, session):
    as_user(OTHERS[0], [], send, broker.socket, *map(json.dumps, MORE))
    for asked, found in zip(MORE, session.after(len(MORE)), strict=True):
        assert found[1:] == [
            "fdbroker",
            0,
            "",
            f"{_name(OTHERS[0])}: {json.dumps(asked)}",
            "",
            [],
            {"urgency": ["y", 1]},
            -1,
        ]


def test_lengths_are_cut(broker, session):
    as_user(OTHERS[1], [], send, broker.socket, "x" * 30000 + "\n" + "y" * 30000)
    (found,) = session.after(1)
    assert len(found[4]) == len(f"{_name(OTHERS[1])}: ") + limits.NOTIFICATION_SUMMARY
    assert len(found[5]) == limits.NOTIFICATION_BODY


def test_an_object_says_more_and_a_foreign_one_is_neither_critical_nor_there_for_ever(broker, session):
    asked = {"summary": "x\u202e\n<i>", "body": "<img src='/x'>", "urgency": "critical", "expire_ms": 0}
    as_user(OTHERS[2], [], send, broker.socket, json.dumps(asked))
    as_user(0, [], send, broker.socket, json.dumps({**asked, "expire_ms": 5000}))
    first, second = session.after(2)
    assert first[4:] == [f"{_name(OTHERS[2])}: x <i>", "&lt;img src='/x'&gt;", [], {"urgency": ["y", 1]}, 1000]
    assert second[4:] == ["root: x <i>", "&lt;img src='/x'&gt;", [], {"urgency": ["y", 2]}, 5000]


def test_a_flood_of_one_user_is_dropped_and_counted(broker, session):
    burst = limits.NOTIFICATIONS_PER_USER_BURST
    as_user(OTHERS[3], [], send, broker.socket, *map(str, range(burst + 50)))
    session.bridge.wait_for(f"dropped: too many at once of user {OTHERS[3]}")
    as_user(0, [], send, broker.socket, "of another")
    found = session.after(burst + 1)
    assert found[-1][4] == "root: of another"
    assert burst + 1 <= len(found) <= burst + 5
