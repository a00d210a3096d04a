"""Why a connect failed, as the clients and the commands say it: true in each case, with a cure that works."""

from __future__ import annotations

import asyncio
import errno
import grp
import os
import random
import re
import socket
import struct
from pathlib import Path

import pytest
from harness import ALICE, BOB, CAROL, GROUP, MS_BIND, OTHER_GROUP, as_user, command, folder, mount, need_root, unmount

import fdbroker
import fdbroker.aio
from fdbroker.client import unreachable
from fdbroker.errors import BrokerUnavailable

NAMELESS = 51003
USERS = f"fdbalice:x:{ALICE}:{ALICE}::/:/bin/false\nfdbbob:x:{BOB}:{BOB}::/:/bin/false\n"
TAKEN = [str(number) for number in (ALICE, BOB, CAROL, GROUP, OTHER_GROUP)]
GROUPS = f"fdbroker-test:x:{GROUP}:fdbalice\nfdbaudio:x:{OTHER_GROUP}:\n"


@pytest.fixture(scope="module")
def people():
    """Alice is a member of a group by the database, Bob is not, Carol has no account."""
    need_root()
    with folder() as where:
        for name, lines in (("passwd", USERS), ("group", GROUPS)):
            others = [line for line in Path("/etc", name).read_text().splitlines() if line.split(":")[2] not in TAKEN]
            (where / name).write_text("\n".join(others) + "\n" + lines)
            mount(str(where / name), f"/etc/{name}", "none", MS_BIND)
        yield
        unmount("/etc/passwd")
        unmount("/etc/group")


@pytest.fixture
def listening(people):
    with folder() as where, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(where / "socket"))
        listener.listen(100)
        yield where / "socket"


def said(address):
    """The text of both clients and of a command, which is the same; "" when they connect."""
    try:
        fdbroker.connect(address).close()
    except BrokerUnavailable as error:
        blocking = str(error)
    else:
        return ""

    async def connect():
        (await fdbroker.aio.connect(address)).close()

    with pytest.raises(BrokerUnavailable) as found:
        asyncio.run(connect())
    assert str(found.value) == blocking
    assert command(address, "list") == [69, "", f"fdbroker: {blocking}\n"]
    return blocking


def acl(path, users=(), groups=(), group=6, mask=7):
    """Set an ACL: (id, permissions) of users and groups, those of the owning group, and the mask."""
    entries = [(1, 6, 2**32 - 1), *((2, bits, number) for number, bits in sorted(users)), (4, group, 2**32 - 1)]
    entries += [*((8, bits, number) for number, bits in sorted(groups)), (0x10, mask, 2**32 - 1), (0x20, 0, 2**32 - 1)]
    packed = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    os.setxattr(path, "system.posix_acl_access", packed)


NOT_LET = "you may not connect to PATH: "
FOR = f"{NOT_LET}the socket is for group fdbroker-test; "


@pytest.mark.parametrize(
    ("uid", "groups", "mode", "gid", "text"),
    [
        (
            *(ALICE, [], 0o660, GROUP),
            f"{FOR}fdbalice is a member of fdbroker-test, but this session is not: log in again, or run "
            "`newgrp fdbroker-test` (this session's groups: 50001)",
        ),
        (
            *(BOB, [OTHER_GROUP], 0o660, GROUP),
            f"{FOR}fdbbob is no member: an admin runs `sudo usermod -aG fdbroker-test fdbbob`, then log in again "
            "(this session's groups: 50002, fdbaudio)",
        ),
        (
            *(CAROL, [], 0o660, GROUP),
            f"{FOR}uid 50003 is no user of the database: start this program with the group fdbroker-test "
            "(this session's groups: 50003)",
        ),
        (
            *(BOB, [], 0o660, NAMELESS),
            f"{NOT_LET}the socket is for group 51003; the group database has no such number: an admin gives the "
            "socket another group (this session's groups: 50002)",
        ),
        (
            *(ALICE, [GROUP], 0o600, GROUP),
            f"{NOT_LET}its mode 0600 and its ACL do not let group fdbroker-test write, which this session has",
        ),
        (
            *(BOB, [], 0o600, GROUP),
            f"{NOT_LET}the socket has the mode 0600, for no group: an admin gives it a group "
            "(SocketGroup= of fdbroker.socket, or fdbroker serve --group)",
        ),
        (ALICE, [GROUP], 0o660, GROUP, ""),
        (BOB, [], 0o606, GROUP, ""),
    ],
)
def test_mode_and_group(listening, uid, groups, mode, gid, text):
    os.chown(listening, 0, gid)
    listening.chmod(mode)
    assert as_user(uid, groups, said, str(listening)) == text.replace("PATH", str(listening))


