"""`label:` in rules: which labels a glob means, in each form of rule, and what is said about it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from fdbroker.errors import PolicyError
from fdbroker.inbox.rights import message_rights
from fdbroker.policy.compile import load_policy
from fdbroker.policy.compiled import to_bytes
from fdbroker.policy.explain import explain
from fdbroker.policy.labels import allowing, denying
from fdbroker.policy.messages import from_bytes, judge, message_view, messages
from fdbroker.policy.tried import failed_tests
from fdbroker.terms import Subject
from fdbroker.typed import parse_asked

SELINUX = "system_u:system_r:player_t:s0:c1,c5"
# What Linux 7.2 says by SO_PEERSEC of AppArmor's profiles, and Linux 6.1 of SELinux's domains
LABELS = (
    "player (enforce)",
    "player (kill)",
    "player (complain)",
    "player (unconfined)",
    "player (prompt)",
    "player//child (enforce)",
    "player//&other (enforce)",
    "player//&other (mixed)",
    "other//&player (enforce)",
    "player//&unconfined (enforce)",
    ":box:player (enforce)",
    ":box://player (enforce)",
    ":box:x//&player (enforce)",
    "player//&:box:x (enforce)",
    "player (enforce) (complain)",
    "my player (enforce)",
    "/usr/bin/player (enforce)",
    "unconfined",
    "---",
    SELINUX,
    "",
)
SURELY = {
    "player (enforce)",
    "player (kill)",
    "player//&other (enforce)",
    "other//&player (enforce)",
    "player//&unconfined (enforce)",
    "player//&:box:x (enforce)",
}


def subject(label, uid=5, gids=(50,)):
    return Subject(uid, frozenset(gids), 1, 1, "", label, foreign=True)


def loaded(tmp_path, text):
    path = tmp_path / "policy.yaml"
    path.write_text("version: 1\n" + text)
    return load_policy(str(path), trusted=False)


def allowed(policy, text, label, access="ro"):
    policy = from_bytes(to_bytes(policy))  # as the opener has it
    return bool(judge(policy, subject(label), parse_asked(text, access)).rules)


def test_a_rule_that_allows_counts_where_the_profile_surely_confines():
    """Enforced or killed, alone or with others, in our own policy namespace; not a child, not by another name."""
    assert {label for label in LABELS if allowing(("player",), label)} == SURELY


def test_a_deny_rule_counts_wherever_the_profile_could_be_meant():
    """In any mode and namespace, for its children, and where the label is not known or hidden."""
    spared = {"player (enforce) (complain)", "my player (enforce)", "/usr/bin/player (enforce)", "unconfined", SELINUX}
    assert {label for label in LABELS if not denying(("player",), label)} == spared


@pytest.mark.parametrize(
    ("pattern", "labels"),
    [
        ("*", SURELY | {"my player (enforce)", SELINUX}),
        ("play?r", SURELY),
        ("pl[!b]yer", SURELY),
        ("player//*", {"player//child (enforce)"}),
        ("*//child", {"player//child (enforce)"}),
        ("my player", {"my player (enforce)"}),
        ("/usr/bin/*", {"/usr/bin/player (enforce)"}),
        ("/usr/*", set()),
        ("*:player_t:*", {SELINUX}),
        ("player_t", set()),
        ("Player", set()),
        ("*enforce*", set()),
        ("*x", set()),
        ("unconfined*", set()),
        ("---*", set()),
    ],
)
def test_a_glob_is_of_the_whole_name_and_never_of_a_slash(pattern, labels):
    assert {label for label in LABELS if allowing((pattern,), label)} == labels


def test_one_of_several_globs_is_enough_and_without_any_all_labels_are_meant():
    assert allowing(("a", "b"), "b (enforce)")
    assert not allowing(("a", "b"), "c (enforce)")
    assert denying(("a", "b"), "b (complain)")
    assert not denying(("a", "b"), "c (complain)")
    assert all(allowing((), label) and denying((), label) for label in LABELS)
    assert denying(("unconfined",), "unconfined")


def test_a_long_label_takes_no_time():
    """A user may stack profiles until the label is as long as it can be."""
    label = "a//&" * 1000 + "b (enforce)"
    assert not allowing(("*a*a*a*a*a*c",), label)
    assert not denying(("*a*a*a*a*a*c",), label)
    assert not allowing(("*" + "/*" * 20 + "c",), "a" * 4000 + " (enforce)")


RULES = [
    ("devices: [{path: /dev/x, label: player}]", "/dev/x"),
    ("devices: [{path: /dev/x, label: [other, player]}]", "/dev/x"),
    ("namespaces: [{type: net, name: vpn, label: player}]", "net:vpn"),
    ("namespaces: [{type: net, of: caller, label: player}]", "net:pid:5"),
    ("namespaces: [{type: uts, create: true, label: player}]", "uts:new"),
    ("sockets: [{namespace: vpn, label: player}]", "socket:net:vpn"),
    ("send: [{topic: news, label: player}]", "send:news"),
    ("subscribe: [{topic: 'n*', label: player}]", "subscribe:news"),
]


@pytest.mark.parametrize(("rule", "asked"), RULES)
@pytest.mark.parametrize("whom", ["everyone: {%s}", "users: {5: {%s}}", "groups: {50: {%s}}"])
def test_each_form_of_rule_counts_for_its_label_alone(tmp_path, whom, rule, asked):
    policy = loaded(tmp_path, "topics: {news: {}}\n" + whom % rule).policy
    assert allowed(policy, asked, "player (enforce)")
    assert not allowed(policy, asked, "player (complain)")
    assert not allowed(policy, asked, "")


def test_a_rule_for_members_by_the_database_keeps_its_label(tmp_path):
    rule = "groups: {root: {devices: [{path: /dev/x, label: player, membership: nss}]}}"
    policy = loaded(tmp_path, rule).policy
    for label, expected in (("player (enforce)", True), ("", False)):
        assert bool(judge(policy, subject(label, 0, []), parse_asked("/dev/x", "ro")).rules) == expected


@pytest.mark.parametrize(
    ("denied", "asked"),
    [
        ("devices: [/dev/x]", "/dev/x"),
        ("namespaces: [{type: net, name: vpn}]", "net:vpn"),
        ("sockets: [{namespace: vpn}]", "socket:net:vpn"),
    ],
)
def test_a_deny_rule_with_a_label_denies_that_one_and_the_unknown(tmp_path, denied, asked):
    policy = loaded(
        tmp_path,
        "everyone: {devices: [{path: /dev/x}], namespaces: [{type: net, name: vpn}], sockets: [{namespace: vpn}]}\n"
        f"deny: [{{users: [5], label: player, {denied}}}]\n",
    ).policy
    assert not allowed(policy, asked, "player (complain)")
    assert not allowed(policy, asked, "")
    assert allowed(policy, asked, "other (enforce)")
    assert allowed(policy, asked, "unconfined")
    assert judge(policy, subject("", uid=6), parse_asked(asked, "ro")).rules


def test_with_and_without_a_label_add_up(tmp_path):
    policy = loaded(
        tmp_path,
        "everyone: {devices: [{path: /dev/x}, {path: /dev/x, access: rw, label: player}]}\n",
    ).policy
    assert allowed(policy, "/dev/x", "", "ro")
    assert not allowed(policy, "/dev/x", "", "rw")
    assert allowed(policy, "/dev/x", "player (enforce)", "rw")


TOPICS = """\
topics: {open: {deliver: [queue]}, closed: {deliver: [queue]}}
users: {5: {send: [open], subscribe: [open, {topic: closed, label: player}]}}
"""


def test_rights_on_topics_are_the_labels(tmp_path):
    policy = loaded(tmp_path, TOPICS).policy
    for label, topics in (("player (enforce)", {"open", "closed"}), ("player (complain)", {"open"}), ("", {"open"})):
        rights = message_rights(message_view(policy, subject(label)), messages(policy).topics)
        assert (rights.send, rights.subscribe) == ({"open"}, topics)


def test_a_message_is_stored_for_the_users_of_a_label(tmp_path):
    """Their programs with it can read it; nobody knows which programs a user will start."""
    policy = loaded(tmp_path, TOPICS).policy
    assert [(user.uid, user.topics) for user in messages(policy).users] == [(5, {0, 1})]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (
            "everyone: {devices: [{path: /dev/x, label: ''}]}",
            "F:2:44: label, expected a MAC label without its mode; * ? [..] never match a slash, found ''",
        ),
        (
            "everyone: {devices: [{path: /dev/x, label: []}]}",
            "F:2:44: label, expected a list of at least one item, found an empty list",
        ),
        (
            "everyone: {devices: [{path: /dev/x, labels: a}]}",
            "F:2:37: unknown key 'labels' in a device rule, expected one of path, access, class, device, dangerous, "
            "label; did you mean label?",
        ),
        (
            "everyone: {devices: [{path: /dev/x, label: 'a (enforce)'}]}",
            "F:2:44: label 'a (enforce)': write it without its mode",
        ),
        (
            "everyone: {devices: [{path: /dev/x, label: [a, unconfined]}]}",
            "F:2:48: label 'unconfined': it stands for no confinement, and never allows anything",
        ),
        (
            "everyone: {devices: [{path: /dev/x, label: 'a//&b'}]}",
            "F:2:44: label 'a//&b': each profile of a stack counts by itself: write one",
        ),
        (
            "everyone: {send: [{topic: inbox, label: ':box:a'}]}\ntopics: {inbox: {}}",
            "F:2:41: label ':box:a': write the profile without its namespace; no rule allows anything to one in another",
        ),
        (
            "everyone: {sockets: [{namespace: a, label: 'a['}]}",
            "F:2:44: label 'a[': a [ without its ]",
        ),
        (
            "everyone: {devices: [{path: /dev/x, label: '/usr/bin/{a,b}'}]}",
            "F:2:44: label '/usr/bin/{a,b}': no braces: AppArmor has them in the names of some profiles, write ? for each",
        ),
        (
            f"everyone: {{devices: [{{path: /dev/x, label: {'a' * 250}{'/a' * 2000}}}]}}",
            "it is over 4096 bytes",
        ),
        ("everyone: {send: [{label: a}]}", "F:2:19: a topic rule without topic"),
        (
            "everyone: {send: [{topic: [inbox]}]}",
            "F:2:27: topic, expected a topic; * ? [..] match any part of its name",
        ),
        ("everyone: {send: [{topic: nws, label: a}]}\ntopics: {news: {}}", "F:2:27: unknown topic 'nws'"),
        ("deny: [{label: a, devices: [/dev/x]}]", "F:2:8: a deny rule without any of groups, users, everyone"),
        (
            "deny: [{everyone: true, label: 'a (complain)', devices: [/dev/x]}]",
            "F:2:32: label 'a (complain)': write it without its mode",
        ),
    ],
    ids=range(15),
)
def test_an_error_says_where_and_what_was_expected(tmp_path, text, error):
    with pytest.raises(PolicyError) as caught:
        loaded(tmp_path, text + "\n")
    (found,) = [str(finding).replace(str(tmp_path / "policy.yaml"), "F") for finding in caught.value.findings]
    assert error in found


def test_a_deny_rule_may_name_the_unconfined(tmp_path):
    policy = loaded(
        tmp_path,
        "everyone: {devices: [{path: /dev/x}]}\ndeny: [{everyone: true, label: unconfined, devices: [/dev/x]}]\n",
    ).policy
    assert not allowed(policy, "/dev/x", "unconfined")
    assert allowed(policy, "/dev/x", "player (enforce)")


POLICY = """\
users: {5: {devices: [{path: /dev/x, label: player}, {path: /dev/y}]}}
deny: [{everyone: true, label: browser, devices: [/dev/y]}]
tests:
  - {as: {user: 5, groups: [50], label: player (enforce)}, open: /dev/x, expect: allow}
  - {as: {user: 5, groups: [50], label: player}, open: /dev/x, expect: allow}
  - {as: {user: 5, groups: [50], label: player (complain)}, open: /dev/x, expect: deny}
  - {as: {user: 5, groups: [50]}, open: /dev/x, expect: deny}
  - {as: {user: 5, groups: [50], label: player}, open: /dev/y, expect: allow}
  - {as: {user: 5, groups: [50], label: browser (complain)}, open: /dev/y, expect: deny}
  - {as: {user: 5, groups: [50]}, open: /dev/y, expect: deny}
