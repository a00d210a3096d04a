"""Invariants, over what hypothesis thinks of."""

from __future__ import annotations

import contextlib
import fnmatch
import itertools
import json
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from fdbroker.errors import FdbrokerError, LinkViolation, ProtocolViolation
from fdbroker.inbox import dispatch
from fdbroker.inbox.rights import message_rights, rights_by
from fdbroker.limits import every as limits
from fdbroker.opener.views import views as views_of
from fdbroker.policy import labels
from fdbroker.policy.compiled import Policy, to_bytes
from fdbroker.policy.decide import decide, view
from fdbroker.policy.fit import is_dangerous
from fdbroker.policy.globs import dangerous_name
from fdbroker.policy.load import parse
from fdbroker.policy.messages import from_bytes, message_view, messages
from fdbroker.policy.paths import is_device_path, matcher
from fdbroker.policy.spelling import glob_error, label_glob_error
from fdbroker.terms import NAMESPACE_TYPES, DenyRule, Device, DeviceRule, NamespaceRule, SocketRule, Subject, Uplink
from fdbroker.topics import TOPIC_VERBS, Messages, Topic, TopicRule, User
from fdbroker.wire import keeper, link, lists, varlink
from fdbroker.wire.frame import FrameReader
from fdbroker.wire.journal import encode_fields, escaped
from fdbroker.wire.launcher import INBOX_TO_LAUNCHER, KEEPER_TO_LAUNCHER, LAUNCHER_TO_KEEPER

NAME = st.text("abc*?[]-!x1", min_size=1, max_size=8)
PATHS = st.lists(
    st.sampled_from(["a", "ab", "b", "abc", "x1", "..", ".", "", "tty0", "mem"]), min_size=1, max_size=3
).map(lambda names: "/dev/" + "/".join(names))
IDS = st.sampled_from([0, 1, 2, 3, 65534, 0xFFFFFFFF])
RANGES = st.tuples(IDS, IDS).map(sorted).map(tuple)  # of uids: the first and the last


@given(st.binary(max_size=200))
def test_whatever_a_link_says_is_a_message_or_a_violation(data):
    for table in (
        link.INBOX_TO_OPENER,
        link.OPENER_TO_INBOX,
        link.LAUNCHER_TO_OPENER,
        link.OPENER_TO_LAUNCHER,
        INBOX_TO_LAUNCHER,
        lists.INBOX_TO_KEEPER,
        lists.KEEPER_TO_INBOX,
        keeper.OPENER_TO_KEEPER,
        LAUNCHER_TO_KEEPER,
        KEEPER_TO_LAUNCHER,
    ):
        with contextlib.suppress(LinkViolation):
            table.decode(data)


@given(st.sampled_from(sorted(link.INBOX_TO_OPENER.kinds)), st.binary(max_size=300))
def test_whatever_follows_a_known_type_is_a_message_or_a_violation(kind, rest):
    try:
        message = link.INBOX_TO_OPENER.decode(bytes([kind]) + rest)
    except LinkViolation:
        return
    if isinstance(message, link.Open):
        assert link.INBOX_TO_OPENER.encode(link.Open(message.connection, message.resources)) == bytes([kind]) + rest


@given(st.binary(max_size=300))
def test_whatever_a_client_says_is_answered_or_ends_the_connection(data):
    try:
        action = dispatch.dispatch_varlink(data)
    except ProtocolViolation:
        return
    assert isinstance(action, dispatch.Answer | dispatch.AskOpen | dispatch.AskList)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)


@given(
    st.sampled_from(
        ["io.fdbroker.Broker.Open", "io.fdbroker.Broker.List", "org.varlink.service.GetInterfaceDescription", "x"]
    ),
    JSON,
    JSON,
)
def test_whatever_the_parameters_are_the_answer_is_varlink(method, parameters, resource):
    for value in (
        parameters,
        {"resources": parameters},
        {"resources": [resource]},
        {"resources": [{"device": resource}]},
    ):
        try:
            action = dispatch.dispatch_varlink(json.dumps({"method": method, "parameters": value}).encode())
        except ProtocolViolation:
            continue
        if isinstance(action, dispatch.AskOpen):
            for one in action.resources:
                assert isinstance(one.text, str)
                assert one.access in ("ro", "wo", "rw")
            link.INBOX_TO_OPENER.decode(link.INBOX_TO_OPENER.encode(link.Open(1, action.resources)))
        elif isinstance(action, dispatch.Answer):
            varlink.decode_reply(action.data[:-1])


