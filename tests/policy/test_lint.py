"""Warnings of `policy check`: each for what it is about, and none for a policy that is as it should be."""

from __future__ import annotations

import itertools
import os
import pwd
import stat
import time

import pytest

from fdbroker.policy.compile import load_policy
from fdbroker.policy.fit import Facts
from fdbroker.policy.globs import within
from fdbroker.policy.lint import Look, Machine, warnings
from fdbroker.policy.paths import matcher

NODES = {
    "/dev/snd/pcmC0D0p": Facts("/dev/snd/pcmC0D0p", stat.S_IFCHR, "116:2", "sound", "pcmC0D0p"),
    "/dev/snd": Facts("/dev/snd", stat.S_IFDIR, "0:0", "", ""),
    "/dev/null": Facts("/dev/null", stat.S_IFCHR, "1:3", "mem", "null"),
    "/dev/odd": Facts("/dev/odd", stat.S_IFCHR, "4:9", "tty", "tty9"),
    "/dev/pts/0": Facts("/dev/pts/0", stat.S_IFCHR, "136:0", "", ""),
}
LINKS = {"/dev/away": Look(("/dev/away",), None, "a link leads out of /dev")}


def connect(uid, gids):
    return "" if uid in (0, 7) or 44 in gids else f"{uid} is not let in"


MACHINE = Machine(
    lambda pattern: [path for path in (*NODES, *LINKS, "/dev/hidden") if matcher(pattern).fullmatch(path)],
    lambda path: None if path == "/dev/hidden" else LINKS.get(path) or Look((path,), NODES[path]),
    lambda: ["vpn-a"],
    connect,
    {"br0": True, "br1": False}.get,
)


def said(tmp_path, text):
    path = tmp_path / "policy.yaml"
    path.write_text("version: 1\n" + text)
    loaded = load_policy(str(path), trusted=False)
    return [str(one).replace(f"{path}:", "") for one in warnings(loaded.policy, MACHINE)]


LINKED = "everyone: {namespaces: [{type: net, create: true, link: {bridge: br0, address: 10.88.0.0/24}}]}\n"


def rule(text):
    return f"everyone: {{devices: [{{{text}}}]}}\n"


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        (
            rule("path: /dev/null"),
            "2: /dev/null without `class` and `device` is whatever character device has that name; "
            'add `class` or `device`: here class: mem, device: "1:3"',
        ),
        (rule('path: /dev/none, device: "1:3"'), "2: nothing here matches /dev/none now"),
        (rule('path: "/dev/snd/x*", class: sound'), "2: nothing here matches /dev/snd/x* now"),
        (rule("path: /dev/away, class: sound"), "2: nothing here matches /dev/away now; a link leads out of /dev"),
        (rule("path: /dev/snd, class: sound"), "2: /dev/snd is a folder, which grants nothing; write /dev/snd/*"),
        (
            rule("path: /dev/null, class: sound"),
            "2: nothing here is what the rule says: /dev/null: its class is mem, not sound",
        ),
        (
            rule('path: /dev/odd, device: "*:9"'),
            "2: nothing here is what the rule says: /dev/odd: its number 4:9 is that of a terminal, "
            "and the rule is not marked dangerous",
        ),
        (
            rule('path: "/dev/*", device: "1:3", dangerous: true'),
            "2: /dev/* is every name there; write a rule for each kind of node",
        ),
        (
            rule('path: "/dev/pts/*", class: tty, dangerous: true'),
            "2: /dev/pts/* with a class is never granted: the kernel names none for /dev/pts; "
            'write `device: "136:*"` in its place',
        ),
        (
            "everyone: {namespaces: [{type: net, name: lan}]}\n",
            "2: nothing in /run/netns matches lan now",
        ),
        ('everyone: {sockets: [{namespace: "lan*"}]}\n', "2: nothing in /run/netns matches lan* now"),
        (
            'topics: {news: {}}\neveryone: {send: ["alarm*"]}\n',
            "3: nothing among the topics matches alarm* now",
        ),
        (
            "deny: [{everyone: true, devices: [/dev/null, /dev/sdn/*]}]\n",
            "2: nothing here matches /dev/sdn/* now; it denies nothing now",
        ),
        (
            "deny: [{everyone: true, namespaces: [{type: net, name: vpm-a}, {type: net, create: true}]}]\n",
            "2: nothing in /run/netns matches vpm-a now; it denies nothing now",
        ),
        (
            "deny: [{everyone: true, sockets: [{namespace: 'vpm-*'}, {namespace: 'vpn-*'}]}]\n",
            "2: nothing in /run/netns matches vpm-* now; it denies nothing now",
        ),
        (LINKED.replace("br0", "br1"), "2: there is no bridge br1 now"),
        (
            f"users: {{{os.getuid()}: {{devices: [{{path: /dev/null, class: mem}}]}}, 6: {{send: [news]}}}}\ntopics: {{news: {{}}}}\n",
            f"2: user {pwd.getpwuid(6).pw_name} has rules and cannot connect: 6 is not let in",
        ),
    ],
)
def test_each_is_said_with_its_line(tmp_path, text, warning):
    assert said(tmp_path, text) == [warning]


