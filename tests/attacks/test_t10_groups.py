"""T10: which groups count: primary, supplementary, many, none, unknown to NSS."""

from __future__ import annotations

from pathlib import Path

from harness import ALICE, GROUP, MEM, OTHER_GROUP, as_user, ask, node, running

POLICY = f"version: 1\ngroups: {{{GROUP}: {{devices: [{{path: /dev/x}}]}}}}\n"
MANY = list(range(52000, 52400))


# primary gid, supplementary groups, what comes of it
SUBJECTS = {
    "primary": (GROUP, [], "granted"),
    "supplementary": (ALICE, [GROUP], "granted"),
    "last of 400": (ALICE, [*MANY[:-1], GROUP], "granted"),
    "first of 401": (ALICE, [GROUP, *MANY], "granted"),
    "as many as can be": (ALICE, [GROUP, *range(100_000, 165_535)], "granted"),
    "400 others": (ALICE, MANY, "Denied"),
    "none": (ALICE, [], "Denied"),
    "other": (OTHER_GROUP, [OTHER_GROUP], "Denied"),
    "primary and 400": (GROUP, MANY, "granted"),
    "unmapped": (ALICE, [65534], "Denied"),
}


def test_the_kernels_groups_decide(dev):
    """The policy's group is one that no database knows."""
    node("/dev/x", MEM["zero"])
    with running(POLICY) as broker:
        for name, (gid, groups, expected) in SUBJECTS.items():
            assert as_user(ALICE, groups, ask, broker.socket, "/dev/x", gid=gid) == expected, name
        assert as_user(GROUP, [], ask, broker.socket, "/dev/x", gid=ALICE) == "Denied"  # its uid is the group's number


def test_a_group_that_was_renamed_after_the_load_keeps_its_number(dev, tmp_path):
    import harness

    node("/dev/x", MEM["zero"])
    fake = tmp_path / "group"
    fake.write_text(Path("/etc/group").read_text() + f"fdbtest:x:{GROUP}:\n")
    harness.mount(str(fake), "/etc/group", "none", harness.MS_BIND)
    try:
        with running(POLICY.replace(str(GROUP), "fdbtest")) as broker:
            assert as_user(ALICE, [GROUP], ask, broker.socket, "/dev/x") == "granted"
            fake.write_text(Path("/etc/group").read_text().replace("fdbtest", "renamed"))
            assert as_user(ALICE, [GROUP], ask, broker.socket, "/dev/x") == "granted"
            broker.reload(POLICY.replace(str(GROUP), "fdbtest"))
            assert "unknown group 'fdbtest'" in broker.text()
            assert as_user(ALICE, [GROUP], ask, broker.socket, "/dev/x") == "granted"
            assert as_user(ALICE, [], ask, broker.socket, "/dev/x") == "Denied"
    finally:
        harness.unmount("/etc/group")


def test_membership_nss_takes_the_databases_word(dev, tmp_path):
    import harness

    node("/dev/x", MEM["zero"])
    groups, users = tmp_path / "group", tmp_path / "passwd"
    groups.write_text(Path("/etc/group").read_text() + f"fdbtest:x:{GROUP}:fdbalice\n")
    users.write_text(Path("/etc/passwd").read_text() + f"fdbalice:x:{ALICE}:{ALICE}::/:/bin/false\n")
    harness.mount(str(groups), "/etc/group", "none", harness.MS_BIND)
    harness.mount(str(users), "/etc/passwd", "none", harness.MS_BIND)
    try:
        with running("version: 1\ngroups: {fdbtest: {devices: [{path: /dev/x, membership: nss}]}}\n") as broker:
            assert as_user(ALICE, [], ask, broker.socket, "/dev/x") == "granted"
            assert as_user(50002, [GROUP], ask, broker.socket, "/dev/x") == "Denied"
    finally:
        harness.unmount("/etc/passwd")
        harness.unmount("/etc/group")