@given(st.lists(st.binary(max_size=50), max_size=6), st.data())
def test_readers_do_not_care_how_the_bytes_are_cut(payloads, data):
    for reader, encoded in (
        (FrameReader(), b"".join(len(one).to_bytes(4, "big") + one for one in payloads)),
        (varlink.VarlinkReader(), b"".join(one.replace(b"\0", b"") + b"\0" for one in payloads)),
    ):
        got = []
        while encoded:
            size = data.draw(st.integers(1, len(encoded)))
            reader.feed(encoded[:size])
            encoded = encoded[size:]
            while (message := reader.next_message()) is not None:
                got.append(message)
        wanted = payloads if isinstance(reader, FrameReader) else [one.replace(b"\0", b"") for one in payloads]
        assert got == wanted


@given(st.lists(NAME, min_size=1, max_size=3), PATHS)
def test_globs_match_as_shells_do_name_by_name(names, path):
    pattern = "/dev/" + "/".join(names)
    if glob_error(pattern):
        return
    wanted = pattern.count("/") == path.count("/") and all(
        fnmatch.fnmatchcase(have, want) for want, have in zip(pattern.split("/"), path.split("/"), strict=True)
    )
    assert bool(matcher(pattern).fullmatch(path)) == wanted


@given(
    NAME,
    st.sampled_from(["mem", "tty0", "ttyUSB3", "sda", "nvme0n1", "pts", "stdin", "loop-control", "watchdog0", "kmsg"]),
)
def test_a_pattern_that_can_match_a_dangerous_name_is_called_dangerous(name, dangerous):
    pattern = f"/dev/{name}"
    if (
        not glob_error(pattern)
        and matcher(pattern).fullmatch(f"/dev/{dangerous}")
        and is_dangerous(f"/dev/{dangerous}")
    ):
        assert dangerous_name(pattern)


def test_matching_takes_linear_time_whatever_is_asked():
    pattern = matcher("/dev/" + "*a" * 20 + "b")
    began = time.process_time()
    for _ in range(20):
        assert not pattern.fullmatch("/dev/" + "a" * 250)
    assert time.process_time() - began < 5


LABELS = st.sampled_from(
    ["", "a (enforce)", "a (complain)", "a//b (enforce)", "b//&a (kill)", ":n:a (enforce)", "unconfined"]
)
GLOBS = st.sampled_from([(), (), ("a",), ("b", "a//*"), ("*",)])
RULES = st.builds(
    DeviceRule,
    st.sampled_from(["/dev/a", "/dev/*", "/dev/*/*", "/dev/a*", "/dev/[ab]"]),
    st.sampled_from(["ro", "wo", "rw"]),
    st.sampled_from(["", "mem"]),
    st.just(""),
    st.booleans(),
    st.just("somebody"),
    st.sampled_from(["f:1", "f:2"]),
    GLOBS,
)
NAMES = st.sampled_from(["a", "b", "a*", "*"])
OTHER_RULES = st.one_of(
    st.builds(
        NamespaceRule,
        st.lists(st.sampled_from(NAMESPACE_TYPES), min_size=1, max_size=3).map(tuple),
        st.one_of(st.just(""), NAMES),
        st.booleans(),
        st.booleans(),
        st.one_of(st.none(), st.just(Uplink("br0", "10.0.0.0/24", isolated=True))),
        st.just("somebody"),
        st.just("f:4"),
        GLOBS,
    ),
    st.builds(
        SocketRule,
        NAMES,
        st.sampled_from([("inet",), ("inet", "inet6")]),
        st.sampled_from([("stream",), ("stream", "dgram")]),
        st.sampled_from([(), (443,)]),
        st.just("somebody"),
        st.just("f:5"),
        GLOBS,
    ),
)
ANY_RULES = st.one_of(RULES, OTHER_RULES)
DENY_RULES = st.builds(
    DenyRule,
    st.lists(st.sampled_from(["/dev/a", "/dev/*"]), min_size=1, max_size=2).map(tuple),
    st.lists(OTHER_RULES, max_size=2).map(tuple),
    st.frozensets(IDS),
    st.frozensets(IDS),
    st.booleans(),
    st.just("x"),
    st.just("f:3"),
    GLOBS,
    st.lists(RANGES, max_size=2).map(tuple),
)
TOPIC_RULES = st.lists(
    st.builds(TopicRule, st.sampled_from(TOPIC_VERBS), NAMES, st.just("x"), st.just("f:6"), GLOBS), max_size=2
).map(tuple)
MESSAGES = st.builds(
    Messages,
    st.just((Topic("a", ("subscribers",), 100), Topic("b", ("queue",), 100, 60))),
    st.just((User(7, "bob", frozenset({1})),)),
    st.dictionaries(IDS, TOPIC_RULES, max_size=3),
    st.dictionaries(IDS, TOPIC_RULES, max_size=3),
    TOPIC_RULES,
)


