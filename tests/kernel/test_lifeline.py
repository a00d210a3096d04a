"""How a child ended, in words for the admin."""

from __future__ import annotations

import os
import signal

import pytest

from fdbroker.kernel import confine, libc, lifeline
from fdbroker.launcher import filters

_PR_SET_NO_NEW_PRIVS = 38


def _said(end):
    """What is said of a real process that ends by `end`, and its number."""
    child = os.fork()
    if child == 0:
        try:
            end()
        finally:
            os._exit(255)
    return lifeline.how_ended(child, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])), child


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1, signal.SIGRTMIN + 1])
def test_a_signal_is_named_as_far_as_it_has_a_name(number):
    name = f" ({number.name})" if isinstance(number, signal.Signals) else ""
    assert _said(lambda: os.kill(os.getpid(), number))[0] == f"ended with signal {int(number)}{name}"


def test_an_exit_code_is_told():
    assert _said(lambda: os._exit(78))[0] == "ended with exit code 78"


@pytest.mark.parametrize("process", filters.PROCESSES)
def test_a_process_that_its_filter_killed_is_said_to_be_that_and_where_the_call_s_number_is(process):
    with os.fdopen(filters.compile_filter(process), "rb") as file:
        program = file.read()

    def run_something():
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1)
        confine._load_filter(program)
        os.execv("/bin/true", ["true"])

    said, child = _said(run_something)
    assert said.startswith("was killed by its seccomp filter (SIGSYS), ")
    assert said.endswith(f"journalctl --grep 'pid={child} .*syscall='")
