"""What the command line sees of this machine: nodes as the opener would find them, and who can connect."""

from __future__ import annotations

import json
import os
import socket
import stat
import struct
from pathlib import Path

import pytest
from harness import (
    ALICE,
    BOB,
    GROUP,
    MEM,
    OTHER_GROUP,
    Raw,
    as_user,
    command,
    folder,
    ip,
    mount,
    need_root,
    node,
    outcome,
    own_network,
    replaced_file,
    running,
    unmount,
)

from fdbroker.cli import here

# user:perm, group:perm, mask of an ACL; None for none
ACLS = [
    None,
    ([(ALICE, 6)], [], 6),
    ([(ALICE, 6)], [], 4),
    ([(ALICE, 2)], [], 7),
    ([(ALICE, 0)], [(GROUP, 6)], 7),
    ([], [(GROUP, 6)], 7),
    ([], [(GROUP, 4), (OTHER_GROUP, 2)], 7),
    ([], [(GROUP, 6)], 0),
]

NAMELESS = 51003  # no account has it


def acl(mode, users, groups, mask):
    """The extended attribute: linux/posix_acl_xattr.h."""
    entries = [(1, mode >> 6 & 7, 0xFFFFFFFF)]
    entries += [(2, allowed, uid) for uid, allowed in users]
    entries += [(4, mode >> 3 & 7, 0xFFFFFFFF)]
    entries += [(8, allowed, gid) for gid, allowed in groups]
    entries += [(0x10, mask, 0xFFFFFFFF), (0x20, mode & 7, 0xFFFFFFFF)]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def try_to_connect(address):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            sock.connect(address)
        except PermissionError:
            return False
        return True


@pytest.mark.parametrize("mode", [0o660, 0o600, 0o666, 0o620, 0o640, 0o606, 0o060])
@pytest.mark.parametrize("rights", ACLS)
def test_who_can_connect_is_what_the_kernel_says(monkeypatch, mode, rights):
    """Every kind of subject tries, with each mode and ACL."""
    need_root()
    with folder() as where, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        address = f"{where}/socket"
        listener.bind(address)
        listener.listen(100)
        os.chown(address, BOB, GROUP)
        os.chmod(address, mode)
        if rights is not None:
            os.setxattr(address, "system.posix_acl_access", acl(mode, *rights))
        monkeypatch.setenv("FDBROKER_SOCKET", address)
        for uid, gids in (
            (ALICE, []),
            (ALICE, [GROUP]),
            (ALICE, [OTHER_GROUP]),
            (ALICE, [GROUP, OTHER_GROUP]),
            (BOB, [GROUP]),
        ):
            able = as_user(uid, gids, try_to_connect, address)
            said = here.connect(uid, frozenset([uid, *gids]))
            assert (said == "") is able, (uid, gids, said)
        assert here.connect(0, frozenset()) == ""


def test_a_folder_above_that_keeps_the_user_out(monkeypatch):
    need_root()
    with folder() as where, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(f"{where}/socket")
        os.chmod(f"{where}/socket", 0o666)
        monkeypatch.setenv("FDBROKER_SOCKET", f"{where}/socket")
        assert here.connect(ALICE, frozenset()) == ""
        where.chmod(0o700)
        assert here.connect(ALICE, frozenset()) == f"it may not enter {where}"
        where.chmod(0o755)


def test_the_cure_is_one_that_works(monkeypatch):
    """usermod(8) knows accounts by name; without an account there is the ACL. Without a socket nobody can tell."""
    need_root()
    with folder() as where, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        monkeypatch.setenv("FDBROKER_SOCKET", f"{where}/socket")
        monkeypatch.setattr(here, "_GROUP", "nogroupofthisname")
        assert here.connect(ALICE, frozenset()) is None
        monkeypatch.setattr(here, "_GROUP", "audio")
        missing = here.connect(1, frozenset())
        assert missing.startswith(f"{where}/socket is not there now, and will be for the group audio: ")
        assert missing.endswith("`usermod -aG audio daemon`, and log in again")
        assert here.connect(1, frozenset([29])) == ""
        listener.bind(f"{where}/socket")
        os.chown(f"{where}/socket", 0, 29)
        os.chmod(f"{where}/socket", 0o660)
        assert here.connect(1, frozenset()).endswith("`usermod -aG audio daemon`, and log in again")
        assert f"`setfacl -m u:{NAMELESS}:rw {where}/socket`" in here.connect(NAMELESS, frozenset())