def test_nothing_is_said_where_nothing_is_wrong(tmp_path):
    assert not said(
        tmp_path,
        """
everyone:
  devices: [{path: "/dev/snd/*", class: sound}, {path: /dev/hidden, class: sound}, {path: /dev/pts/0, device: "136:*", dangerous: true}]
  namespaces: [{type: net, name: "vpn-*"}, {type: net, create: true}]
  sockets: [{namespace: "vpn-*"}]
  send: ["n*"]
users:
  7: {devices: [{path: /dev/null, device: "1:3"}]}
topics: {news: {}}
deny: [{users: [7], devices: ["/dev/snd/*"], sockets: [{namespace: vpn-a}], namespaces: [{type: net, name: "*"}]}]
""",
    )
    assert not said(tmp_path, LINKED)
    assert not said(tmp_path, LINKED.replace("br0", "unseen"))


def test_members_of_a_group_with_rules_are_users_with_rules(tmp_path):
    uid = next(user.pw_uid for user in pwd.getpwall() if user.pw_uid not in (0, 7) and user.pw_gid not in (44, 65534))
    gid = pwd.getpwuid(uid).pw_gid
    found = said(tmp_path, f"groups: {{{gid}: {{devices: [{{path: /dev/null, class: mem}}]}}}}\n")
    assert any(pwd.getpwuid(uid).pw_name in one and "cannot connect" in one for one in found)


SOUND = "[{path: /dev/snd/pcmC0D0p, class: sound}]"


@pytest.mark.parametrize(
    ("allow", "deny", "shadowed"),
    [
        (f"users: {{7: {{devices: {SOUND}}}}}", '{users: [7], devices: ["/dev/snd/*"]}', True),
        (f"users: {{7: {{devices: {SOUND}}}}}", '{everyone: true, devices: ["/dev/snd/pcm*"]}', True),
        (f"users: {{7: {{devices: {SOUND}}}}}", '{users: [7], label: x, devices: ["/dev/snd/*"]}', False),
        (f"users: {{7: {{devices: {SOUND}}}}}", '{users: [0], devices: ["/dev/snd/*"]}', False),
        (f"users: {{7: {{devices: {SOUND}}}}}", '{users: [7], devices: ["/dev/*"]}', False),
        (f"groups: {{44: {{devices: {SOUND}}}}}", '{groups: [44], devices: ["/dev/snd/*"]}', True),
        (f"groups: {{44: {{devices: {SOUND}}}}}", '{groups: [45], devices: ["/dev/snd/*"]}', False),
        (f"everyone: {{devices: {SOUND}}}", '{users: [7], devices: ["/dev/snd/*"]}', False),
        (f"everyone: {{devices: {SOUND}}}", '{everyone: true, devices: ["/dev/snd/*"]}', True),
        (
            "everyone: {namespaces: [{type: net, name: vpn-a}]}",
            '{everyone: true, namespaces: [{type: net, name: "*"}]}',
            True,
        ),
        (
            "everyone: {namespaces: [{type: [uts, ipc], create: true}]}",
            "{everyone: true, namespaces: [{type: uts, create: true}]}",
            False,
        ),
        ("everyone: {sockets: [{namespace: vpn-a}]}", '{everyone: true, sockets: [{namespace: "*"}]}', True),
        (
            "everyone: {sockets: [{namespace: vpn-a}]}",
            '{everyone: true, sockets: [{namespace: "*", bind: [80]}]}',
            False,
        ),
    ],
)
def test_a_rule_of_which_a_deny_rule_leaves_nothing(tmp_path, allow, deny, shadowed):
    found = said(tmp_path, f"{allow}\ndeny: [{deny}]\n")
    assert ["denied whole at" in one for one in found] == [True] * shadowed