"""


def test_the_policys_own_tests_may_say_a_label(tmp_path):
    assert failed_tests(loaded(tmp_path, POLICY)) == []
    swapped = POLICY.replace("expect: deny", "expect: ALLOW").replace("expect: allow", "expect: deny")
    assert len(failed_tests(loaded(tmp_path, swapped.replace("ALLOW", "allow")))) == 7


@pytest.mark.parametrize(
    ("asked", "label", "result", "words"),
    [
        ("/dev/x", "player (enforce)", True, "(user 5 with the label player) allows it"),
        ("/dev/x", "", False, "it is for programs with the label player, enforced; that of this one is not known"),
        ("/dev/x", "player (complain)", False, "this one has player (complain)"),
        ("/dev/x", "", False, "have the program confined so, or remove `label` at "),
        ("/dev/y", "browser (complain)", False, "denies it to everyone with the label browser, and a deny rule wins"),
        ("/dev/y", "", False, "everyone with the label browser, which it could be, for its label is not known, and"),
    ],
)
def test_explain_names_the_label(tmp_path, asked, label, result, words):
    policy = loaded(tmp_path, POLICY).policy
    one = explain(policy, subject(label), parse_asked(asked, "ro"), "u")
    assert one.allowed == result
    assert words in "; ".join([one.reason, one.change, *(near.missing for near in one.near)])


def test_explain_names_the_label_of_anothers_rule(tmp_path):
    policy = loaded(tmp_path, "groups: {50: {devices: [{path: /dev/x, label: player}]}}\n").policy
    change = explain(policy, subject("", 5, [51]), parse_asked("/dev/x", "ro"), "u").change
    assert change.startswith("make u a member: `usermod -aG 50 u`")
    assert change.endswith(", and have the program confined with the label player")


def fdbroker(*words):
    return subprocess.run([sys.executable, "-m", "fdbroker", *words], capture_output=True, text=True, check=False)


def test_the_command_takes_a_label(tmp_path):
    loaded(tmp_path, POLICY)
    words = ("policy", "explain", "--policy", str(tmp_path / "policy.yaml"), "--user", "5", "--json", "/dev/x")
    (one,) = json.loads(fdbroker(*words, "--label", "player (enforce)").stdout)
    assert (one["decision"], one["label"]) == ("allow", "player (enforce)")
    (one,) = json.loads(fdbroker(*words).stdout)
    assert (one["decision"], one["label"]) == ("deny", None)
