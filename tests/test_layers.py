"""The layers of the package: one table, and every import judged by it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fdbroker

PACKAGE = Path(fdbroker.__file__).parent

# A module may import its own package and those of lower rank; packages of one rank never import each other.
RANKS = {
    "__init__": 0,
    "terms": 0,
    "topics": 0,
    "refusals": 0,
    "limits": 0,
    "errors": 1,
    "offers": 1,
    "typed": 1,
    "bucket": 1,
    "pace": 1,
    "wire": 2,
    "policy": 2,
    "kernel": 3,
    "nodes": 4,
    "renewal": 4,
    "opener": 5,
    "keeper": 5,
    "inbox": 5,
    "launcher": 5,
    "namespaces": 5,
    "witness": 5,
    "refuser": 5,
    "client": 5,
    "aio": 6,
    "bridges": 6,
    "cli": 6,
    "__main__": 7,
}
# What wire and policy may use of the standard library: nothing that does I/O, but for files and names, whose job it is.
IMPURE = {"os", "socket", "time", "subprocess", "select", "ctypes", "fcntl", "threading", "asyncio", "random"}
ALLOWED_IMPURE = {"policy/files.py", "policy/names.py"}
MODULES = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))


def _imports(path: Path):
    """(module, whether at the top level) of every import."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    for item in ast.walk(tree):
        if isinstance(item, ast.Import):
            for name in item.names:
                yield name.name, id(item) in top
        elif isinstance(item, ast.ImportFrom):
            assert item.level == 0, "imports are absolute"
            yield item.module, id(item) in top
            if item.module == "fdbroker":
                for name in item.names:
                    yield f"fdbroker.{name.name}", id(item) in top


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downwards_only(module):
    unit = module.split("/")[0].removesuffix(".py")
    for name, at_top in _imports(PACKAGE / module):
        parts = name.split(".")
        if parts[0] == "fdbroker" and len(parts) > 1 and parts[1] in RANKS and parts[1] != unit:
            if unit == "__init__":
                continue  # the entry points load the client when they are called, or for types only
            if unit == "cli" and not at_top:
                continue
            assert RANKS[parts[1]] < RANKS[unit], f"{module} imports {name}"


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith(("wire/", "policy/"))])
def test_wire_and_policy_do_no_io(module):
    if module in ALLOWED_IMPURE:
        return
    names = {name.split(".")[0] for name, _ in _imports(PACKAGE / module)}
    assert not names & IMPURE


def test_yaml_is_loaded_by_load_alone_and_ctypes_by_the_kernel_alone():
    for module in MODULES:
        names = {name.split(".")[0] for name, _ in _imports(PACKAGE / module)}
        if "yaml" in names:
            assert module == "policy/load.py"
        if "ctypes" in names:
            assert module.startswith("kernel/")
        if "pyseccomp" in names:
            assert module == "kernel/seccomp.py"
        if "fdbroker.kernel.seccomp" in {name for name, _ in _imports(PACKAGE / module)}:
            assert module == "launcher/filters.py"
        if names & {"click", "rich"}:
            assert module.startswith("cli/")


def test_every_module_says_where_it_runs_and_no_file_grows_out_of_hand():
    for module in MODULES:
        text = (PACKAGE / module).read_text()
        doc = ast.get_docstring(ast.parse(text))
        assert doc, module
        if "/" in module and not module.endswith("__init__.py"):
            assert "Runs in:" in doc or "Pure:" in doc, module
        assert len(text.splitlines()) <= 450, module


def _says_where_a_line_ends(call: ast.Call) -> bool:
    """Whether a call of `open` reads bytes, or has a newline alone end a line."""
    mode = call.args[1] if len(call.args) > 1 else None
    binary = isinstance(mode, ast.Constant) and "b" in str(mode.value)
    return binary or any(one.arg == "newline" for one in call.keywords)


@pytest.mark.parametrize("module", MODULES)
def test_a_newline_alone_ends_a_line(module):
    """What others choose, such as the name of a process or the path of a mount, may have a carriage return in it."""
    calls = [one for one in ast.walk(ast.parse((PACKAGE / module).read_text())) if isinstance(one, ast.Call)]
    assert all(
        _says_where_a_line_ends(one) for one in calls if isinstance(one.func, ast.Name) and one.func.id == "open"
    )
    named = {one.func.attr: one for one in calls if isinstance(one.func, ast.Attribute)}
    for name in ("read_text", "splitlines", "readlines"):
        assert name not in named, (
            f"{module}:{named[name].lineno}: {name} takes more for the end of a line than a newline"
        )
