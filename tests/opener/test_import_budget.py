"""Every import of the opener is attack surface: it loads what stands here and nothing else.

Measured in the processes as they ship: a broker with a policy that uses all of it runs, and serves; its launcher starts
the children by the very commands, but for `-X importtime`, by which Python itself writes down each module.
"""

from __future__ import annotations

import ast
import importlib.util
import io
import re
import sys
import tokenize
from pathlib import Path

import pytest
from harness import MEM, Raw, folder, need_root, node, outcome, private_dev, running

# Third parties, and what a root helper has no business with.
FORBIDDEN = {
    *("yaml", "msgspec", "click", "rich", "pyseccomp", "asyncio", "subprocess", "logging", "inspect", "dataclasses"),
    *("ssl", "http", "email", "urllib.request", "pickle", "tempfile", "shutil", "pwd", "grp"),
    *("multiprocessing", "concurrent", "importlib.metadata", "importlib.resources", "sqlite3", "xml", "readline"),
    *("site", "sysconfig", "runpy", "pkgutil", "zipfile"),
}
THIRD_PARTY = {"prctl", "_prctl"}
OURS = {
    "fdbroker",
    *(
        f"fdbroker.{name}"
        for name in (
            "terms",
            "refusals",
            "limits",
            "limits.opener",
            "bucket",
            "wire",
            "policy",
            "kernel",
            "nodes",
            "nodes.find",
            "opener",
        )
    ),
    *(
        f"fdbroker.wire.{name}"
        for name in ("admin", "audit", "codec", "journal", "keeper", "link", "resources", "connections", "worker")
    ),
    *(f"fdbroker.policy.{name}" for name in ("compiled", "decide", "fit", "labels", "owners", "paths", "views")),
    *(
        f"fdbroker.kernel.{name}"
        for name in (
            *("capabilities", "confine", "landlock", "libc", "link", "memfd", "openat", "orders"),
            *("jobs", "processes", "records", "refusal", "sockets"),
        )
    ),
    *(
        f"fdbroker.opener.{name}"
        for name in (
            "__main__",
            "accept",
            "ask",
            "audit",
            "authorize",
            "close",
            "door",
            "identify",
            "open",
            "request",
            "send",
            "service",
            "views",
        )
    ),
}


# Lines of our code in the opener, without blanks, comments and docstrings. The design asks for 1,500, which takes a keeper
# for what is no part of a request; what is added before that takes something else out.
LINES = 3_636
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


# everything that a policy can have opener, inbox and worker do
POLICY = """
version: 1
everyone:
  devices:
    - {path: "/dev/lab/zero*", access: rw, class: mem, device: "1:5"}
  namespaces: [{type: net, name: "vpn-*"}, {type: [net, uts], of: caller}, {type: net, create: true}]
  sockets: [{namespace: "vpn-*", bind: [443]}]
  send: [lab]
  subscribe: [lab]
groups: {50001: {devices: [{path: /dev/lab/null, class: mem, device: "1:3", membership: nss}]}}
deny: [{users: [50002], devices: ["/dev/lab/*"]}]
topics: {lab: {deliver: [journal, subscribers, queue], keep: 1h}}
"""
# The launcher, with a file of its own for what each child writes to standard error.
TELLING = """
import subprocess, sys, types
from fdbroker.cli import main
from fdbroker.launcher import start
def popen(command, **more):
    name = command[-2].rpartition("from fdbroker.")[2].partition(".")[0]
    with open(f"{sys.argv[3]}.{name}", "wb") as log:
        return subprocess.Popen([command[0], "-X", "importtime", *command[1:]], **{**more, "stderr": log})
same = {name: getattr(subprocess, name) for name in ("DEVNULL", "TimeoutExpired")}
start.subprocess = types.SimpleNamespace(Popen=popen, **same)
sys.exit(main())
"""


