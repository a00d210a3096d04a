"""Rules for namespaces and sockets: what a policy may say, what it means, what it needs."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import replaced_file

from fdbroker.errors import PolicyError
from fdbroker.kernel.landlock import READ_DIR, READ_FILE
from fdbroker.launcher.needs import check_reload, needs
from fdbroker.policy.compile import load_policy
from fdbroker.policy.compiled import to_bytes
from fdbroker.policy.decide import decide, view
from fdbroker.policy.messages import from_bytes
from fdbroker.policy.tried import failed_tests
from fdbroker.terms import NAMESPACE_TYPES, NEW_NAMESPACE_TYPES, Subject, Uplink
from fdbroker.typed import parse


def loaded(tmp_path, text):
    path = tmp_path / "policy.yaml"
    path.write_text("version: 1\n" + text)
    return load_policy(str(path), trusted=False)


def errors(tmp_path, rules):
    with pytest.raises(PolicyError) as caught:
        loaded(tmp_path, f"everyone: {{{rules}}}\n")
    return [str(finding).partition(": ")[2] for finding in caught.value.findings]


def allowed(policy, *texts, uid=1000, gids=(1000,)):
    seen = view(policy, Subject(uid, frozenset(gids), 1, 1, "", "", foreign=True))
    return [text for text in texts if decide(seen, parse(text, "ro")).rules]


@pytest.mark.parametrize(
    ("rules", "error"),
    [
        ("namespaces: [{type: net}]", "a namespace rule without any of name, of, create"),
        (
            "namespaces: [{type: net, name: a, of: caller}]",
            "a namespace rule with name and of, expected one of name, of, create",
        ),
        (
            "namespaces: [{type: net, of: everybody}]",
            "of, expected caller, found 'everybody'",
        ),
        (
            "namespaces: [{type: nets, of: caller}]",
            "type, expected net or mnt or pid or user or uts or ipc or cgroup or time, found 'nets'; did you mean net?",
        ),
        ("namespaces: [{of: caller}]", "a namespace rule without type"),
        (
            "namespaces: [{type: [net, uts], name: a}]",
            "a namespace with a name, expected type net, found uts; write `of: caller`, or `create: true`",
        ),
        (
            "namespaces: [{type: [net, user], create: true}]",
            "a namespace to create, expected one of net, mnt, uts, ipc, cgroup, time, found user",
        ),
        ("namespaces: [{type: net, create: false}]", "create, expected true, found false; remove the rule"),
        ("namespaces: [{type: net, name: '*/a'}]", "name, expected a name in /run/netns"),
        ("namespaces: [{type: net, name: '..'}]", "name '..': .. is not allowed"),
        ("namespaces: [{type: net, name: 'a['}]", "name 'a[': a [ without its ]"),
        (
            "namespaces: [{type: uts, create: true, link: {bridge: br0, address: 10.0.0.0/24}}]",
            "a link, expected in a rule with `type: net` and `create: true` alone",
        ),
        (
            "namespaces: [{type: net, of: caller, link: {bridge: br0, address: 10.0.0.0/24}}]",
            "a link, expected in a rule with `type: net` and `create: true` alone",
        ),
        ("namespaces: [{type: net, create: true, link: {bridge: br0}}]", "a link without address"),
        (
            "namespaces: [{type: net, create: true, link: {bridge: abcdefghijklmnop, address: 10.0.0.0/24}}]",
            "bridge, expected the name of a network interface, found 'abcdefghijklmnop'",
        ),
        (
            "namespaces: [{type: net, create: true, link: {bridge: br0, address: 10.0.0.0}}]",
            "address, expected ADDRESS/PREFIX, found '10.0.0.0'",
        ),
        (
            "namespaces: [{type: net, create: true, link: {bridge: br0, address: 10.0.0.256/24}}]",
            "address '10.0.0.256/24', expected such as 10.88.0.0/24",
        ),
        (
            "namespaces: [{type: net, create: true, link: {bridge: br0, address: 10.0.0.0/31}}]",
            "address '10.0.0.0/31', expected a larger network; it holds the bridge's address and at least one more",
        ),
        (
            "namespaces: [{type: net, create: true, link: {bridge: br0, address: 127.0.0.0/8}}]",
            "address '127.0.0.0/8', expected one that a machine can have",
        ),
        ("sockets: [{}]", "a socket rule without namespace"),
        ("sockets: [{namespace: a, families: [unix]}]", "families, expected inet or inet6, found 'unix'"),
        ("sockets: [{namespace: a, types: [raw]}]", "types, expected stream or dgram, found 'raw'"),
        ("sockets: [{namespace: a, bind: [0]}]", "bind, expected a number from 1 to 65535, found '0'"),
        ("limits: {namespaces: 65}", "namespaces, expected a number from 1 to 64, found '65'"),
    ],
)
def test_an_error_says_what_was_expected(tmp_path, rules, error):
    (found,) = errors(tmp_path, rules)
    assert found.startswith(error), found


def test_a_deny_rule_must_deny_something(tmp_path):
    with pytest.raises(PolicyError) as caught:
        loaded(tmp_path, "deny: [{everyone: true}]\n")
    assert "a deny rule without any of devices, namespaces, sockets" in str(caught.value)


def test_each_form_allows_what_it_says_and_nothing_else(tmp_path):
    everything = ["net:vpn-a", "net:vpn", "net:pid:5", "net:new", "uts:pid:5", "uts:new", "mnt:new"]
    everything += ["socket:net:vpn-a", "socket:net:vpn-a,inet6", "socket:net:vpn-a,dgram", "socket:net:vpn-a,bind=443"]
    for rules, result in (
        ('namespaces: [{type: net, name: "vpn-*"}]', ["net:vpn-a"]),
        ("namespaces: [{type: [net, uts], of: caller}]", ["net:pid:5", "uts:pid:5"]),
        ("namespaces: [{type: uts, create: true}]", ["uts:new"]),
        ('sockets: [{namespace: "vpn-*"}]', everything[7:10]),
        ('sockets: [{namespace: "vpn-?", families: [inet6], types: [stream]}]', ["socket:net:vpn-a,inet6"]),
        ('sockets: [{namespace: "vpn-a", bind: [443]}]', everything[7:]),
        ("devices: [{path: /dev/null}]", []),
    ):
        assert allowed(loaded(tmp_path, f"everyone: {{{rules}}}\n").policy, *everything) == result


def test_deny_wins_for_each_form(tmp_path):
    rules = """