@pytest.mark.parametrize("uid", [1, NAMELESS])
def test_the_cure_is_never_the_group_root(monkeypatch, uid):
    """The socket that a broker makes by hand, where there is no group for it: what `serve` takes says who may connect."""
    need_root()
    with folder() as where, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        monkeypatch.setenv("FDBROKER_SOCKET", f"{where}/socket")
        listener.bind(f"{where}/socket")
        os.chmod(f"{where}/socket", 0o660)
        there = f"{where}/socket is for the group root: it is root's alone: an admin "
        monkeypatch.setattr(here, "_GROUP", "nogroupofthisname")
        makes = "`groupadd --system nogroupofthisname`, and starts the broker again, or starts it with `--group GROUP`"
        assert here.connect(uid, frozenset()) == f"{there}makes the group nogroupofthisname, {makes}"
        monkeypatch.setattr(here, "_GROUP", "audio")
        assert here.connect(uid, frozenset()) == f"{there}starts the broker with `--group audio`"


def test_explain_says_whether_the_user_can_connect_and_how_it_could(dev):
    """`policy explain`, beside what the rules say: the line, and `cannotConnect` with --json, are true and name a cure."""
    node("/dev/x/node", MEM["zero"], 0o666)
    with running('version: 1\neveryone: {devices: [{path: /dev/x/node, class: mem, device: "1:5"}]}\n') as broker:

        def explained(*options):
            words = ("policy", "explain", "--policy", str(broker.policy), "--user", "daemon", *options, "/dev/x/node")
            return command(broker.socket, *words)

        assert "cannot connect" not in explained()[1]
        assert json.loads(explained("--json")[1])[0]["cannotConnect"] == ""
        os.chmod(broker.socket, 0o660)
        os.chown(broker.socket, 0, 29)
        why = f"{broker.socket} is for the group audio: `usermod -aG audio daemon`, and log in again"
        assert not as_user(1, [], try_to_connect, broker.socket)
        code, out, err = explained()
        assert (code, err) == (0, "")  # a rule allows it
        assert out.splitlines()[-1] == f"daemon cannot connect: {why}"
        code, out, _ = explained("--json")
        (said,) = json.loads(out)
        assert (code, said["decision"], said["cannotConnect"]) == (0, "allow", why)
        assert as_user(1, [29], try_to_connect, broker.socket)
        assert "cannot connect" not in explained("--groups", "audio")[1]


POLICY = """version: 1
everyone:
  devices:
    - {path: "/dev/x/*", class: mem, device: "1:5"}
    - {path: "/dev/y/*"}
deny: [{everyone: true, devices: [/dev/x/denied]}]
"""


def test_explain_says_of_each_node_what_the_opener_does(dev):
    """Whatever stands there: the words `would be refused` exactly where an Open is."""
    os.makedirs("/dev/x")
    node("/dev/x/good", MEM["zero"], 0o666)
    node("/dev/x/wrong", MEM["null"], 0o666)
    node("/dev/x/denied", MEM["zero"], 0o666)
    node("/dev/y/tty", os.makedev(4, 9), 0o666)
    node("/dev/y/block", os.makedev(7, 0), 0o666, kind=stat.S_IFBLK)
    os.mkfifo("/dev/y/fifo")
    os.mkdir("/dev/y/folder")
    for name, target in (
        ("good-link", "good"),
        ("denied-link", "denied"),
        ("out", "/etc/passwd"),
        ("up", "../../etc/passwd"),
        ("loop", "loop"),
        ("dangling", "nothing"),
        ("alices", "good"),
        ("wrong-link", "../x/./wrong"),
    ):
        os.symlink(target, f"/dev/x/{name}")
    os.chown("/dev/x/alices", ALICE, ALICE, follow_symlinks=False)
    paths = sorted(f"{where}/{name}" for where in ("/dev/x", "/dev/y") for name in os.listdir(where))
    with running(POLICY) as broker, Raw(broker.socket) as client:
        for path in [*paths, "/dev/x/none"]:
            did = outcome(client.open(path))
            words = ("policy", "explain", "--policy", str(broker.policy), "--json", path)
            (said,) = json.loads(command(broker.socket, *words)[1])
            assert said["cannotConnect"] == ""
            if did == "granted":
                assert said["refused"] == "", path
                assert said["now"] == "now it is 1:5, class mem, as the rule says"
            elif did == "NoSuchResource":
                assert (said["refused"], said["now"]) == (None, "now it is not there"), path
            elif path == "/dev/x/denied":
                assert said["decision"] == "deny"
            else:
                assert "would be refused: " + said["refused"] in said["now"], (path, did)
        code, out, _ = command(broker.socket, "policy", "explain", "--policy", str(broker.policy), "/dev/x/wrong")
        assert code == 0
        assert "  now it is 1:3, class mem: would be refused: its device number is 1:3, not 1:5\n" in out