@pytest.mark.parametrize(
    ("inner", "outer", "answer"),
    [
        ("/dev/a", "/dev/a", True),
        ("/dev/a", "/dev/*", True),
        ("/dev/a", "/dev/?", True),
        ("/dev/ab", "/dev/?", False),
        ("/dev/?", "/dev/*", True),
        ("/dev/*", "/dev/?", False),
        ("/dev/*", "/dev/a", False),
        ("/dev/a*", "/dev/*", True),
        ("/dev/*a", "/dev/*a*", True),
        ("/dev/*a*", "/dev/*a", False),
        ("/dev/a*b", "/dev/a*", True),
        ("/dev/a*", "/dev/a*b", False),
        ("/dev/*", "/dev/*?", False),
        ("/dev/*?", "/dev/?*", False),  # it is, and nobody need know
        ("/dev/[ab]", "/dev/[ab]", True),
        ("/dev/[ab]", "/dev/?", True),
        ("/dev/a", "/dev/[ab]", True),
        ("/dev/c", "/dev/[ab]", False),
        ("/dev/a/b", "/dev/*", False),
        ("/dev/a/b", "/dev/*/*", True),
        ("/dev/\\\\x", "/dev/\\\\*", True),
        ("/dev/\\\\", "/dev/?", True),
    ],
)
def test_what_one_glob_matches_another_does(inner, outer, answer):
    assert within(inner, outer) is answer


def test_no_glob_is_said_to_be_within_another_that_misses_one_of_its_names():
    """All globs of up to three pieces, and all names of up to four letters of two."""
    names = ["".join(letters) for count in range(1, 5) for letters in itertools.product("ab", repeat=count)]
    globs = [
        "".join(pieces) for count in (1, 2, 3) for pieces in itertools.product(("a", "?", "*", "[ab]"), repeat=count)
    ]
    matched = {glob: {name for name in names if matcher(glob).fullmatch(name)} for glob in globs if "**" not in glob}
    count = 0
    for inner, outer in itertools.product(matched, repeat=2):
        if within(inner, outer):
            assert matched[inner] <= matched[outer], (inner, outer)
            count += inner != outer
    assert count > 500


def test_a_thousand_rules_and_deny_rules_are_judged_in_time(tmp_path):
    rules = "\n".join(f'    - {{path: "/dev/snd/pcm{n}C*D*[pc]", class: sound}}' for n in range(1000))
    denies = "\n".join(f'  - {{everyone: true, devices: ["/dev/snd/x{n}*"]}}' for n in range(200))
    path = tmp_path / "policy.yaml"
    path.write_text(f"version: 1\neveryone:\n  devices:\n{rules}\ndeny:\n{denies}\n")
    loaded = load_policy(str(path), trusted=False)
    began = time.process_time()
    assert len(warnings(loaded.policy, MACHINE)) == 1200
    assert time.process_time() - began < 5
