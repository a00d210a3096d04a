"""A running broker, real nodes that root alone may open, real users: who gets what."""

from __future__ import annotations

import fcntl
import os

import harness
import pytest
from harness import ALICE, BOB, GROUP, MEM, OTHER_GROUP, Raw, as_user, ask, node, outcome, running

POLICY = f"""
version: 1
groups:
  {GROUP}:
    devices:
      - {{path: "/dev/snd/*", access: rw, class: mem, device: "1:5"}}
      - {{path: "/dev/input/event*", access: ro, class: mem}}
      - {{path: /dev/log-sink, access: wo, class: mem}}
users:
  {BOB}: {{devices: [{{path: /dev/bobs, access: rw}}]}}
everyone: {{devices: [{{path: /dev/null, access: rw}}]}}
deny: [{{groups: [{OTHER_GROUP}], devices: ["/dev/snd/*"]}}]
"""


@pytest.fixture
def broker(dev):
    node("/dev/snd/pcm", MEM["zero"])
    node("/dev/input/event0", MEM["urandom"])
    node("/dev/log-sink", MEM["null"])
    node("/dev/bobs", MEM["full"])
    node("/dev/other", MEM["zero"])
    with running(POLICY) as one:
        yield one


def _cannot_open(path):
    try:
        os.close(os.open(path, os.O_RDONLY))
    except PermissionError:
        return True
    return False


def _use(address):
    with Raw(address) as client:
        assert outcome(client.open("/dev/snd/pcm", access="rw")) == "granted"
        number = client.take()
        try:
            flags = fcntl.fcntl(number, fcntl.F_GETFL)
            return [
                os.read(number, 8).hex(),
                os.write(number, b"abc"),
                flags & os.O_ACCMODE,
                bool(flags & os.O_NONBLOCK),
            ]
        finally:
            os.close(number)


def test_a_member_reads_and_writes_a_node_that_only_root_may_open(broker):
    assert as_user(ALICE, [GROUP], _cannot_open, "/dev/snd/pcm")
    assert as_user(ALICE, [GROUP], _use, broker.socket) == ["00" * 8, 3, os.O_RDWR, True]
    (record,) = broker.records("granted")
    assert record["FDBROKER_UID"] == str(ALICE)
    assert record["FDBROKER_RESOURCE"] == "/dev/snd/pcm"
    assert record["FDBROKER_RDEV"] == "1:5"
    assert record["FDBROKER_ACCESS"] == "rw"
    assert record["FDBROKER_RULE"] == f"{broker.policy}:6"
    assert record["FDBROKER_DECISION"] == "allow"


def _flags(address, path, access):
    with Raw(address) as client:
        assert outcome(client.open(path, access=access)) == "granted"
        number = client.take()
        flags = fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE
        os.close(number)
        return flags


@pytest.mark.parametrize(
    ("path", "access", "flags"),
    [
        ("/dev/input/event0", "ro", os.O_RDONLY),
        ("/dev/log-sink", "wo", os.O_WRONLY),
        ("/dev/snd/pcm", "ro", os.O_RDONLY),
        ("/dev/snd/pcm", "wo", os.O_WRONLY),
        ("/dev/snd/pcm", "rw", os.O_RDWR),
    ],
)
def test_the_descriptor_has_the_access_that_was_asked_for(broker, path, access, flags):
    assert as_user(ALICE, [GROUP], _flags, broker.socket, path, access) == flags


@pytest.mark.parametrize(
    ("uid", "groups", "path", "access"),
    [
        (ALICE, [], "/dev/snd/pcm", "ro"),
        (ALICE, [GROUP], "/dev/other", "ro"),
        (ALICE, [GROUP], "/dev/input/event0", "rw"),
        (ALICE, [GROUP], "/dev/input/event0", "wo"),
        (ALICE, [GROUP], "/dev/log-sink", "ro"),
        (ALICE, [GROUP], "/dev/bobs", "ro"),
        (ALICE, [GROUP, OTHER_GROUP], "/dev/snd/pcm", "ro"),
        (0, [0], "/dev/snd/pcm", "ro"),
        (0, [0], "/dev/other", "ro"),
    ],
)
def test_everything_else_is_denied_root_included(broker, uid, groups, path, access):
    assert as_user(uid, groups, lambda: ask(broker.socket, path, access=access), gid=uid) == "Denied"
    record = broker.records("refused")[-1]
    assert record["FDBROKER_STAGE"] == "authorize"
    assert record["FDBROKER_UID"] == str(uid)
    assert record["FDBROKER_RESOURCE"] == path