def _named(policy):
    """As it is compiled: who has rules for topics alone is named among the others, too."""
    said = policy.messages
    by_uid = {**dict.fromkeys(said.by_uid, ()), **policy.by_uid}
    return policy._replace(by_uid=by_uid, by_gid={**dict.fromkeys(said.by_gid, ()), **policy.by_gid})


POLICIES = st.builds(
    Policy,
    st.frozensets(IDS),
    st.frozensets(IDS),
    st.just({"burst": 5}),
    st.dictionaries(IDS, st.lists(ANY_RULES, max_size=3).map(tuple), max_size=3),
    st.dictionaries(IDS, st.lists(ANY_RULES, max_size=3).map(tuple), max_size=3),
    st.lists(ANY_RULES, max_size=2).map(tuple),
    st.lists(DENY_RULES, max_size=2).map(tuple),
    st.dictionaries(IDS, st.just({"burst": 7}), max_size=2),
    st.dictionaries(IDS, st.just({"burst": 9}), max_size=2),
    st.just({}),
    MESSAGES,
).map(_named)
SUBJECTS = st.builds(
    Subject,
    IDS,
    st.frozensets(IDS, max_size=4),
    IDS,
    st.integers(1, 9),
    st.just("x"),
    LABELS,
    st.booleans(),
    st.just(""),
    IDS,
)


def _with_relatives(subject):
    """Gives a subject, and some that differ in one thing."""
    each = [
        st.builds(subject._replace, uid=IDS),
        st.builds(subject._replace, gids=st.frozensets(IDS, max_size=4)),
        st.builds(subject._replace, label=LABELS),
        st.builds(subject._replace, owner=IDS),
        st.builds(subject._replace, foreign=st.booleans()),
        st.builds(subject._replace, session=st.sampled_from(["", "1", "2"])),
        st.builds(subject._replace, pid=st.integers(1, 9)),
    ]
    return st.lists(st.one_of(each), max_size=6).map(lambda others: [subject, *others])


@given(POLICIES)
def test_a_policy_survives_its_way_to_the_opener(policy):
    assert from_bytes(to_bytes(policy)) == policy


def _is_named(deny, subject):
    """Whether a deny rule is for a subject, whatever its label: itself, its owner, a group, or a range of uids."""
    uids = {subject.uid, subject.owner}
    groups = subject.gids - {65534, 0xFFFFFFFF}
    ranged = any(subject.uid in range(first, last + 1) for first, last in deny.ranges)
    return deny.everyone or ranged or bool(uids & deny.uids or groups & deny.gids)


@given(DENY_RULES, SUBJECTS)
def test_a_deny_rule_is_for_those_that_it_names_and_for_nobody_else(deny, subject):
    assert deny.names(subject) == _is_named(deny, subject)


