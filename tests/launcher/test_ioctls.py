"""The table of ioctls is what the filters let through, and what the code of each process makes."""

from __future__ import annotations

import ast
import errno
import fcntl
import importlib
import json
import os
from pathlib import Path

import pytest

import fdbroker
from fdbroker.kernel import confine, libc
from fdbroker.launcher import filters

PACKAGE = Path(fdbroker.__file__).parent
# what runs confined; clients and bridges are ordinary programs
CONFINED = ("kernel", "inbox", "keeper", "namespaces", "nodes", "opener")
_PR_SET_NO_NEW_PRIVS = 38
# all numbers of the old form, the neighbours of ours, and some that a process that was taken over would like
TRIED = sorted(
    {*range(0x10000), *(row.request + step for row in filters.IOCTLS for step in (-1, 0, 1))}
    | {0x8004B705, 0x8004B707, 0x8004B708, 0x80045430, 0x40047211, 0xC0189436}
)


def _let_through(process: str) -> set[int]:
    """Of TRIED, what the filter of a process does not refuse; each is tried on /dev/null, which knows none of them."""
    with os.fdopen(filters.compile_filter(process), "rb") as file:
        program = file.read()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            null = os.open("/dev/null", os.O_RDWR)
            libc.prctl(_PR_SET_NO_NEW_PRIVS, 1)
            confine._load_filter(program)
            found = [request for request in TRIED if _outcome(null, request) != errno.EPERM]
            os.write(writing, json.dumps(found[:1000]).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as said:
        text = said.read()
    assert os.waitpid(child, 0)[1] == 0
    return set(json.loads(text))


def _outcome(descriptor: int, request: int) -> int:
    try:
        fcntl.ioctl(descriptor, request, bytes(8))
    except OSError as error:
        return error.errno
    return 0


@pytest.mark.parametrize("process", filters.PROCESSES)
def test_a_filter_lets_through_what_the_table_says_and_nothing_else(process):
    wanted = {row.request for row in filters.IOCTLS if row.process == process.removesuffix("-store")}
    assert wanted or process in ("keeper", "witness", "refuser")
    assert _let_through(process) == wanted


def test_the_code_of_the_confined_processes_makes_what_the_table_says():
    made = set()
    for path in (path for folder in CONFINED for path in sorted((PACKAGE / folder).glob("*.py"))):
        module = path.relative_to(PACKAGE)
        for item in ast.walk(ast.parse(path.read_text())):
            if isinstance(item, ast.Call) and ast.unparse(item.func).endswith("ioctl"):
                space = vars(importlib.import_module(f"fdbroker.{'.'.join(module.with_suffix('').parts)}"))
                made.add((str(module), eval(ast.unparse(item.args[1]), dict(space))))
    assert made == {(row.module, row.request) for row in filters.IOCTLS}
