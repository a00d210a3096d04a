"""`fdbroker serve` as it is, but for two things: its children are not confined, and the stages of three are timed.

    python -I staged.py serve OPTIONS          unconfined, not timed
    python -I staged.py FOLDER serve OPTIONS   timed: on SIGUSR1 FOLDER/opener.json, keeper.json and inbox.json are written

The launcher is the real one; the children that it starts run this file, which runs their real `main`. A stage's time
is the thread's CPU time in its functions without that in functions of other stages, less what the timing costs. What
has a name below and is not found is an error, so that nothing is silently left out.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

# The stages of each process, in the order of a request, and the functions that are theirs: MODULE:NAME.
_LINK = (
    "kernel.link:Link.receive",
    "kernel.link:Link.receive_whole",
    "kernel.link:Link.send",
    "kernel.link:Link.send_with_descriptors",
    "wire.codec:Table.encode",
    "wire.codec:Table.decode",
)
STAGES: dict[str, dict[str, tuple[str, ...]]] = {
    "inbox": {
        "receive": ("kernel.received:receive_with_sender",),
        "decode": (
            "inbox.decode:Decoder.feed",
            "inbox.decode:Decoder.next_message",
            "inbox.dispatch:dispatch_varlink",
            "inbox.dispatch:dispatch_frame",
        ),
        "link": _LINK,
        "send": ("inbox.client:Client.send",),
    },
    "keeper": {
        "link": _LINK,
        "entry": ("keeper.entry:Entry.knock", "keeper.entry:Entry.ended"),
    },
    "opener": {
        "link": _LINK,
        "accept": ("opener.accept:Acceptor.accept",),
        "identify": ("opener.identify:Identifier.identify", "opener.identify:Identifier.describe"),
        "authorize": (
            "opener.authorize:authorize_connection",
            "opener.authorize:authorize_request",
            "opener.authorize:authorize_grants",
            "opener.authorize:authorize_resources",
            "policy.decide:view",
        ),
        "open": ("opener.open:Nodes.open_some", "opener.request:Opening.close"),
        "audit": ("opener.audit:Audit.grant",),
        "send": (
            "opener.send:compose",
            "opener.send:send_grants",
            "opener.authorize:Connection.note_sent",
        ),
    },
}
_WAIT = "wait"  # epoll_wait, and so being switched away from and back to
_CALIBRATE = 20_000

_clock = time.thread_time_ns


class Times:
    """Nanoseconds by stage, and what is needed to take off the timing's own."""

    def __init__(self, name: str) -> None:
        # of each stage: nanoseconds, calls, calls of timed functions inside it
        self.stages = {stage: [0, 0, 0] for stage in (*STAGES[name], _WAIT, "loop")}
        self._current = self.stages["loop"]
        self._inside = 0  # nanoseconds in timed functions, called by the current one
        self._began = _clock()

    def timed(self, function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        """`function`, timed."""
        cell = self.stages[stage]

        def call(*arguments: Any, **named: Any) -> Any:
            caller, inside = self._current, self._inside
            caller[2] += 1
            self._current, self._inside = cell, 0
            began = _clock()
            try:
                return function(*arguments, **named)
            finally:
                took = _clock() - began
                cell[0] += took - self._inside
                cell[1] += 1
                self._current, self._inside = caller, inside + took

        return call

    def reset(self) -> None:
        """Begin anew."""
        for cell in self.stages.values():
            cell[:] = [0, 0, 0]
        self._inside = 0
        self._began = _clock()

    def report(self, inner: float, outer: float) -> dict[str, float]:
        """Microseconds by stage, without the timing: `inner` ns in each timed call, `outer` around it."""
        rest = _clock() - self._began - sum(cell[0] for cell in self.stages.values())
        self.stages["loop"][0] += rest
        return {
            stage: (spent - calls * inner - inside * outer) / 1000
            for stage, (spent, calls, inside) in self.stages.items()
        }


def _calibrate(name: str) -> tuple[float, float]:
    """How many ns one timed call costs: inside what is measured, and around it."""
    times = Times(name)

    def nothing() -> None:
        pass

    def repeat(function: Callable[[], Any]) -> float:
        began = _clock()
        for _ in range(_CALIBRATE):
            function()
        return (_clock() - began) / _CALIBRATE

    timed = times.timed(nothing, _WAIT)
    plain, all_of_it = min(repeat(nothing) for _ in range(3)), min(repeat(timed) for _ in range(3))
    times.reset()
    repeat(timed)
    inner = max(0.0, times.stages[_WAIT][0] / _CALIBRATE - plain)
    return inner, max(0.0, all_of_it - plain - inner)


def _replace(times: Times, place: str, stage: str) -> None:
    """Time one function wherever it was imported to, or one method."""
    module_name, _, path = place.partition(":")
    *owners, name = path.split(".")
    module = importlib.import_module(f"fdbroker.{module_name}")
    if owners:
        owner = getattr(module, owners[0])
        setattr(owner, name, times.timed(vars(owner)[name], stage))
        return
    function = getattr(module, name)
    timed = times.timed(function, stage)
    for other in _modules():
        if vars(other).get(name) is function:
            setattr(other, name, timed)


def _modules() -> Iterator[Any]:
    return iter([module for name, module in sys.modules.items() if name.split(".")[0] == "fdbroker" and module])


class _Epoll:
    """An epoll whose waiting is timed."""

    def __init__(self, times: Times, epoll: select.epoll) -> None:
        self._epoll = epoll
        self.poll = times.timed(epoll.poll, _WAIT)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._epoll, name)


