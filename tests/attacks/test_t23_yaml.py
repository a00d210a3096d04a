"""T23: what YAML makes of what an admin wrote."""

from __future__ import annotations

import signal
import time

import pytest
from harness import EVERYONE_NULL, ask, running

from fdbroker.errors import PolicyError
from fdbroker.policy.compile import load_policy


def _load(tmp_path, text):
    path = tmp_path / "policy.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_policy(str(path), trusted=False).policy


@pytest.mark.parametrize("number", ["13:32", "116:33", "13:64", "1:3", "10:8", '"116:*"'])
def test_a_device_number_stays_what_was_written(tmp_path, number):
    policy = _load(tmp_path, f"version: 1\neveryone: {{devices: [{{path: /dev/x, device: {number}}}]}}\n")
    assert policy.everyone[0].device == number.strip('"')


@pytest.mark.parametrize(
    "number", ["010:08", "1", '"1:"', '":1"', "1:3:5", "-1:3", "99999999999:3", "a:b", '"1:3\\n"', "0x1:3"]
)
def test_a_device_number_that_could_never_match_is_an_error(tmp_path, number):
    with pytest.raises(PolicyError, match="MAJOR:MINOR"):
        _load(tmp_path, f"version: 1\neveryone: {{devices: [{{path: /dev/x, device: {number}}}]}}\n")


@pytest.mark.parametrize(
    "name",
    ['"a\\0b"', '"\\ud800"', '"\\UFFFFFFFF"', '"\\U00110000"', '"\\x1b[31m"', "4294967295", "65534", "99999999999"],
)
def test_names_that_nobody_has_are_errors_never_faults(tmp_path, name):
    with pytest.raises(PolicyError) as caught:
        _load(tmp_path, f"version: 1\nusers: {{{name}: {{devices: [{{path: /dev/x}}]}}}}\n")
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("word", ["no", "yes", "on", "off", "True", "FALSE", "0", "1", '"true"x', "~", "null", ""])
def test_a_flag_is_true_or_false_and_nothing_else(tmp_path, word):
    with pytest.raises(PolicyError) as caught:
        _load(tmp_path, f"version: 1\neveryone:\n  devices:\n    - path: /dev/x\n      dangerous: {word}\n")
    assert ":5:" in str(caught.value)


@pytest.mark.parametrize(
    "text", ["0660", "08", "1_000", "0x10", "1e3", "+5", " -1", "1.0", "18446744073709551616", "٣"]
)
def test_a_number_is_decimal(tmp_path, text):
    with pytest.raises(PolicyError, match="a number from"):
        _load(tmp_path, f"version: 1\nlimits: {{connections: {text}}}\n")


def test_a_group_named_no_stays_a_name(tmp_path):
    with pytest.raises(PolicyError, match="unknown group 'no'"):
        _load(tmp_path, "version: 1\ngroups: {no: {devices: [{path: /dev/x}]}}\n")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("version: 1\nversion: 1\n", "2:1: the key 'version' for the second time"),
        ("version: 1\nlimits: {burst: 1, burst: 2}\n", "the key 'burst' for the second time"),
        ("version: 1\n---\nversion: 1\n", "a second document"),
        ("version: 1\nlimits: &x {burst: 1}\n", "the anchor &x"),
        ("version: 1\neveryone: *x\n", "the alias *x"),
        ("version: !!int 1\n", "the tag"),
        ("version: 1\n\tlimits: {}\n", "2:1: a tab"),
        ("version: 1\nlimits:\t{}\n", "a tab"),
        ("", "is empty"),
        ("# nothing\n", "is empty"),
        ("[]\n", "a mapping"),
        ("version\n", "a mapping"),
        ("? [a]\n: b\n", "a key of"),
        ("version: 1\n<<: {limits: {burst: 1}}\n", "unknown key '<<'"),
        ("version: 1\nlimits: {burst: [}\n", "not YAML"),
        (b"\xef\xbb\xbfversion: 1\nx: \x00\n", "2:4: the character U+0000"),
        (b"version: 1\n# \x1e\x0c\x0b\xe2\x80\xa8\n\tx: 1\n", "3:1: a tab"),
        (b"version: 1 # \xff\n", "1:14: is not UTF-8"),
        ("version: 2\n", "expected 1, found"),
        ("limits: {burst: 1}\n", "a policy without version"),
    ],
)
def test_surprises_are_errors_with_their_place(tmp_path, text, what):
    with pytest.raises(PolicyError) as caught:
        _load(tmp_path, text)
    assert what in str(caught.value)


def test_an_alias_bomb_and_a_deep_nest_end_at_once(tmp_path):
    bomb = "version: 1\na: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(20)
    )
    for text in (bomb, "version: 1\nx: " + "[" * 5000, "version: 1\nx: " + "{a: " * 5000, "- " * 5000):
        began = time.process_time()
        with pytest.raises(PolicyError):
            _load(tmp_path, text)
        assert time.process_time() - began < 20


def test_ten_megabytes_are_refused_unread(tmp_path):
    with pytest.raises(PolicyError, match="is too large"):
        _load(tmp_path, b"# " + b"x" * 10_000_000)


def test_every_error_of_every_file_is_reported_at_once(tmp_path):
    (tmp_path / "policy.d").mkdir()
    (tmp_path / "policy.d" / "a.yaml").write_text("version: 1\nusrs: {}\n")
    (tmp_path / "policy.d" / "b.yaml").write_text("version: [\n")
    with pytest.raises(PolicyError) as caught:
        _load(tmp_path, "version: 1\ngroups: {nogroupofthisname: {devices: [{path: x}]}}\nlimits: {burst: none}\n")
    places = [(finding.file.rpartition("/")[2], finding.line) for finding in caught.value.findings]
    assert places == [("a.yaml", 2), ("b.yaml", 2), ("policy.yaml", 2), ("policy.yaml", 2), ("policy.yaml", 3)]


def test_a_running_service_takes_none_of_it_and_serves_meanwhile(dev):
    bomb = "version: 1\na: &a [x,x,x]\nb: [*a,*a]\n"
    texts = ("version: 1\nversion: 1\n", bomb, "version: 1\nx: " + "[" * 5000, "# " + "x" * 10_000_000, "a: no\n", "")
    with running(EVERYONE_NULL) as broker:
        for count, text in enumerate(texts, 1):
            broker.policy.write_text(text)
            broker.process.send_signal(signal.SIGHUP)
            end = time.monotonic() + 60
            while broker.text().count("NOT reloaded") < count:
                assert time.monotonic() < end, text[:100]
                assert ask(broker.socket, "/dev/null") == "granted"
        assert "Traceback" not in broker.text()
