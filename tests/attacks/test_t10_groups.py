"""T10: which groups count: primary, supplementary, many, none, unknown to NSS."""

from __future__ import annotations

from pathlib import Path

import floods
from harness import ALICE, EVERYONE_NULL, GROUP, MEM, OTHER_GROUP, as_user, ask, node, resident_bytes, running

from fdbroker.limits import every as limits

POLICY = f"version: 1\ngroups: {{{GROUP}: {{devices: [{{path: /dev/x}}]}}}}\n"
CONNECTIONS = limits.USER_LIMITS["connections"].default
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


def _grown(address, opener):
    """What the opener needs while all connections of a user are open."""
    held = [floods.connected(address) for _ in range(CONNECTIONS)]
    for sock in held:
        sock.sendall(floods.PING)
        assert sock.recv(8) == floods.frame(b"PONG")
    with open("/proc/self/status") as status:
        assert len(status.read().partition("Groups:")[2].splitlines()[0].split()) > 65_000
    return resident_bytes(opener)


def test_a_process_in_as_many_groups_as_can_be_takes_little_memory_for_each_connection(dev):
    """As sets they took 6 MB for a connection: three users who have subordinate gids could end the service."""
    with running(EVERYONE_NULL) as broker:
        before = resident_bytes(broker.pids["opener"])
        grown = as_user(ALICE, list(range(100_000, 165_536)), _grown, broker.socket, broker.pids["opener"])
        assert grown - before < CONNECTIONS * 500_000


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