@pytest.mark.parametrize(
    ("uid", "groups", "entries", "text"),
    [
        (
            *(BOB, [], {"groups": [(OTHER_GROUP, 6)], "users": [(CAROL, 2)]}),
            "the socket is for the groups fdbroker-test, fdbaudio and user 50003; fdbbob is no member: "
            "an admin runs `sudo usermod -aG fdbroker-test fdbbob`, then log in again (this session's groups: 50002)",
        ),
        (
            *(ALICE, [], {"groups": [(OTHER_GROUP, 6)], "group": 0}),
            "the socket is for group fdbaudio; fdbalice is no member: an admin runs `sudo usermod -aG fdbaudio "
            "fdbalice`, then log in again (this session's groups: 50001)",
        ),
        (ALICE, [GROUP], {"users": [(ALICE, 4)]}, "its ACL has an entry for user fdbalice that does not let you write"),
        (
            *(BOB, [], {"users": [(ALICE, 6)], "group": 4}),
            "the socket is for fdbalice, and for no group: an admin gives it a group "
            "(SocketGroup= of fdbroker.socket, or fdbroker serve --group)",
        ),
        (BOB, [OTHER_GROUP], {"groups": [(OTHER_GROUP, 6)]}, ""),
        (BOB, [], {"users": [(BOB, 6)]}, ""),
    ],
)
def test_an_acl(listening, uid, groups, entries, text):
    os.chown(listening, 0, GROUP)
    acl(listening, **entries)
    whole = f"you may not connect to {listening}: {text}" if text else ""
    assert as_user(uid, groups, said, str(listening)) == whole


def test_whatever_mode_and_acl_are_the_kernel_agrees(listening):
    """Where it refuses, the text never says that the mode lets us; a group that the text names is let in."""
    chance = random.Random(1)
    refused = 0
    for _ in range(80):
        os.chown(listening, chance.choice((0, ALICE)), chance.choice((GROUP, OTHER_GROUP)))
        bits = (0, 4, 6)
        if chance.random() < 0.5:
            os.removexattr(listening, "system.posix_acl_access") if os.listxattr(listening) else None
            listening.chmod(int("".join(str(chance.choice(bits)) for _ in range(3)), 8))
        else:
            some = [[(one, chance.choice(bits)) for one in of if chance.random() < 0.5] for of in IDS]
            acl(listening, *some, chance.choice(bits), chance.choice(bits))
        gids = [gid for gid in (GROUP, OTHER_GROUP) if chance.random() < 0.3]
        text = as_user(chance.choice((ALICE, BOB)), gids, _blocking, str(listening))
        refused += bool(text)
        assert "security module" not in text, (text, oct(listening.stat().st_mode))
        whom = re.search(r"the socket is for (.*?);", text)
        for name, gid in (("fdbroker-test", GROUP), ("fdbaudio", OTHER_GROUP)):
            if whom and name in whom[1]:
                assert as_user(CAROL, [gid], _blocking, str(listening)) == ""
    assert refused > 20