def test_of_what_may_not_be_seen_nothing_is_said(dev):
    """The opener may enter a folder that the user may not."""
    node("/dev/closed/x", MEM["zero"])
    os.chmod("/dev/closed", 0o700)
    assert here.look("/dev/closed/x").facts.number == "1:5"
    assert as_user(ALICE, [], lambda: here.look("/dev/closed/x")) is None
    assert as_user(ALICE, [], lambda: here.look("/dev/none/x")) == [["/dev/none/x"], None, ""]


def test_what_explain_suggests_for_a_node_has_its_class_and_number(dev):
    node("/dev/z/one", MEM["zero"], 0o666)
    node("/dev/z/tty", os.makedev(4, 9), 0o666)
    with folder() as where:
        policy = where / "policy.yaml"
        for path, keys in (
            ("/dev/z/one", 'path: /dev/z/one, class: mem, device: "1:5"'),
            ("/dev/z/tty", 'path: /dev/z/tty, class: tty, device: "4:9", dangerous: true'),
            ("/dev/z/none", "path: /dev/z/none"),
            ("/dev/mem", "path: /dev/mem, dangerous: true"),
        ):
            policy.write_text("version: 1\n")
            words = ("policy", "explain", "--policy", str(policy), "--user", "daemon", "--json", path)
            (said,) = json.loads(command("/nowhere", *words)[1])
            assert said["change"] == f"add under users: `daemon: {{devices: [{{{keys}}}]}}`"
            policy.write_text(f"version: 1\nusers: {{{said['change'].split('`')[1]}}}\n")
            (said,) = json.loads(command("/nowhere", *words)[1])
            assert said["decision"] == "allow"
            assert not said["refused"]


def test_a_rule_that_the_node_does_not_fit_is_not_near_or_it_is_said_what_else_does_not_fit(dev):
    """To widen its path, or to make somebody a member of its group, would lead to a refusal."""
    node("/dev/z/one", MEM["zero"], 0o666)
    with folder() as where:
        policy = where / "policy.yaml"

        def explained(text):
            policy.write_text(f"version: 1\n{text}\n")
            words = ("policy", "explain", "--policy", str(policy), "--user", "daemon", "--json", "/dev/z/one")
            return json.loads(command("/nowhere", *words)[1])[0]

        item = '{path: /dev/z/one, class: mem, device: "1:5"}'
        for keys in ("class: sound", 'device: "1:3"'):
            said = explained(f"users: {{1: {{devices: [{{path: /dev/z/two, {keys}}}]}}}}")
            assert said["near"] == []
            assert said["change"] == f"add to `devices` of users.1 at {policy}:2: `- {item}`"
        for keys in ("", ", class: mem", ', device: "1:*"'):
            said = explained(f"users: {{1: {{devices: [{{path: /dev/z/two{keys}}}]}}}}")
            assert said["change"] == f"at {policy}:2 widen the path, or add `- {item}` beside it"
        said = explained("groups: {audio: {devices: [{path: /dev/z/one, class: sound}]}}")
        assert said["near"][0]["missing"].endswith("; and of the node there now its class is mem, not sound")
        assert said["change"] == f"add under users: `daemon: {{devices: [{item}]}}`"


def test_explain_says_of_a_path_that_nothing_is_there_and_which_one_may_be_meant(dev):
    node("/dev/snd/timer", os.makedev(116, 33))
    with folder() as where:
        policy = where / "policy.yaml"
        policy.write_text("version: 1\neveryone: {devices: [{path: /dev/urandon, class: mem}]}\n")
        words = ("policy", "explain", "--policy", str(policy), "--user", "daemon")
        for path, meant, code in (
            ("/dev/nul", ": did you mean /dev/null?", 77),
            ("/dev/urandon", ": did you mean /dev/urandom?", 0),
            ("/dev/sdn/timer", ": did you mean /dev/snd/timer?", 77),
            ("/dev/snd", "", 77),
            ("/dev/other", "", 77),
            ("/dev/snd/other", "", 77),
        ):
            (said,) = json.loads(command("/nowhere", *words, "--json", path)[1])
            assert said["now"] == ("now it is no device" if path == "/dev/snd" else f"now it is not there{meant}")
            done, out, _ = command("/nowhere", *words, path)
            assert done == code
            assert f"  {said['now']}\n" in out