everyone:
  namespaces:
    - {type: net, name: "*"}
    - {type: [net, uts], of: caller}
    - {type: [net, uts], create: true}
  sockets: [{namespace: "*", bind: [80, 443]}]
deny:
  - {groups: [7], namespaces: [{type: net, name: "vpn-*"}]}
  - {groups: [8], namespaces: [{type: net, of: caller}, {type: uts, create: true}]}
  - {groups: [9], sockets: [{namespace: "vpn-*", bind: [443]}]}
  - {groups: [10], sockets: [{namespace: "vpn-*"}]}
"""
    policy = loaded(tmp_path, rules).policy
    asked = ["net:vpn-a", "net:x", "net:pid:5", "uts:pid:5", "net:new", "uts:new"]
    asked += ["socket:net:vpn-a", "socket:net:vpn-a,bind=80", "socket:net:vpn-a,bind=443", "socket:net:x,bind=443"]
    denied = {gid: set(asked) - set(allowed(policy, *asked, gids=(gid,))) for gid in (6, 7, 8, 9, 10)}
    assert denied == {
        6: set(),
        7: {"net:vpn-a"},
        8: {"net:pid:5", "uts:new"},
        9: {"socket:net:vpn-a,bind=443"},
        10: {"socket:net:vpn-a", "socket:net:vpn-a,bind=80", "socket:net:vpn-a,bind=443"},
    }


def test_a_rule_by_the_group_database_is_for_its_members_of_the_moment(tmp_path):
    text = "groups: {root: {namespaces: [{type: net, create: true, membership: nss}], sockets: [{namespace: a, membership: nss}]}}\n"
    policy = loaded(tmp_path, text).policy
    assert allowed(policy, "net:new", "socket:net:a", uid=0, gids=(5,)) == ["net:new", "socket:net:a"]
    assert allowed(policy, "net:new", "socket:net:a", uid=1000, gids=(0,)) == []


def test_the_policys_tests_know_every_form(tmp_path):
    text = """
everyone: {namespaces: [{type: net, name: "vpn-*"}]}
tests:
  - {as: {user: 5}, open: "net:vpn-a", expect: allow}
  - {as: {user: 5}, open: "net:new", expect: deny}
  - {as: {user: 5}, open: "socket:net:vpn-a,bind=443", expect: deny}
  - {as: {user: 5}, open: "net:pid:1", expect: allow}
