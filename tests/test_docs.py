"""The documents say what the code does: what is generated is up to date, what is named exists, what is shown works."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from fdbroker.cli.commands import DEFAULT_STATE, app
from fdbroker.inbox import topics
from fdbroker.limits import every as limits
from fdbroker.policy import names
from fdbroker.policy.compile import load_policy
from fdbroker.policy.schema import json_schema
from fdbroker.policy.tried import failed_tests

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
# a fenced block: its language, then its text
FENCE = re.compile(r"^```([a-z]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# ](target) of a link or picture
LINK = re.compile(r"\]\(([^)\s]+)\)")
# a file of ours, perhaps with the name of a test in it, of a function, a class or a constant
PLACE = re.compile(r"\b((?:fdbroker|tests|units|policy|scripts|docs)/[\w./*-]*\w)(?:::(\w+))?")
# what no reader of the documents has: places of a machine where they were written
ELSEWHERE = re.compile(r"/work/|/tmp/|/home/|/root\b|\.library|\.mirror|/shared/")


def blocks(*languages: str) -> list[tuple[str, str]]:
    """(document, text) of every fenced block in one of these languages."""
    return [
        (path.name, text)
        for path in DOCUMENTS
        for language, text in FENCE.findall(path.read_text())
        if language in languages
    ]


def commands() -> list[tuple[str, list[str]]]:
    """(document, words) of every `fdbroker …` in a block for the shell."""
    found = []
    for document, text in blocks("sh", "console"):
        for line in text.replace("\\\n", " ").splitlines():
            for part in re.split(r"\||&&|;", re.sub(r"'[^']*'|\"[^\"]*\"", "QUOTED", line)):
                words = shlex.split(part.removeprefix("$ "), comments=True)
                while words and (words[0] == "sudo" or "=" in words[0]):
                    words = words[1:]
                if words[:1] == ["fdbroker"]:
                    found.append((document, words[1:]))
    return found


def parse(words: list[str]) -> None:
    """Let click judge the words, without running anything."""
    command: click.Command = app
    context = click.Context(app, info_name="fdbroker")
    while isinstance(command, click.Group):
        assert words, f"{context.command_path} needs a command"
        name, words = words[0], words[1:]
        found = command.get_command(context, name)
        assert found is not None, f"there is no command {context.command_path} {name}"
        command = found
        if isinstance(command, click.Group):
            context = click.Context(command, info_name=name, parent=context)
    command.make_context(command.name, words, parent=context)


@pytest.fixture
def anybody(monkeypatch):
    """Users and groups that this machine lacks have a number all the same."""
    real_uid, real_gid = names.uid_of, names.gid_of

    def uid_of(name):
        return real_uid(name) if real_uid(name) is not None else 40000 + sum(name.encode())

    def gid_of(name):
        return real_gid(name) if real_gid(name) is not None else 40000 + sum(name.encode())

    monkeypatch.setattr(names, "uid_of", uid_of)
    monkeypatch.setattr(names, "gid_of", gid_of)


def test_generated_parts_are_up_to_date():
    result = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "docs"), "--check"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_every_generated_part_stands_somewhere():
    text = "".join(path.read_text() for path in DOCUMENTS)
    script = (ROOT / "scripts" / "docs").read_text()
    made = set(re.findall(r'^    "([a-z-]+)": _\w+,$', script, re.MULTILINE))
    speed = (ROOT / "scripts/bench.d/tables.py").read_text()
    measured = {f"bench-{name}" for name in re.findall(r'^    "([a-z]+)": _\w+,$', speed, re.MULTILINE)}
    assert made
    assert measured
    made |= measured
    assert made == set(re.findall(r"<!-- generated: ([a-z-]+) -->", text))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(path):
    for target in LINK.findall(path.read_text()):
        if "://" not in target:
            assert (path.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_and_test_that_is_named_exists(path):
    text = re.sub(r"(?:[\w.]*/)+fdbroker(?:/[\w.]+)*", "", path.read_text())  # /etc/fdbroker/policy.yaml is not ours
    for name, test in PLACE.findall(text):
        if "." in name or name.startswith(("fdbroker/", "scripts/", "tests/")):
            found = list(ROOT.glob(name))
            assert found, name
            if test:
                made = rf"^ *(?:def|class) {test}\b|^{test}\b"
                assert re.search(made, found[0].read_text(), re.MULTILINE), f"{name} has no {test}"


def test_every_threat_has_its_row_and_every_attack_its_threat():
    text = (ROOT / "SECURITY.md").read_text()
    rows = {int(number): row for number, row in re.findall(r"^\| T(\d+) (\|.*)$", text, re.MULTILINE)}
    assert list(rows) == sorted(rows)
    assert len(rows) >= 25
    for path in (ROOT / "tests" / "attacks").glob("test_t*.py"):
        number = int(re.match(r"test_t(\d+)_", path.name)[1])
        assert f"`tests/attacks/{path.name}`" in rows[number]
    for mutation in json.loads((ROOT / "tests" / "attacks" / "mutations.json").read_text()):
        assert int(mutation["threat"][1:]) in rows, mutation
    for number, row in rows.items():
        assert "`tests/" in row or "in this version" in row, number


def test_a_real_policy_block_is_among_the_documents():
    assert sum(text.startswith("version: 1") for _, text in blocks("yaml")) >= 4


@pytest.mark.parametrize(("document", "text"), [one for one in blocks("yaml") if one[1].startswith("version: 1")])
def test_every_policy_that_is_shown_loads_and_passes_its_tests(anybody, tmp_path, document, text):
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    assert failed_tests(load_policy(str(path), trusted=False)) == []


@pytest.mark.parametrize("path", sorted((ROOT / "policy").rglob("*.yaml")), ids=lambda path: path.name)
def test_every_policy_that_is_shipped_loads_and_passes_its_tests(anybody, tmp_path, path):
    alone = tmp_path / path.name
    alone.write_text(path.read_text())
    loaded = load_policy(str(alone), trusted=False)
    assert failed_tests(loaded) == []
    if path.parent.name == "examples":
        assert len(loaded.tests) >= 4


def test_the_schema_is_the_loaders():
    assert json.loads((ROOT / "policy" / "schema.json").read_text()) == json_schema()
    result = subprocess.run(
        [sys.executable, "-m", "fdbroker", "policy", "schema"], capture_output=True, text=True, check=True, cwd="/"
    )
    assert result.stdout == (ROOT / "policy" / "schema.json").read_text()


def test_every_command_that_is_shown_exists():
    shown = commands()
    assert {words[0] for _, words in shown} >= {"serve", "open", "list", "policy"}
    for document, words in shown:
        try:
            parse(words)
        except click.UsageError as error:
            pytest.fail(f"{document}: fdbroker {' '.join(words)}: {error.format_message()}")


@pytest.mark.parametrize("words", ["frobnicate", "open --force /dev/null", "policy explain", "serve --policy"])
def test_a_command_that_does_not_exist_would_be_noticed(words):
    with pytest.raises((AssertionError, click.UsageError)):
        parse(words.split())


@pytest.mark.parametrize(("document", "text"), blocks("python"))
def test_python_that_is_shown_is_python_and_calls_what_exists(document, text):
    import fdbroker
    import fdbroker.aio
    from fdbroker.client import aio, descriptor, sync

    known = {name for kind in (sync.Client, aio.Client, descriptor.Descriptor) for name in dir(kind)}
    known |= set(vars(descriptor.Descriptor(-1, "", "", "", ""))) | set(dir(fdbroker)) | set(dir(fdbroker.aio))
    ours = {"fdbroker", "broker", "client", "device", "keyboard"}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ours:
            assert node.attr in known, f"{document}: {node.value.id}.{node.attr}"


def test_the_manual_page_knows_every_command_and_option():
    manual = (ROOT / "docs" / "fdbroker.8").read_text().replace("\\-", "-")

    def check(command, path):
        if isinstance(command, click.Group):
            for name, one in command.commands.items():
                check(one, f"{path} {name}")
            return
        assert f".SS {path}\n" in manual
        for option in command.params:
            if isinstance(option, click.Option):
                assert f".B {option.opts[0]}" in manual, f"{path} {option.opts[0]}"

    check(app, "fdbroker")


@pytest.mark.parametrize(
    "path", [*DOCUMENTS, ROOT / "docs" / "fdbroker.8", ROOT / "LICENSE"], ids=lambda path: path.name
)
def test_no_document_names_the_machine_where_it_was_written(path):
    text = path.read_text()
    if path.name == "policy.md":
        text = text.replace("such as `/tmp`", "")
    assert not ELSEWHERE.findall(text)
    assert str(ROOT) not in text


def test_what_the_documents_say_of_messages_is_what_the_code_has():
    """Numbers and names that stand in sentences, and so twice."""
    protocol, operating = ((ROOT / "docs" / name).read_text() for name in ("protocol.md", "operating.md"))
    for text in (
        f"Up to {limits.DESCRIPTORS_PER_MESSAGE} descriptors",
        f"{limits.ATTACHED_BYTES >> 20} MiB where the policy",
        f"at most {limits.SUBSCRIBER_MESSAGES:,} messages and {limits.SUBSCRIBER_BYTES >> 20} MiB",
    ):
        assert text in protocol
    assert f"up to {limits.ATTACHED_BYTES >> 20} MiB without a copy" in (ROOT / "README.md").read_text()
    for number in (topics.MESSAGE_ID, topics.STORE_MESSAGE_ID):
        assert f"MESSAGE_ID={number}" in operating
    assert topics.MESSAGE_ID != topics.STORE_MESSAGE_ID
    folder = DEFAULT_STATE
    assert f"ReadWritePaths=-{folder}\n" in (ROOT / "units/fdbroker.service").read_text()
    assert re.search(
        rf"^d {folder} +0700 fdbroker-inbox ", (ROOT / "units/tmpfiles.d/fdbroker.conf").read_text(), re.MULTILINE
    )
    assert f"`{folder}/messages.sqlite`" in operating
