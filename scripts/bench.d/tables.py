"""The tables of docs/performance.md and README.md, from what scripts/bench has measured; scripts/docs puts them there.

Each function makes one block of the numbers in docs/bench.json. In none of them is an absolute time of a request: another
machine has others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


class Table(NamedTuple):
    """Heads and rows."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


def _machine(bench: Mapping[str, Any]) -> str:
    one = bench["environment"]
    cpus = "one CPU" if one["cpus"] == 1 else f"{one['cpus']} CPUs"
    text = f"These numbers: Linux {one['kernel']}, {one['machine']}, {cpus}, audit to the {one['audit']}. What served is Python "
    text += f"{one['python']}, {one['profile']}."
    if one["quick"]:
        text = f"**A rough run, with `--quick`, on a machine that did other things as well: conclude nothing from it.** {text}"
    return text


def _ratio(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 2 else f"{value:.2f}"


def _percent(share: float) -> str:
    return f"{round(share * 100)} %"  # of a whole number: no "-0"


class _Measured(NamedTuple):
    """One number of the benchmark, and what the design asks of it."""

    title: str
    value: float
    target: float | None = None
    unit: str = ""
    chain: str = ""  # the same calls in C

    @property
    def reached(self) -> bool | None:
        return None if self.target is None else self.value <= self.target

    @property
    def row(self) -> tuple[str, ...]:
        target = "" if self.target is None else f"{self.target:g}{self.unit}"
        word = {None: "", True: "reached", False: "**not reached**"}[self.reached]
        return self.title, f"{_ratio(self.value)}{self.unit}", target, word, self.chain


def _measured(bench: Mapping[str, Any]) -> list[_Measured]:
    """Everything that the design may have a target for, in the order of the table."""
    idle, memory, start, new, many = (
        bench[name] for name in ("idle_connections", "memory", "start", "namespaces", "fan_out")
    )
    found = []
    for one in bench["round_trips"]:
        chain = _ratio(one["chain_to_one_open"])
        found.append(_Measured(one["title"], one["to_one_open"], one["target"], chain=chain))
        if one["chain_target"] is not None:
            title = f"{one['title']}, to the same calls in C"
            found.append(_Measured(title, one["to_the_chain"], one["chain_target"]))
        if one["first_to_one_open"] is not None:
            title = f"{one['title']}, the first of its kind"
            found.append(_Measured(title, one["first_to_one_open"], one["first_target"], chain=chain))
    for client, ours, title in (
        (
            "Python",
            ("fdbroker", "fdbroker, asyncio"),
            "a client in Python, to one of a D-Bus service, the worst of all pairs",
        ),
        ("C", ("fdbroker, each of 16",), "each of 16 descriptors in one request, to one of seatd's, the worst"),
    ):
        ratios = [one.ratio for one in _pairs(bench) if one.client == client and one.ours in ours]
        if ratios:
            found.append(_Measured(title, max(ratios), 1.0))
    title = f"one open beside {idle['connections']:,} idle connections, to none"
    found.append(_Measured(title, idle["ratio"], idle["target"]))
    found += _grown(bench)
    found.append(_Measured("`net:new`, to a program that makes it itself", new["ratio"], new["target"]))
    for name, rate in many["to_ours"].items():
        if name != "fdbroker":
            title = f"{name}'s deliveries to {many['subscribers']:,} subscribers, to ours"
            found.append(_Measured(title, rate, many["target"] if name == "redis" else None))
    found.append(
        _Measured(f"memory, PSS of {memory['processes']} processes", memory["pss_mb"], memory["target"], " MB")
    )
    found.append(_Measured("start to first answer", start["seconds"], start["target"], " s"))
    return found


def _grown(bench: Mapping[str, Any]) -> list[_Measured]:
    rows, targets = bench["growth"]["rows"], bench["growth"]["targets"]
    few, most = rows[0], rows[-1]
    # the targets are for so many rules, which the quick run does not have
    asked = targets if most["rules"] == targets["rules"] else {}
    rules = f"with {most['rules']:,} rules and as many deny rules"
    found = [
        _Measured(f"{what} {rules}, to {few['rules']}", most[f"{name}_ratio"], asked.get(name))
        for name, what in (
            ("open", "one open"),
            ("first", "one open, the first of its kind,"),
            ("connect", "connect, identify, first open"),
            ("list", "List of 16 nodes"),
        )
    ]
    return [*found, _Measured(f"start to first answer {rules}", most["start_s"], asked.get("start_s"), " s")]


def _ratios(bench: Mapping[str, Any]) -> Table:
    rows = [one.row for one in _measured(bench)]
    rows += [(f"{name}: not installed", "", "", "", "") for name in _missing(bench, seats_and_buses=False)]
    return Table(("", "measured", "target", "", "the same calls in C"), rows)


def _missing(bench: Mapping[str, Any], *, seats_and_buses: bool) -> list[str]:
    """Who was not installed of those that are asked for descriptors, or of those that are asked to deliver messages."""
    return [name for name in bench["not_installed"] if name.startswith(("seatd", "dbus")) == seats_and_buses]


def _reached(bench: Mapping[str, Any]) -> str:
    judged = [one for one in _measured(bench) if one.target is not None]
    missed = [one for one in judged if not one.reached]
    text = f"Of the design's {len(judged)} targets that this run could judge, {len(judged) - len(missed)} are reached."
    if missed:
        named = (f"{one.title} ({_ratio(one.value)}{one.unit}, target {one.target:g})" for one in missed)
        text += f" Not reached: {'; '.join(named)}."
    return text


class _Pair(NamedTuple):
    """One of ours beside another one, asked by clients in the same language; `ratio` is our time to its."""

    client: str
    ours: str
    other: str
    cpus: int
    ratio: float


def _pairs(bench: Mapping[str, Any]) -> list[_Pair]:
    compared = bench["compared"]
    return [
        _Pair(ours["client"], ours["who"], other["who"], ours["cpus"], ours["to_floor"] / other["to_floor"])
        for ours in compared
        for other in compared
        if ours["who"].startswith("fdbroker")
        and other["who"].startswith(("D-Bus", "seatd"))
        and (ours["client"], ours["cpus"]) == (other["client"], other["cpus"])
    ]


_OURS = {
    ("C", "fdbroker"): "one open",
    ("C", "fdbroker, each of 16"): "each of 16 in one request",
    ("Python", "fdbroker"): "the blocking client",
    ("Python", "fdbroker, asyncio"): "the asyncio client",
}


def _ahead(bench: Mapping[str, Any]) -> Table:
    found = {(one.client, one.ours, one.other, one.cpus): one.ratio for one in _pairs(bench)}

    def words(ratio: float | None) -> str:
        if ratio is None:
            return ""
        return f"ahead: {_ratio(ratio)} of its time" if ratio < 1 else f"behind: {_ratio(ratio)} times its time"

    rows = []
    for client, ours, other in dict.fromkeys(key[:3] for key in found):
        ahead = [words(found.get((client, ours, other, cpus))) for cpus in (1, 2)]
        rows.append((client, _OURS[client, ours], other, *ahead))
    many = bench["fan_out"]  # on all CPUs; deliveries a second, so theirs to ours is our time to theirs
    what = f"delivery to {many['subscribers']:,} subscribers"
    rows += [("C", what, name, "", words(ratio)) for name, ratio in many["to_ours"].items() if name != "fdbroker"]
    rows += [("", "", f"{name}: not installed", "", "") for name in bench["not_installed"]]
    return Table(("client in", "fdbroker's", "beside", "one CPU", "two CPUs"), rows)


def _parts(bench: Mapping[str, Any]) -> Table:
    rows = []
    for one in bench["round_trips"]:
        floor, chain, ours = (one[name] for name in ("floor_to_one_open", "chain_to_one_open", "to_one_open"))
        parts = (floor, chain - floor, ours - chain, ours, one["to_the_chain"])
        rows.append((one["title"], *map(_ratio, parts)))
    heads = (
        "",
        "what the floor does",
        "calls that the guarantees need",
        "Python",
        "all",
        "all, to the same calls in C",
    )
    return Table(heads, rows)


def _growth(bench: Mapping[str, Any]) -> Table:
    rows = [
        (
            f"{row['rules']:,}",
            *(_ratio(row[f"{name}_ratio"]) for name in ("open", "first", "connect", "list")),
            f"{_ratio(row['start_s'])} s",
        )
        for row in bench["growth"]["rows"]
    ]
    kinds = ("one open", "the first of its kind", "connect, first open", "List of 16 nodes")
    return Table(("rules, and as many deny rules", *kinds, "start to first answer"), rows)


def _lists(bench: Mapping[str, Any]) -> Table:
    rows = [
        (f"{row['nodes']:,}", f"{row['offers']:,}", *(_ratio(row[name]) for name in ("to_floor", "each_to_floor")))
        for row in bench["listings"]
    ]
    return Table(("nodes", "offered", "one List", "for each that is offered"), rows)


def _compared(bench: Mapping[str, Any]) -> Table:
    found = {(one["client"], one["who"], one["cpus"]): one for one in bench["compared"]}
    rows = []
    for client, who in dict.fromkeys((one["client"], one["who"]) for one in bench["compared"]):
        ratios = [found.get((client, who, cpus)) for cpus in (1, 2)]
        rows.append((client, who, *("" if one is None else _ratio(one["to_floor"]) for one in ratios)))
    rows += [("", f"{name}: not installed", "", "") for name in _missing(bench, seats_and_buses=True)]
    return Table(("client", "who is asked", "one CPU", "two CPUs"), rows)


_STAGES = {
    ("client", "ask, in C"): "send, receive, close",
    ("inbox", "receive"): "recvmsg from the client, with the sender's credentials",
    ("inbox", "decode"): "split into messages, JSON, which method, are its parameters well-formed",
    ("inbox", "link"): "the question to the opener and its outcome: encode, send, receive, decode",
    ("inbox", "send"): "what the inbox itself answers",
    ("opener", "link"): "the question, judged as if the inbox were taken over, and the outcome",
    ("keeper", "link"): "a connection knocks, is let in, has come, has ended: receive, decode, encode, send",
    ("keeper", "entry"): "whether the owner's next connection may come in now",
    ("opener", "accept"): "accept4 and the limits of connections",
    ("opener", "identify"): "SO_PEERCRED, SO_PEERGROUPS, label, name of the process",
    ("opener", "authorize"): "rate, what is unread, the policy",
    ("opener", "open"): "find the node beneath /dev, judge what was found, reopen that one, close",
    ("opener", "audit"): "the record, written before anything leaves",
    ("opener", "send"): "the reply's text, sendmsg, what is unread now",
}
_BOTH_STAGES = {
    "wait": "epoll_wait: asleep, switched away from and back to",
    "loop": "what ties these together: whose message, whose turn, timers, what is due",
    "confinement": "what seccomp and all else adds: the real process less the unconfined one",
    "inexact": "what timing the stages got wrong, for it disturbs them",
}


def _stages(bench: Mapping[str, Any]) -> Table:
    parts = bench["stages"]
    names = list(dict.fromkeys((row["process"], row["stage"]) for part in parts.values() for row in part["stages"]))
    by_part = {what: {(row["process"], row["stage"]): row for row in part["stages"]} for what, part in parts.items()}
    if missing := [name for name in names if name not in _STAGES and name[1] not in _BOTH_STAGES]:
        raise LookupError(f"stages {missing}: describe them in scripts/bench.d/tables.py")
    rows = []
    for name in names:
        shares = [_percent(by_part[what][name]["share"]) if name in by_part[what] else "" for what in parts]
        rows.append((*name, *shares, _STAGES.get(name) or _BOTH_STAGES[name[1]]))
    for process in ("client", "inbox", "opener", "keeper"):
        shares = [f"**{_percent(part['processes'][process] / part['whole_us'])}**" for part in parts.values()]
        rows.append((f"**{process}**", "**all**", *shares, ""))
    heads = {"open": "one open", "connect": "connect, first open, end"}
    return Table(("process", "stage", *(heads[what] for what in parts), "what it is"), rows)


def _switches(bench: Mapping[str, Any]) -> str:
    one = bench["stages"]["open"]
    switched = ", ".join(f"the {name} {number:.1f} times" for name, number in one["switches"].items())
    floors = one["whole_us"] / one["floor_us"]
    return (
        f"The whole of one open is {_ratio(floors)} floor's round trips of CPU time; in it are switched away from "
        f"{switched}. Without any confinement the round trip would be {_ratio(one['unconfined_to_floor'])} of the "
        f"floor's in place of {_ratio(one['to_floor'])}."
    )


BLOCKS: dict[str, Callable[[Mapping[str, Any]], Table | str]] = {
    "machine": _machine,
    "reached": _reached,
    "ratios": _ratios,
    "ahead": _ahead,
    "parts": _parts,
    "growth": _growth,
    "lists": _lists,
    "compared": _compared,
    "stages": _stages,
    "switches": _switches,
}