@pytest.mark.parametrize("uid", [BOB, CAROL])
def test_nobody_is_told_to_become_a_member_of_roots_group(listening, uid):
    """The socket of a broker that was started by hand where there is no group for it: the mode 0660, root:root."""
    listening.chmod(0o660)
    ours = "fdbroker" in {group.gr_name for group in grp.getgrall()}
    makes = "makes the group fdbroker, `groupadd --system fdbroker`, and starts the broker again, or starts it"
    cure = "starts the broker with `--group fdbroker`" if ours else f"{makes} with `--group GROUP`"
    assert as_user(uid, [], said, str(listening)) == (
        f"you may not connect to {listening}: the socket is for group root; it is root's alone: an admin {cure} "
        f"(this session's groups: {uid})"
    )
    acl(listening, groups=[(OTHER_GROUP, 6)])
    text = as_user(uid, [], said, str(listening))
    assert "fdbaudio" in text.partition(";")[2]
    assert "-aG root" not in text


IDS = ((ALICE, BOB), (GROUP, OTHER_GROUP))


def _blocking(address):
    try:
        fdbroker.connect(address).close()
    except BrokerUnavailable as error:
        return str(error)
    return ""


def test_a_security_module_is_named_where_mode_and_acl_let_us(listening):
    text = unreachable.why(str(listening), OSError(errno.EACCES, "Permission denied"))
    assert text.endswith("so a security module such as AppArmor or SELinux does not: see `journalctl -k`")


def test_a_folder_that_may_not_be_entered_is_named(people):
    with folder() as where, socket.socket(socket.AF_UNIX) as listener:
        (where / "closed/below").mkdir(parents=True)
        listener.bind(str(where / "closed/below/socket"))
        (where / "closed").chmod(0o700)
        (where / "link").symlink_to(where / "closed/below/socket")
        cure = f"you may not enter {where}/closed, which an admin must allow: `chmod a+x {where}/closed`"
        for name in ("closed/below/socket", "link"):
            assert as_user(BOB, [], said, str(where / name)) == f"you may not connect to {where}/{name}: {cure}"


def test_no_socket_and_nobody_who_listens(people):
    with folder() as where:
        path = str(where / "s")
        assert said(path) == (
            f"there is no socket at {path}: `fdbroker serve --socket {path}` makes it; the installed service has "
            "/run/fdbroker/socket"
        )
        with socket.socket(socket.AF_UNIX) as gone:
            gone.bind(path)
        assert said(path) == f"nobody listens at {path} any more: start the broker again that made it"
        (where / "file").touch()
        refused = PermissionError(errno.EACCES, os.strerror(errno.EACCES))  # whoever may not write to it
        assert unreachable.why(str(where / "file"), refused) == said(str(where / "file"))
        (where / "dangling").symlink_to("nothing")
        assert said(str(where / "file")).startswith(f"{where}/file is no socket: give another one with --socket")
        assert said(str(where / "dangling")) == f"{where}/dangling is a symlink that leads to nothing"
        assert said(f"{path}/below") == f"nobody answers at {path}/below: Not a directory"
        assert said("/" + "x" * 200) == f"nobody answers at /{'x' * 200}: AF_UNIX path too long"


def test_the_installed_service_is_started_by_its_socket(people, monkeypatch):
    monkeypatch.delenv("FDBROKER_SOCKET", raising=False)
    mount("run", "/run", "tmpfs", 0, "mode=0755")
    try:
        assert _blocking(None) == (
            "there is no socket at /run/fdbroker/socket: an admin starts the service with `systemctl enable --now "
            "fdbroker.socket`; for another broker give --socket or $FDBROKER_SOCKET"
        )
        os.mkdir("/run/fdbroker")
        with socket.socket(socket.AF_UNIX) as gone:
            gone.bind("/run/fdbroker/socket")
        assert _blocking(None) == (
            "nobody listens at /run/fdbroker/socket any more: an admin starts it with `systemctl restart "
            "fdbroker.socket`"
        )
    finally:
        unmount("/run")
