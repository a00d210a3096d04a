"""The loader's words: place, what, expected, found, did you mean."""

from __future__ import annotations

import contextlib
import difflib
import grp
import pwd
from collections import Counter

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from yaml.reader import Reader

from fdbroker.errors import PolicyError
from fdbroker.limits.opener import POLICY_FINDINGS
from fdbroker.policy import load
from fdbroker.policy.compile import load_policy
from fdbroker.policy.tried import failed_tests


def errors(tmp_path, text):
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(PolicyError) as caught:
        load_policy(str(path), trusted=False)
    return [str(finding).replace(str(path), "F") for finding in caught.value.findings]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (
            "version: 1\ngrups: {}\n",
            "F:2:1: unknown key 'grups' in a policy, expected one of version, administrators, limits, groups, users, everyone, deny, tests, topics; did you mean groups?",
        ),
        (
            "version: 1\nusers: {0: {devices: [{path: /dev/x, access: readwrite}]}}\n",
            "F:2:46: access, expected ro or wo or rw, found 'readwrite'; did you mean rw?",
        ),
        (
            "version: 1\nusers: {0: {devices: [{path: /dev/tty0}]}}\n",
            "F:2:30: /dev/tty0 can match /dev/tty*, which gives power over the machine; add `dangerous: true` to say that this is meant, or write a narrower rule",
        ),
        (
            "version: 1\nusers: {0: {devices: [{path: /dev/x, class: block}]}}\n",
            "F:2:30: class block, which gives power over the machine; add `dangerous: true` to say that this is meant, or write a narrower rule",
        ),
        (
            "version: 1\nusers: {0: {devices: [{path: /dev/rtc0, class: rtc, access: rw}]}}\n",
            "F:2:61: access of class rtc, expected ro, found rw",
        ),
        ("version: 1\nusers: {0: {devices: [{access: rw}]}}\n", "F:2:23: a device rule without path"),
        (
            "version: 1\nusers: {0: {devices: []}}\n",
            "F:2:22: devices, expected a list of at least one item, found an empty list",
        ),
        (
            "version: 1\nusers: {0: {devices: [{path: /dev/x, revoke: on-disconnect}]}}\n",
            "F:2:38: revoke is not in this version; remove it; nothing else would enforce it",
        ),
        (
            "version: 1\ntopics: {x: {keep: 7d}}\n",
            "F:2:20: keep, but nothing is stored, expected `queue` in `deliver`",
        ),
        (
            "version: 1\ntopics: {x: {deliver: [queue], keep: 7 days}}\n",
            "F:2:38: keep, expected a number and one of s, m, h, d, w, such as 7d, found '7 days'",
        ),
        (
            "version: 1\ntopics: {x: {deliver: [cue]}}\n",
            "F:2:24: deliver, expected journal or subscribers or queue, found 'cue'",
        ),
        (
            "version: 1\ntopics: {news: {}}\neveryone: {send: [nws]}\n",
            "F:3:19: unknown topic 'nws'; did you mean news?",
        ),
        (
            "version: 1\ntopics: {a b: {}}\n",
            "F:2:10: topic 'a b', expected letters, digits, dots, hyphens and underscores, at most 64",
        ),
        ("version: 1\ndeny: [{devices: [/dev/x]}]\n", "F:2:8: a deny rule without any of groups, users, everyone"),
        (
            "version: 1\ndeny: [{everyone: false, devices: [/dev/x]}]\n",
            "F:2:8: a deny rule for nobody; `everyone: false` names nobody",
        ),
        (
            "version: 1\ndeny: [{users: daemon, devices: [/dev/x]}]\n",
            "F:2:16: users, expected a list of at least one item, found 'daemon'; write `[daemon]`",
        ),
        (
            "version: 1\ndeny: [{users: [{}], devices: [/dev/x]}]\n",
            "F:2:17: users, expected a name or a number, found a mapping",
        ),
        (
            "version: 1\ndeny: [{users: [daemon], devices: /dev/x}]\n",
            "F:2:35: devices, expected a list of at least one item, found '/dev/x'; write `[/dev/x]`",
        ),
        (
            "version: 1\ndeny: [{user: [daemon], devices: [/dev/x]}]\n",
            "F:2:9: unknown key 'user' in a deny rule, expected one of groups, users, everyone, label, devices, namespaces, sockets; did you mean users?",
        ),
        (
            "version: 1\ndeny: [{users: [daemon], device: [/dev/x]}]\n",
            "F:2:26: unknown key 'device' in a deny rule, expected one of groups, users, everyone, label, devices, namespaces, sockets; did you mean devices?",
        ),
        (
            "version: 1\neveryone: {devices: [{paths: /dev/x}]}\n",
            "F:2:23: unknown key 'paths' in a device rule, expected one of path, access, class, device, dangerous, label; did you mean path?",
        ),
        (
            "verson: 1\n",
            "F:1:1: unknown key 'verson' in a policy, expected one of version, administrators, limits, groups, users, everyone, deny, tests, topics; did you mean version?",
        ),
        ("version: 2\n", "F:1:10: version, expected 1, found '2'"),
        ("users: {5: {limits: {burst: 9}}}\n", "F:1:1: a policy without version; add `version: 1`"),
        (
            "version: 1\neveryone: {devices: [{path: /dev/x, device: '01:07'}]}\n",
            "F:2:45: device, expected MAJOR:MINOR, each a number without leading zeros or *, found '01:07'; did you mean \"1:7\"?",
        ),
        (
            "version: 1\neveryone: {devices: [{path: /dev/x, device: 116}]}\n",
            "F:2:45: device, expected MAJOR:MINOR, each a number without leading zeros or *, found '116'; did you mean \"116:*\"?",
        ),
        (
            "version: 1\neveryone: {devices: [{path: /dev/x, device: '1:2:3'}]}\n",
            "F:2:45: device, expected MAJOR:MINOR, each a number without leading zeros or *, found '1:2:3'",
        ),
        (
            "version: 1\neveryone: {devices: [{path: *.x}]}\n",
            "F:2:30: not YAML: while scanning an alias expected alphabetic or numeric character, but found '.'; quote a value that begins with `*`",
        ),
        (
            "version: 1\neveryone: {send: [*x]}\n",
            "F:2:19: the alias *x; aliases are not allowed: write it out; quote a value that begins with `*`",
        ),
        (
            "version: 1\neveryone: {send: '*, x'}\n",
            "F:2:18: send, expected a list of at least one item, found '*, x'; write `['*, x']`",
        ),
        (
            "version: 1\neveryone: {devices: /dev/x}\n",
            "F:2:21: devices, expected a list of at least one item, found '/dev/x'",
        ),
        ("version: 1\nadministrators: {}\n", "F:2:17: administrators without any of users, groups"),
        (
            "version: 1\nusers: {rooot: {devices: [{path: /dev/x}]}}\n",
            "F:2:9: unknown user 'rooot'; did you mean root?",
        ),
        (
            "version: 1\nusers: {nobody: {devices: [{path: /dev/x}]}}\n",
            "F:2:9: user 'nobody' is number 65534, which stands for nobody and matches nothing",
        ),
        ("version: 1\nlimits: {connections: 0}\n", "F:2:23: connections, expected a number from 1 to 20000, found '0'"),
        (
            "version: 1\ntests: [{as: {user: 0}, open: /dev/x, expect: denied}]\n",
            "F:2:47: expect, expected allow or deny, found 'denied'; did you mean deny?",
        ),
        ("version: 1\nusers:\n", "F:2:7: a user, expected a mapping, found nothing"),
    ],
    ids=range(37),
)
def test_an_error_says_where_what_was_expected_and_what_to_do(tmp_path, text, error):
    assert errors(tmp_path, text) == [error]