def _batch(address, paths, access):
    with Raw(address) as client:
        reply = client.open(*paths, access=access)
        if outcome(reply) != "granted":
            assert not client.descriptors
            return [outcome(reply), reply["parameters"]["resource"]["device"]]
        grants = reply["parameters"]["grants"]
        assert [grant["fileDescriptor"] for grant in grants] == list(range(len(paths)))
        return [
            [grant["resource"]["device"], os.fstat(number).st_rdev]
            for grant, number in zip(grants, client.descriptors, strict=True)
        ]


def test_a_batch_of_64_comes_whole_and_in_order(broker):
    paths = ["/dev/snd/pcm", "/dev/null"] * 32
    got = as_user(ALICE, [GROUP], _batch, broker.socket, paths, "rw")
    assert got == [["/dev/snd/pcm", MEM["zero"]], ["/dev/null", MEM["null"]]] * 32


def test_a_batch_with_one_denied_resource_gives_nothing(broker):
    paths = ["/dev/snd/pcm"] * 5 + ["/dev/other"] + ["/dev/snd/pcm"] * 5
    assert as_user(ALICE, [GROUP], _batch, broker.socket, paths, "rw") == ["Denied", "/dev/other"]
    assert not broker.records("granted")
    broker.wait_idle()


def test_the_65th_resource_is_one_too_many(broker):
    with Raw(broker.socket) as client:
        assert outcome(client.open(*["/dev/null"] * 65)) == "InvalidParameter"
        assert outcome(client.open()) == "InvalidParameter"
        assert outcome(client.open("/dev/null")) == "granted"


def test_an_allowed_path_without_a_node_is_no_such_resource(broker):
    assert as_user(ALICE, [GROUP], ask, broker.socket, "/dev/snd/none") == "NoSuchResource"


def _offers(address):
    with Raw(address) as client:
        reply = client.call("io.fdbroker.Broker.List")
        return [[one["resource"]["device"], one["access"]] for one in reply["parameters"]["resources"]]


def test_list_says_what_one_may_open_and_nothing_else(broker):
    assert as_user(ALICE, [GROUP], _offers, broker.socket) == [
        ["/dev/input/event0", "ro"],
        ["/dev/log-sink", "wo"],
        ["/dev/null", "rw"],
        ["/dev/snd/pcm", "rw"],
    ]
    assert as_user(ALICE, [], _offers, broker.socket) == [["/dev/null", "rw"]]


def test_list_with_more_tells_of_nodes_that_come_and_go(broker):
    with Raw(broker.socket) as client:
        client.send_call("io.fdbroker.Broker.List", more=True)
        first = client.reply()
        assert first["continues"]
        assert len(first["parameters"]["resources"]) == 1
        os.unlink("/dev/null")
        assert client.reply()["parameters"]["resources"] == []
        node("/dev/null", MEM["null"], 0o666)
        assert len(client.reply()["parameters"]["resources"]) == 1
        broker.reload(POLICY + f"tests: [{{as: {{user: {ALICE}}}, open: /dev/null, expect: allow}}]\n")
        broker.reload("version: 1\n")
        assert client.reply()["parameters"]["resources"] == []


def test_two_descriptors_of_one_node_share_nothing(broker):
    with Raw(broker.socket) as client:
        assert outcome(client.open("/dev/null", "/dev/null")) == "granted"
        one, two = client.descriptors
        os.set_blocking(one, True)
        assert os.get_blocking(one)
        assert not os.get_blocking(two)


def test_links_of_roots_below_dev_are_followed_and_no_others(dev):
    node("/dev/ttyX0", MEM["zero"])
    node("/dev/real", MEM["zero"])
    os.mkdir("/dev/by-id")
    os.symlink("../real", "/dev/by-id/good")
    os.symlink("/dev/real", "/dev/by-id/absolute")
    os.symlink("good", "/dev/by-id/twice")
    os.symlink("../real", "/dev/by-id/alices")
    os.chown("/dev/by-id/alices", ALICE, ALICE, follow_symlinks=False)
    os.symlink("/etc/passwd", "/dev/by-id/outside")
    os.symlink("../../etc/passwd", "/dev/by-id/up")
    os.symlink("loop", "/dev/by-id/loop")
    os.symlink("../ttyX0", "/dev/by-id/dangerous")
    os.symlink("..", "/dev/by-id/folder")
    os.symlink("../denied", "/dev/by-id/denied")
    node("/dev/denied", MEM["zero"])
    policy = 'version: 1\neveryone: {devices: [{path: "/dev/by-id/*", class: mem}]}\n'
    policy += "deny: [{everyone: true, devices: [/dev/denied]}]\n"
    with running(policy) as broker:
        expected = {
            "good": "granted",
            "absolute": "granted",
            "twice": "granted",
            "alices": "NotWhatItWas",
            "outside": "NotWhatItWas",
            "up": "NotWhatItWas",
            "loop": "NotWhatItWas",
            "dangerous": "NotWhatItWas",
            "folder": "NotWhatItWas",
            "denied": "Denied",
        }
        got = {name: as_user(ALICE, [], ask, broker.socket, f"/dev/by-id/{name}") for name in expected}
        assert got == expected
        with Raw(broker.socket) as client:
            client.open("/dev/by-id/twice")
            assert os.fstat(client.descriptors[0]).st_rdev == MEM["zero"]