@pytest.fixture(scope="module")
def loaded():
    """The modules of each child, from its first instruction to its end."""
    need_root()
    found = {}
    with (
        private_dev(),
        folder() as state,
        running(POLICY, "--state", f"{state}/mail", program=("-c", TELLING)) as broker,
    ):
        node("/dev/lab/zero", MEM["zero"])
        with Raw(broker.socket) as client:
            assert outcome(client.open("/dev/lab/zero")) == "granted"
            assert outcome(client.ask({"namespace": {"type": "net", "create": True}})) in ("granted", "OpenFailed")
            assert outcome(client.call("io.fdbroker.Inbox.Send", {"topic": "lab", "payload": "eA=="})) == "granted"
        assert broker.stop() == 0
        for name in ("opener", "keeper", "inbox", "namespaces"):
            lines = (broker.folder / f"policy.yaml.{name}").read_text().splitlines()
            names = [line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")]
            assert names.pop(0) == "imported package"  # the head of the table
            found[name] = set(names)
    return found


def test_a_forbidden_name_is_one_of_a_module():
    """A name that nothing has is forbidden in vain."""
    assert not [name for name in FORBIDDEN if importlib.util.find_spec(name) is None]


def test_the_opener_loads_only_what_it_needs(loaded):
    opener = loaded["opener"]
    assert {name for name in opener if name.split(".")[0] == "fdbroker"} == OURS
    assert not {name for name in opener if name in FORBIDDEN or name.split(".")[0] in FORBIDDEN}
    others = opener - OURS
    assert {name for name in others if name.split(".")[0] not in sys.stdlib_module_names} == THIRD_PARTY
    assert len(others) <= 76, sorted(others)  # with those that the interpreter itself starts with


def test_the_inbox_loads_msgspec_and_what_judges_by_a_policy_and_nothing_that_could_start_something(loaded):
    inbox = loaded["inbox"]
    assert "msgspec" in inbox
    assert not inbox & {"yaml", "subprocess", "asyncio", "pwd", "grp", "click", "pyseccomp", "site", "runpy"}
    assert not {name for name in inbox if name.startswith(("fdbroker.opener", "fdbroker.launcher", "fdbroker.keeper"))}
    names = ("compiled", "decide", "labels", "literals", "messages", "owners", "paths", "views")
    judges = {f"fdbroker.policy.{name}" for name in names}
    assert {name for name in inbox if name.startswith("fdbroker.policy.")} == judges


def test_the_keeper_loads_what_finds_and_judges_and_nothing_that_opens_or_starts_something(loaded):
    """It has no capability, and nothing that raises one: it gives all up as every process does."""
    keeper = loaded["keeper"]
    others = {name for name in keeper if name.split(".")[0] not in {*sys.stdlib_module_names, "fdbroker"}}
    assert others == THIRD_PARTY
    assert not {name for name in keeper if name in FORBIDDEN or name.split(".")[0] in FORBIDDEN}
    elsewhere = ("fdbroker.opener", "fdbroker.inbox", "fdbroker.launcher", "fdbroker.namespaces", "fdbroker.cli")
    assert not {name for name in keeper if name.startswith(elsewhere)}
    ours = {name for name in keeper if name.startswith("fdbroker.")}
    using = {name for name in ours if re.search(r"\b(prctl|capabilities|CAPSET|Bracket)\b", _code(_source(name)))}
    assert using == {f"fdbroker.kernel.{name}" for name in ("capabilities", "confine", "libc")}


def test_the_namespaces_worker_loads_no_third_party_but_prctl(loaded):
    worker = loaded["namespaces"]
    others = {name for name in worker if name.split(".")[0] not in {*sys.stdlib_module_names, "fdbroker"}}
    assert others == THIRD_PARTY
    assert not worker & {"subprocess", "asyncio", "pwd", "grp", "site", "runpy"}


def _source(module):
    return Path(importlib.util.find_spec(module).origin).read_text()


def _code(source):
    """Without comments and strings."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return " ".join(one.string for one in tokens if one.type not in (tokenize.COMMENT, tokenize.STRING))


def _lines_of_code(source):
    """How many lines hold code: a docstring is none, and neither is any other string that stands alone."""
    tree = ast.parse(source)
    told = [item for item in ast.walk(tree) if isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant)]
    alone = {line for item in told for line in range(item.lineno, item.end_lineno + 1)}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    code = {line for one in tokens if one.type not in NO_CODE for line in range(one.start[0], one.end[0] + 1)}
    return len(code - alone)


def test_lines_of_code_are_counted_as_they_should_be():
    source = '"""Doc\nstring."""\n\n# comment\nx = (\n    1,  # one\n)\n\n\ndef f():\n    """Doc."""\n    return x\n'
    assert _lines_of_code(source) == 5


def test_the_code_in_the_opener_does_not_grow(loaded):
    """Run with -s for the table of its modules."""
    ours = sorted(name for name in loaded["opener"] if name.split(".")[0] == "fdbroker")
    counts = {name: _lines_of_code(_source(name)) for name in ours}
    print(*(f"{count:6} {name}" for name, count in sorted(counts.items(), key=lambda one: -one[1])), sep="\n")
    print(f"{sum(counts.values()):6} in {len(counts)} modules")
    assert sum(counts.values()) <= LINES


def _used(trees):
    """All names that something is called or taken by, and those among them behind a dot."""
    items = [item for tree in trees for item in ast.walk(tree)]
    attributes = {item.attr for item in items if isinstance(item, ast.Attribute)}
    return attributes | {item.id for item in items if isinstance(item, ast.Name)}, attributes


def test_the_opener_loads_no_function_that_nothing_in_it_uses(loaded):
    """What only other processes call stands in modules that only these load."""
    trees = [ast.parse(_source(name)) for name in loaded["opener"] if name.split(".")[0] == "fdbroker"]
    names, attributes = _used(trees)
    unused = set()
    for tree in trees:
        methods = {
            f"{one.name}.{item.name}": item.name
            for one in ast.walk(tree)
            if isinstance(one, ast.ClassDef)
            for item in one.body
            if isinstance(item, ast.FunctionDef)
        }
        unused |= {name for name, method in methods.items() if method not in attributes and not method.startswith("__")}
        functions = {item.name for item in tree.body if isinstance(item, ast.FunctionDef | ast.ClassDef)}
        unused |= {name for name in functions if name not in names}
    assert unused == {"main"}  # of which the launcher's command line says the name