def test_all_errors_come_at_once_in_order_also_in_rules_of_unknown_groups(tmp_path):
    text = """version: 1
groups:
  nogroupofthisname:
    devices:
      - {path: "/dev/[", access: x}
limits: {burst: 0}
"""
    lines = [error.split(": ")[0] for error in errors(tmp_path, text)]
    assert lines == ["F:3:3", "F:5:16", "F:5:34", "F:6:17"]


LATER = "is not in this version; remove it; nothing else would enforce it"


@pytest.mark.parametrize(
    ("text", "places"),
    [
        (
            "secrets: {}\nrevoke:\nrequire: password\nleases: 9\nsocket: {groups: [audio]}\nauthentication: {service: x}\nunits: {}\n",
            ["2:1", "3:1", "4:1", "5:1", "6:1", "7:1", "8:1"],
        ),
        ("everyone: {secrets: [{name: x, credential: x}]}\n", ["2:12"]),
        ("groups: {29: {secrets: []}}\nusers: {5: {secrets: {}}}\n", ["2:15", "3:13"]),
        (
            "everyone:\n  devices:\n  - path: /dev/x\n    leases: 1\n    revoke: [on-lock]\n    require: password\n    remember: {for: 5m}\n    session: active\n    for: 30m\n    until: 0\n",
            [f"{line}:5" for line in range(5, 12)],
        ),
        (
            "users:\n  5:\n    devices:\n    - path: /dev/x\n      kind: mouse\n      bus: usb\n      usb: '1:2'\n      serial: A5*\n      exclusive: true\n",
            [f"{line}:7" for line in range(6, 11)],
        ),
        ("deny: [{units: [x.service], devices: [/dev/x]}]\n", ["2:9"]),
    ],
    ids=range(6),
)
def test_a_key_of_a_later_version_is_called_that_wherever_it_can_stand(tmp_path, text, places):
    """Its author would rely on it; that it was misspelt was not true."""
    found = errors(tmp_path, f"version: 1\n{text}")
    assert [one.partition(": ")[0].removeprefix("F:") for one in found] == places
    assert [one for one in found if not one.endswith(f" {LATER}")] == []