def test_a_window_has_no_class_and_the_refusal_says_what_to_write(root):
    """Of the machine's own /dev/pts: a rule with a class gives none, and one with what the refusal says gives it."""
    master, slave = os.openpty()
    window = os.ttyname(slave)
    rule = 'version: 1\neveryone: {{devices: [{{path: "/dev/pts/*", access: rw, {}, dangerous: true}}]}}\n'
    try:
        with running(rule.format("class: tty")) as broker, Raw(broker.socket) as client:
            reply = client.open(window, access="rw")
            assert outcome(reply) == "NotWhatItWas"
            why = reply["parameters"]["reason"]
            assert why.startswith("its class is unknown, not tty: the kernel names none for /dev/pts; write `device:")
            listed = client.call("io.fdbroker.Broker.List")["parameters"]["resources"]
            assert window not in [one["resource"]["device"] for one in listed]
            written = why.split("`")[1]
        with running(rule.format(written)) as broker, Raw(broker.socket) as client:
            reply = client.open(window, access="rw")
            assert (outcome(reply), reply["parameters"]["grants"][0]["rdev"]) == ("granted", f"136:{window[9:]}")
            os.write(client.descriptors[0], b"shown\n")
            assert os.read(master, 100) == b"shown\r\n"
    finally:
        os.close(master)
        os.close(slave)


def test_a_reload_takes_effect_between_two_requests_and_a_bad_one_does_not(broker):
    with Raw(broker.socket) as client:
        assert outcome(client.open("/dev/null")) == "granted"
        broker.reload(POLICY.replace("everyone: {devices: [{path: /dev/null, access: rw}]}", ""))
        assert outcome(client.open("/dev/null")) == "Denied"
        broker.reload(POLICY)
        assert outcome(client.open("/dev/null")) == "granted"
        for broken, say in (
            ("version: 1\ngrups: {}\n", f"{broker.policy}:2:1: unknown key 'grups'"),
            ("version: [\n", "not YAML"),
            (f"version: 1\ntests: [{{as: {{user: {ALICE}}}, open: /dev/null, expect: allow}}]\n", "this test fails"),
        ):
            broker.reload(broken)
            assert say in broker.text()
            assert outcome(client.open("/dev/null")) == "granted"


def test_a_reload_that_needs_more_than_was_kept_is_refused_whole(dev):
    node("/dev/snd/pcm", MEM["zero"])
    with running(harness.EVERYONE_NULL) as broker:
        assert harness.status_of(broker.pids["opener"])["CapPrm"] == "0" * 16
        broker.reload('version: 1\neveryone: {devices: [{path: "/dev/snd/*", access: rw}]}\n')
        assert "CAP_DAC_OVERRIDE" in broker.text()
        assert "restart" in broker.text()
        assert ask(broker.socket, "/dev/null") == "granted"
        assert ask(broker.socket, "/dev/snd/pcm") == "Denied"


def test_a_folder_that_was_removed_and_made_again_needs_a_restart_and_a_reload_says_so(dev):
    node("/dev/pool/a", MEM["zero"])
    policy = 'version: 1\neveryone: {devices: [{path: "/dev/pool/*"}]}\n'
    with running(policy) as broker:
        assert ask(broker.socket, "/dev/pool/a") == "granted"
        os.unlink("/dev/pool/a")
        os.rmdir("/dev/pool")
        os.mkdir("/dev/kept")  # so that the new folder is no old inode
        node("/dev/pool/a", MEM["zero"])
        assert ask(broker.socket, "/dev/pool/a") == "OpenFailed"
        broker.reload(policy)
        assert "access to /dev/pool, which was given up when the service started: restart" in broker.text()
    with running(policy) as broker:
        assert ask(broker.socket, "/dev/pool/a") == "granted"


def test_a_deny_rule_is_named_in_the_record_and_not_to_the_client(broker):
    def denied(address):
        with Raw(address) as client:
            return client.open("/dev/snd/pcm")

    reply = as_user(ALICE, [GROUP, OTHER_GROUP], denied, broker.socket)
    assert "policy" not in str(reply)
    record = broker.records("refused")[0]
    assert record["FDBROKER_RULE"] == f"{broker.policy}:12"
    assert record["FDBROKER_REASON"] == f"a deny rule for group {OTHER_GROUP}"