def test_a_rule_for_the_members_of_a_group_that_has_none_does_not_vanish(dev):
    """It is counted, warned of, and near: the first member of the group has it."""
    rows = [line for line in Path("/etc/group").read_text().splitlines() if line.split(":")[2] != str(GROUP)]
    with folder() as where, replaced_file("/etc/group", "\n".join([*rows, f"fdbempty:x:{GROUP}:\n"])):
        policy = where / "policy.yaml"
        rule = "{path: /dev/null, class: mem, membership: nss}"
        policy.write_text(f"version: 1\ngroups: {{fdbempty: {{devices: [{rule}]}}}}\n")
        code, out, err = command("/nowhere", "policy", "check", str(policy))
        assert (code, out.splitlines()[-1]) == (0, f"{policy}: valid, 1 rule, 0 deny rules, 0 tests")
        assert err == f"warning: {policy}:2: nobody is in group fdbempty now\n"
        words = ("policy", "explain", "--policy", str(policy), "--user", "daemon", "--json", "/dev/null")
        (said,) = json.loads(command("/nowhere", *words)[1])
        assert said["reason"] == "no rule allows ro of this path to daemon"
        advice = "make daemon a member: `usermod -aG fdbempty daemon`, and log in again"
        missing = "it is for group fdbempty, in which nobody is now"
        assert said["near"] == [{"rule": f"{policy}:2", "missing": missing, "change": advice}]
        assert said["change"] == advice
        policy.write_text(policy.read_text().replace("/dev/null", "/dev/none"))
        assert "nothing here matches /dev/none now" in command("/nowhere", "policy", "check", str(policy))[2]


def test_check_looks_for_the_bridge_that_new_namespaces_are_to_be_connected_to(dev):
    """Another interface of that name is none."""
    with folder() as where, own_network():
        mount("sys", "/sys", "sysfs")  # as this network namespace has it
        try:
            policy = where / "policy.yaml"
            link = "link: {bridge: fdb0, address: 10.88.0.0/24}"
            policy.write_text(f"version: 1\neveryone: {{namespaces: [{{type: net, create: true, {link}}}]}}\n")

            def warned():
                return command("/nowhere", "policy", "check", str(policy))[2]

            missing = f"warning: {policy}:2: there is no bridge fdb0 now\n"
            assert warned() == missing
            ip("link", "add", "fdb0", "type", "veth", "peer", "name", "fdb1")
            assert warned() == missing
            ip("link", "del", "fdb0")
            ip("link", "add", "fdb0", "type", "bridge")
            assert warned() == ""
        finally:
            unmount("/sys")


def test_check_warns_of_a_deny_rule_that_denies_nothing(dev):
    """A typo there is the most dangerous one: what was to be denied is not."""
    node("/dev/snd/timer", os.makedev(116, 33))
    with folder() as where:
        policy = where / "policy.yaml"
        policy.write_text("version: 1\ndeny: [{everyone: true, devices: [/dev/snd/*, /dev/sdn/*]}]\n")
        code, _, err = command("/nowhere", "policy", "check", str(policy))
        assert code == 0
        assert err == f"warning: {policy}:2: nothing here matches /dev/sdn/* now; it denies nothing now\n"


def test_check_shows_what_it_read_and_what_it_warns_of(dev):
    """Also what `serve` would refuse; `--json` has the same, and the exit code is 0."""
    with folder() as where:
        policy = where / "policy.yaml"
        policy.write_text("version: 1\neveryone: {devices: [{path: /dev/null, class: mem}, {path: /dev/none}]}\n")
        (where / "policy.d").mkdir()
        (where / "policy.d" / "x.yaml").write_text("version: 1\ndeny: [{everyone: true, devices: [/dev/zero]}]\n")
        os.chown(where / "policy.d" / "x.yaml", ALICE, ALICE)
        code, out, err = command("/nowhere", "policy", "check", str(policy))
        assert code == 0
        assert out == (
            f"read: {policy}\nread: {where}/policy.d/x.yaml\n{policy}: valid, 2 rules, 1 deny rule, 0 tests\n"
        )
        assert err.split("\n")[:3] == [
            f"warning: {where}/policy.d/x.yaml: must belong to root, belongs to uid {ALICE}; "
            f"chown root:root {where}/policy.d/x.yaml && chmod 0644 {where}/policy.d/x.yaml",
            f"warning: {policy}:2: /dev/none without `class` and `device` is whatever character device has that name; "
            "add `class` or `device`",
            f"warning: {policy}:2: nothing here matches /dev/none now",
        ]
        code, out, _ = command("/nowhere", "policy", "check", "--json", str(policy))
        assert code == 0
        assert [(one["line"], one["severity"]) for one in json.loads(out)] == [
            (0, "warning"),
            (2, "warning"),
            (2, "warning"),
        ]