def test_the_limit_leases_is_no_key_of_a_later_version(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text("version: 1\nlimits: {leases: 9}\neveryone: {limits: {leases: 8}}\n")
    assert load_policy(str(path), trusted=False).policy.limits["leases"] == 9


def test_what_a_rule_lacks_is_said_beside_a_key_that_means_nothing(tmp_path):
    """Such a key is none of those that the rule needs."""
    found = errors(tmp_path, "version: 1\ndeny: [{everyone: true, zzz: 1}, {devices: [/dev/x], zzz: 1}]\n")
    assert [one.split(",")[0] for one in found] == [
        "F:2:8: a deny rule without any of devices",
        "F:2:25: unknown key 'zzz' in a deny rule",
        "F:2:34: a deny rule without any of groups",
        "F:2:54: unknown key 'zzz' in a deny rule",
    ]


def test_nothing_untrue_is_said_of_a_rule_where_no_more_hints_are_given(tmp_path):
    unknown = "".join(f"key{index}: 1\n" for index in range(load._HINTED))
    found = errors(tmp_path, f"version: 1\n{unknown}deny: [{{user: [daemon], device: [/dev/x]}}]\n")
    assert [one for one in found if "without" in one] == []


def test_too_many_errors_are_counted(tmp_path):
    found = errors(tmp_path, "version: 1\n" + "".join(f"key{index}: 1\n" for index in range(300)))
    assert len(found) == 201
    assert found[-1] == "F: and 100 errors more"


def test_numbers_stand_for_users_and_groups_that_need_not_exist(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text(
        "version: 1\nusers: {54321: {devices: [{path: /dev/x}]}}\ngroups: {54322: {devices: [{path: /dev/y}]}}\n"
    )
    policy = load_policy(str(path), trusted=False).policy
    assert list(policy.by_uid) == [54321]
    assert list(policy.by_gid) == [54322]


def test_a_failing_test_says_how_it_came_out(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text(
        "version: 1\ntests:\n  - {as: {user: 0, groups: [0]}, open: /dev/x, expect: allow}\n  - {as: {user: 0}, open: /dev/x, expect: deny}\n"
    )
    (failed,) = failed_tests(load_policy(str(path), trusted=False))
    assert (
        str(failed)
        == f"{path}:3:5: this test fails, expected allow, found deny; try `fdbroker policy explain --policy {path} --user 0 --groups 0 /dev/x`"
    )


def test_administrators_and_limits_of_several_sources(tmp_path):
    from fdbroker.policy.decide import view
    from fdbroker.terms import Subject

    path = tmp_path / "policy.yaml"
    path.write_text(
        "version: 1\nadministrators: {users: [7], groups: [8]}\nlimits: {burst: 10, connections: 3}\n"
        "groups: {8: {limits: {burst: 20}}, 9: {limits: {burst: 30}}}\nusers: {5: {limits: {burst: 1}}}\n"
    )
    policy = load_policy(str(path), trusted=False).policy

    def seen(uid, *gids, foreign=False):
        return view(policy, Subject(uid, frozenset(gids), 1, 1, "", "", foreign))

    assert seen(4).limits["burst"] == 10
    assert seen(4, 8).limits["burst"] == 20
    assert seen(4, 8, 9).limits["burst"] == 30
    assert seen(5, 9).limits["burst"] == 1
    assert seen(4).limits["connections"] == 3
    assert [seen(7).administrator, seen(4, 8).administrator, seen(0).administrator, seen(4).administrator] == [
        True,
        True,
        True,
        False,
    ]
    assert not seen(7, foreign=True).administrator
    assert not seen(65534, 8).administrator


def test_a_file_is_read_once(tmp_path, monkeypatch):
    """To tell a text's words takes most of the time that a policy of 1,000 rules needs until the service answers."""
    texts, read = [], Reader.__init__
    monkeypatch.setattr(Reader, "__init__", lambda reader, text: texts.append(text) or read(reader, text))
    path = tmp_path / "policy.yaml"
    path.write_text("version: 1\neveryone: {devices: [{path: /dev/null}]}\n")
    (rule,) = load_policy(str(path), trusted=False).policy.everyone
    assert rule.pattern == "/dev/null"
    assert texts == [path.read_text()]


NESTED = st.recursive(
    st.text(st.sampled_from("ab1: -\n'\"#"), max_size=6) | st.sampled_from(["null", "yes", "1", "~", "!", "<<"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=12,
)


@given(NESTED, st.booleans(), st.booleans())
def test_the_tree_of_a_text_is_that_which_yaml_makes(value, flow, canonical):
    """Kinds, values, tags, styles and places, as from a text that is read a second time."""
    text = yaml.safe_dump(value, default_flow_style=flow, canonical=canonical)
    ours = load._Composer(yaml.parse(text, Loader=yaml.SafeLoader)).get_single_node()
    assert yaml.serialize(ours) == yaml.serialize(yaml.compose(text, Loader=yaml.SafeLoader))
    pairs = [(ours, yaml.compose(text, Loader=yaml.SafeLoader))]
    while pairs:
        one, other = pairs.pop()
        if isinstance(one, tuple):
            pairs += zip(one, other, strict=True)
            continue
        assert (type(one), one.tag) == (type(other), other.tag)
        assert (one.start_mark.index, one.end_mark.index) == (other.start_mark.index, other.end_mark.index)
        if isinstance(one, yaml.ScalarNode):
            assert (one.value, one.style) == (other.value, other.style)
        else:
            pairs += zip(one.value, other.value, strict=True)


def _unknown(kind, count):
    unknown = "".join(f"  zzz-nobody-{number}: {{}}\n" for number in range(count))
    denied = "".join(f"- {{groups: [{60000 + number}], devices: [/dev/null]}}\n" for number in range(count))
    return {
        "users": f"users:\n{unknown}",
        "groups": f"groups:\n{unknown}",
        "keys": unknown.replace("  ", ""),
        "topics": f"everyone:\n  send: [{', '.join(f'none{number}' for number in range(count))}]\ntopics: {{one: {{}}}}\n",
        "words": "everyone:\n  devices:\n" + "  - {path: /dev/null, access: wr}\n" * count,
        "members": f"deny:\n{denied}",
    }[kind]


@pytest.mark.parametrize("kind", ["users", "groups", "keys", "topics", "words", "members"])
def test_what_is_looked_up_for_a_policy_is_listed_once_and_only_the_first_errors_have_a_hint(
    tmp_path, monkeypatch, kind
):
    """All names were listed and compared for each error: the launcher was silent for minutes, and the watchdog ended it."""
    calls: Counter[str] = Counter()

    def counted(module, name):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given: calls.update([name]) or real(*given))

    for module, name in ((pwd, "getpwall"), (grp, "getgrall"), (difflib, "get_close_matches")):
        counted(module, name)
    path = tmp_path / "policy.yaml"
    path.write_text("version: 1\n" + _unknown(kind, 300))
    with contextlib.suppress(PolicyError):
        load_policy(str(path), trusted=False)
    assert calls["getpwall"] == 1
    assert calls["getgrall"] <= 1
    assert calls["get_close_matches"] == (0 if kind == "members" else load._HINTED)


def test_names_are_looked_up_until_there_are_more_errors_than_anybody_reads(tmp_path, monkeypatch):
    """Each that nobody has takes a look at all accounts."""
    asked = []
    real = pwd.getpwnam
    monkeypatch.setattr(pwd, "getpwnam", lambda name: asked.append(name) or real(name))
    found = errors(tmp_path, "version: 1\n" + _unknown("users", 1200))
    assert len(found) == POLICY_FINDINGS + 1
    assert len([name for name in asked if name.startswith("zzz")]) == 1000