@settings(max_examples=400)
@given(POLICIES, SUBJECTS, PATHS, st.sampled_from(["ro", "wo", "rw"]))
def test_what_is_allowed_is_allowed_by_a_rule_for_that_subject_and_denied_by_none(policy, subject, path, access):
    decision = decide(view(policy, subject), Device(path, access))
    if not decision.rules:
        return
    assert is_device_path(path)
    assert subject.uid not in (65534, 0xFFFFFFFF)
    groups = subject.gids - {65534, 0xFFFFFFFF}
    mine = [*policy.everyone, *policy.by_uid.get(subject.uid, ())]
    for gid in groups:
        mine += policy.by_gid.get(gid, ())
    for rule in decision.rules:
        assert rule in mine
        assert matcher(rule.pattern).fullmatch(path)
        assert rule.access in ("rw", access)
        assert labels.allowing(rule.labels, subject.label)
    for deny in policy.deny:
        concerned = _is_named(deny, subject)
        concerned = concerned and labels.denying(deny.labels, subject.label)
        assert not concerned or not any(matcher(pattern).fullmatch(path) for pattern in deny.patterns)


@settings(max_examples=300)
@given(POLICIES, SUBJECTS.flatmap(_with_relatives))
def test_what_is_made_once_for_many_subjects_is_what_each_would_get(policy, subjects):
    policy = policy._replace(limits={name: limit.default for name, limit in limits.USER_LIMITS.items()})
    views, rights = views_of(policy), rights_by(policy)
    for subject in subjects:
        alone = view(policy, subject)
        assert views.of(subject) == alone
        assert rights.of(subject) == message_rights(message_view(policy, subject), messages(policy).topics)
    for one, other in itertools.combinations(subjects, 2):
        same = view(policy, one) == view(policy, other)
        assert (views.of(one) is views.of(other)) == same


@given(POLICIES, SUBJECTS, PATHS)
def test_fewer_groups_never_allow_more(policy, subject, path):
    without_deny = policy._replace(deny=())
    if decide(view(without_deny, subject._replace(gids=frozenset())), Device(path, "ro")).rules:
        assert decide(view(without_deny, subject), Device(path, "ro")).rules


@given(POLICIES, SUBJECTS, PATHS)
def test_an_unknown_label_never_allows_more_than_a_known_one(policy, subject, path):
    if decide(view(policy, subject._replace(label="")), Device(path, "ro")).rules:
        assert decide(view(policy, subject), Device(path, "ro")).rules


@given(st.lists(st.sampled_from("ab*?/:"), min_size=1, max_size=6).map("".join), LABELS | st.text())
def test_what_a_glob_allows_it_denies_as_well(glob, label):
    if not label_glob_error(glob, allows=True) and labels.allowing((glob,), label):
        assert labels.denying((glob,), label)


@given(st.text())
def test_what_is_escaped_is_printable_and_means_one_thing(text):
    safe = escaped(text)
    assert safe.isprintable()
    if "\\" not in text and text.isprintable():
        assert safe == text


@given(st.dictionaries(st.sampled_from(["MESSAGE", "FDBROKER_RESOURCE", "FDBROKER_UID"]), st.text(), max_size=3))
def test_a_journal_field_never_becomes_two(values):
    data, names = encode_fields(values), []
    while data:
        line, _, rest = data.partition(b"\n")
        name, equals, _ = line.partition(b"=")
        if not equals:
            size = int.from_bytes(rest[:8], "little")
            rest = rest[8 + size + 1 :]
        names.append(name.decode())
        data = rest
    assert names == list(values)


@given(st.text(max_size=200) | st.binary(max_size=200).map(lambda data: data.decode("latin-1")))
def test_whatever_a_policy_file_holds_is_a_tree_or_findings(text):
    findings = []
    try:
        tree = parse("f", text, findings)
    except FdbrokerError:
        return
    assert tree is not None or findings
    for finding in findings:
        assert finding.line >= 0
