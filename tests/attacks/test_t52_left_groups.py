"""T52: a process leaves the group that is denied, or is one of its user's subordinate uids, or asks by a second link."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from harness import ALICE, BOB, CAROL, GROUP, OTHER_GROUP, as_user, ask, replaced_file, running

FIRST = 300_000
PATHS = ("/dev/null", "/dev/zero", "/dev/first")
POLICY = (
    f"version: 1\neveryone: {{devices: [{', '.join(f'{{path: {path}, access: rw, class: mem}}' for path in PATHS)}]}}\n"
)


@pytest.fixture(autouse=True)
def databases(root):
    """BOB is a member of GROUP by the database; ALICE and BOB have subordinate uids."""
    group = Path("/etc/group").read_text() + f"fdbroker-test:x:{GROUP}:fdbroker-test-{BOB}\n"
    subuid = f"{BOB}:{FIRST}:65536\n{ALICE}:{FIRST + 100_000}:65536\n"
    with replaced_file("/etc/group", group), replaced_file("/etc/subuid", subuid):
        yield


@pytest.mark.parametrize(
    ("uid", "groups", "wanted"),
    [
        (BOB, [GROUP], "Denied"),
        (BOB, [], "Denied"),  # it left the group, or logged in before it came into it
        (FIRST, [], "Denied"),
        (FIRST + 65_535, [], "Denied"),
        (FIRST + 65_536, [], "granted"),
        (ALICE, [], "granted"),
        (ALICE, [GROUP], "Denied"),  # whatever the database says, the process has it
        (FIRST + 100_000, [], "granted"),
    ],
)
def test_a_denied_group_is_all_of_its_members_and_all_their_uids(dev, uid, groups, wanted):
    with running(POLICY + f"deny: [{{groups: [{GROUP}], devices: [/dev/null]}}]\n") as broker:
        assert as_user(uid, groups, ask, broker.socket, "/dev/null") == wanted
        assert as_user(uid, groups, ask, broker.socket, "/dev/zero") == "granted"


@pytest.mark.parametrize(
    ("uid", "gid", "wanted"),
    [
        (ALICE, OTHER_GROUP, "Denied"),
        (ALICE, ALICE, "Denied"),  # it left the group by setgid(2), or newgrp(1)
        (FIRST + 100_000, FIRST, "Denied"),
        (BOB, BOB, "granted"),
        (BOB, OTHER_GROUP, "Denied"),  # whatever the database says, the process has it
        (FIRST, FIRST, "granted"),
    ],
)
def test_a_denied_primary_group_is_all_users_whose_it_is(dev, uid, gid, wanted):
    """passwd(5) alone says that the group is ALICE's: group(5) has neither it nor her."""
    passwd = Path("/etc/passwd").read_text()
    assert f":{ALICE}:{ALICE}:" in passwd
    with replaced_file("/etc/passwd", passwd.replace(f":{ALICE}:{ALICE}:", f":{ALICE}:{OTHER_GROUP}:")):
        with running(POLICY + f"deny: [{{groups: [{OTHER_GROUP}], devices: [/dev/null]}}]\n") as broker:
            assert as_user(uid, [], ask, broker.socket, "/dev/null", gid=gid) == wanted
            assert as_user(uid, [], ask, broker.socket, "/dev/zero", gid=gid) == "granted"


@pytest.mark.parametrize(
    ("uid", "wanted"), [(BOB, "Denied"), (FIRST, "Denied"), (ALICE, "granted"), (CAROL, "granted")]
)
def test_a_denied_user_is_all_of_its_uids(dev, uid, wanted):
    with running(POLICY + f"deny: [{{users: [{BOB}], devices: [/dev/null]}}]\n") as broker:
        assert as_user(uid, [], ask, broker.socket, "/dev/null") == wanted


def test_uids_that_two_users_share_are_denied_to_both(dev):
    """They count for neither, but a denied user can be each of them."""
    with replaced_file("/etc/subuid", f"{BOB}:{FIRST}:100\n{ALICE}:{FIRST + 50}:100\n"):
        with running(POLICY + f"deny: [{{users: [{BOB}], devices: [/dev/null]}}]\n") as broker:
            wanted = {FIRST: "Denied", FIRST + 99: "Denied", FIRST + 100: "granted"}
            assert {uid: as_user(uid, [], ask, broker.socket, "/dev/null") for uid in wanted} == wanted


@pytest.mark.parametrize("reload", [False, True], ids=["alone", "and a reload fails"])
def test_a_new_member_is_denied_without_a_reload(dev, reload):
    """The databases are read again when they change; what stands in the policy's files meanwhile waits for a reload."""
    with running(POLICY + f"deny: [{{groups: [{GROUP}], devices: [/dev/null]}}]\n") as broker:
        assert as_user(ALICE, [], ask, broker.socket, "/dev/null") == "granted"
        broker.policy.write_text("version: 1\nbroken\n")
        group = Path("/etc/group").read_text().replace(f"test-{BOB}", f"test-{ALICE}")
        with replaced_file("/etc/group", group):
            if reload:
                broker.process.send_signal(signal.SIGHUP)
                broker.wait_for("the policy is NOT reloaded")
            end = time.monotonic() + 20
            while as_user(ALICE, [], ask, broker.socket, "/dev/null") != "Denied":
                assert time.monotonic() < end
                time.sleep(0.2)
            assert as_user(BOB, [], ask, broker.socket, "/dev/null") == "granted"
        assert "is reloaded" not in broker.text()


@pytest.mark.parametrize("denied", ["/dev/second", "/dev/third", "/dev/null", "/dev/folder/link"])
def test_every_name_on_the_way_of_a_symlink_counts(dev, denied):
    """First leads to second, second to third in a folder that is a link itself, third to null."""
    os.mkdir("/dev/real")
    os.symlink("real", "/dev/folder")
    os.symlink("second", "/dev/first")
    os.symlink("/dev/folder/link", "/dev/second")
    os.symlink("../third", "/dev/real/link")
    os.symlink("null", "/dev/third")
    with running(POLICY + f"deny: [{{everyone: true, devices: [{denied}]}}]\n") as broker:
        assert as_user(ALICE, [], ask, broker.socket, "/dev/first") == "Denied"
        assert as_user(ALICE, [], ask, broker.socket, "/dev/zero") == "granted"