"""
    (failed,) = failed_tests(loaded(tmp_path, text))
    assert " --user 5 net:pid:1`" in str(failed)
    with pytest.raises(PolicyError) as caught:
        loaded(tmp_path, "tests: [{as: {user: 5}, open: nets, expect: deny}]\n")
    assert "open 'nets', expected a resource is a path" in str(caught.value)


def test_the_link_and_every_field_survive_the_way_to_the_opener(tmp_path):
    text = """
everyone:
  namespaces: [{type: net, create: true, link: {bridge: br0, address: "fd00:88::/64", isolated: false}}]
  sockets: [{namespace: a, families: [inet6], types: [dgram], bind: [53]}]
deny: [{everyone: true, namespaces: [{type: time, of: caller}], sockets: [{namespace: b}]}]
"""
    policy = loaded(tmp_path, text).policy
    assert from_bytes(to_bytes(policy)) == policy
    assert policy.everyone[0].uplink == Uplink("br0", "fd00:88::/64", isolated=False)


@pytest.mark.parametrize(
    ("rules", "capabilities"),
    [
        ("devices: [{path: /dev/null}]", None),
        ("namespaces: [{type: net, name: a}]", {"CAP_SYS_PTRACE"}),
        (f"namespaces: [{{type: [{', '.join(NAMESPACE_TYPES)}], of: caller}}]", {"CAP_SYS_PTRACE"}),
        ("namespaces: [{type: uts, create: true}]", {"CAP_DAC_READ_SEARCH", "CAP_SYS_PTRACE", "CAP_SYS_ADMIN"}),
        (
            "namespaces: [{type: net, create: true}]",
            {"CAP_DAC_READ_SEARCH", "CAP_SYS_PTRACE", "CAP_SYS_ADMIN", "CAP_NET_ADMIN"},
        ),
        (
            "namespaces: [{type: mnt, create: true}]",
            {"CAP_DAC_READ_SEARCH", "CAP_SYS_PTRACE", "CAP_SYS_ADMIN", "CAP_SYS_CHROOT"},
        ),
        ("sockets: [{namespace: a}]", {"CAP_SYS_ADMIN"}),
        ("sockets: [{namespace: a, bind: [8080]}]", {"CAP_SYS_ADMIN", "CAP_NET_BIND_SERVICE"}),
        (
            f"namespaces: [{{type: [{', '.join(NEW_NAMESPACE_TYPES)}], create: true}}], sockets: [{{namespace: a}}]",
            {"CAP_DAC_READ_SEARCH", "CAP_SYS_PTRACE", "CAP_SYS_ADMIN", "CAP_NET_ADMIN", "CAP_SYS_CHROOT"},
        ),
    ],
)
def test_the_worker_gets_what_the_rules_need_and_the_opener_nothing_more(tmp_path, rules, capabilities):
    needed = needs(loaded(tmp_path, f"everyone: {{{rules}}}\n").policy)
    assert needed.worker == (None if capabilities is None else frozenset(capabilities))
    assert not needed.capabilities
    check_reload(needed, needed)


def test_a_rule_by_the_group_database_that_nobody_has_yet_needs_what_its_first_member_will(root, tmp_path):
    """The group gets one while the service runs, which then can be given nothing any more."""
    text = "groups: {fdbroker-test-group: {%s: [{%s, membership: nss}]}}\n"
    group = Path("/etc/group").read_text() + "fdbroker-test-group:x:60003:\n"
    with replaced_file("/etc/group", group):
        namespaces = loaded(tmp_path, text % ("namespaces", "type: uts, create: true"))
        devices = loaded(tmp_path, text % ("devices", "path: /dev/fdbroker-none, access: ro"))
    for one in (namespaces, devices):
        assert (one.policy.by_uid, one.policy.by_gid[60003]) == ({}, ())
    needed = needs(namespaces.policy, namespaces.idle)
    assert needed.worker == {"CAP_DAC_READ_SEARCH", "CAP_SYS_PTRACE", "CAP_SYS_ADMIN"}
    needed = needs(devices.policy, devices.idle)
    assert (needed.capabilities, needed.files["/dev"]) == ({"CAP_DAC_READ_SEARCH"}, READ_DIR | READ_FILE)