def _time_stages(name: str, folder: str) -> None:
    package = importlib.import_module(f"fdbroker.{name}")
    for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        importlib.import_module(found.name)
    inner, outer = _calibrate(name)
    times = Times(name)
    for stage, places in STAGES[name].items():
        for place in places:
            _replace(times, place, stage)
    epoll = select.epoll
    select.epoll = lambda *arguments: _Epoll(times, epoll(*arguments))  # type: ignore[misc,assignment]

    def report(_: int, __: object) -> None:
        path = f"{folder}/{name}.json"
        with open(f"{path}.new", "w", encoding="ascii") as file:
            json.dump(times.report(inner, outer), file)
        os.rename(f"{path}.new", path)
        times.reset()

    signal.signal(signal.SIGUSR1, report)


def _child(module: str, order: str, folder: str) -> int:
    from fdbroker.kernel import orders  # noqa: PLC0415 -- it is changed before others import it

    setattr(orders, "confine", lambda *_: False)  # noqa: B010 -- it is not orders' to give away
    name = module.rpartition(".")[2]
    if folder and name in STAGES:
        _time_stages(name, folder)
    sys.argv = [module, order]
    return int(importlib.import_module(f"{module}.__main__").main())


def _serve(folder: str, arguments: list[str]) -> int:
    from fdbroker.cli import main  # noqa: PLC0415 -- a child need not have it
    from fdbroker.launcher import start  # noqa: PLC0415 -- likewise

    def popen(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        *python, code, order = command
        found = re.search(r"from (fdbroker\.\w+)\.__main__ import main", code)
        if found is None:
            raise SystemExit(f"the launcher starts its children by {command}: staged.py has to learn that")
        # with `site`, unlike the real one: this file needs to find fdbroker
        return subprocess.Popen([python[0], "-I", "-B", os.path.abspath(__file__), found[1], order, folder], **options)

    ours = SimpleNamespace(**{**vars(subprocess), "Popen": popen})
    setattr(start, "subprocess", ours)  # noqa: B010 -- likewise
    sys.argv = ["fdbroker", *arguments]
    return main()


if __name__ == "__main__":
    words = sys.argv[1:]
    if words[0].startswith("fdbroker."):
        sys.exit(_child(*words))
    sys.exit(_serve("", words) if words[0] == "serve" else _serve(words[0], words[1:]))
