"""Every import of the opener is attack surface: it loads what stands here and nothing else."""

from __future__ import annotations

import subprocess
import sys

# Third parties, and what a root helper has no business with.
FORBIDDEN = {
    *("yaml", "msgspec", "click", "rich", "pyseccomp", "asyncio", "subprocess", "logging", "inspect", "dataclasses"),
    *("ssl", "http", "email", "urllib.request", "pickle", "marshal_", "tempfile", "shutil", "pwd", "grp", "threading_"),
    *("multiprocessing", "concurrent", "importlib.metadata", "importlib.resources", "sqlite3", "xml", "readline"),
}
THIRD_PARTY = {"prctl", "_prctl"}
OURS = {
    "fdbroker",
    *(
        f"fdbroker.{name}"
        for name in ("terms", "errors", "limits", "bucket", "pace", "wire", "policy", "kernel", "opener")
    ),
    *(f"fdbroker.wire.{name}" for name in ("journal", "link", "pack", "resources", "rights", "worker")),
    *(f"fdbroker.policy.{name}" for name in ("compiled", "decide", "labels", "paths")),
    *(
        f"fdbroker.kernel.{name}"
        for name in (
            *("capabilities", "confine", "devices", "inotify", "landlock", "libc", "link", "memfd", "openat", "orders"),
            *("processes", "records", "sockets"),
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
            "door",
            "identify",
            "listing",
            "open",
            "request",
            "send",
            "service",
        )
    ),
}


def _loaded(module):
    code = (
        f"import sys; before = set(sys.modules); import {module}; print('\\n'.join(sorted(set(sys.modules) - before)))"
    )
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path[:0] = {sys.path!r}; {code}"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def test_the_opener_loads_only_what_it_needs():
    loaded = _loaded("fdbroker.opener.__main__")
    assert {name for name in loaded if name.split(".")[0] == "fdbroker"} == OURS
    assert not {name for name in loaded if name in FORBIDDEN or name.split(".")[0] in FORBIDDEN}
    standard = {
        name
        for name in loaded
        if name.split(".")[0] not in sys.stdlib_module_names and name.split(".")[0] != "fdbroker"
    }
    assert standard <= THIRD_PARTY
    assert len(loaded) <= 102, sorted(loaded)


def test_the_inbox_loads_msgspec_and_no_policy_but_nothing_that_could_start_something():
    loaded = _loaded("fdbroker.inbox.__main__")
    assert "msgspec" in loaded
    assert not loaded & {"yaml", "subprocess", "asyncio", "pwd", "grp", "click", "pyseccomp"}
    assert not {name for name in loaded if name.startswith(("fdbroker.opener", "fdbroker.launcher", "fdbroker.policy"))}
