"""What scripts/bench says of its numbers: on the terminal, in the plot, and how many digits are written down."""

from __future__ import annotations

from typing import Any

import bars

_FORM = "{:<44} {:>9} {:>9} {:>9} {:>11} {:>11} {:>12} {:>8}"
_HEADS = ("", "floor us", "chain us", "fdbr. us", "to the same", "to one open", "to the chain", "target")
_ROW = "{:<10} {:<14} {:>9} {:>8}"


def table(result: dict[str, Any]) -> None:
    """Print all that was measured."""
    print("  ".join(f"{name} {value}" for name, value in result["environment"].items()))
    if "round_trips" in result:
        _round_trips(result)
        _rest(result)
        _growth(result)
        _compared(result)
    for what, measured in result["stages"].items():
        _stages(what, measured)


def _round_trips(result: dict[str, Any]) -> None:
    print(_FORM.format(*_HEADS))
    for trip in result["round_trips"]:
        times = [f"{trip[name]:.1f}" for name in ("floor_us", "chain_us", "fdbroker_us")]
        ratios = [f"{trip[name]:.2f}" for name in ("to_the_same", "to_one_open", "to_the_chain")]
        judged = _judged(trip["to_one_open"], trip["target"]) or _judged(trip["to_the_chain"], trip["chain_target"])
        print(_FORM.format(trip["title"], *times, *ratios, judged))
        if trip["first_us"] is not None:
            first, us = trip["first_to_one_open"], f"{trip['first_us']:.1f}"
            judged = _judged(first, trip["first_target"])
            print(_FORM.format("  the first of its kind", "", "", us, "", f"{first:.2f}", "", judged))


def _line(title: str, before: str, value: str, ratio: float | None = None, target: str = "") -> None:
    print(_FORM.format(title, before, "", value, "" if ratio is None else f"{ratio:.2f}", "", "", target))


def _rest(result: dict[str, Any]) -> None:
    idle, memory, start = (result[key] for key in ("idle_connections", "memory", "start"))
    new = result["namespaces"]
    times = [f"{new[name]:.1f}" for name in ("itself_us", "fdbroker_us")]
    title = "net:new, to a program that makes it itself"
    _line(title, times[0], times[1], new["ratio"], _judged(new["ratio"], new["target"]))
    many = result["fan_out"]
    print(
        f"{many['messages']} messages of 100 bytes to {many['subscribers']} subscribers, deliveries a second, and to ours:"
    )
    for kind, rate in many["per_second"].items():
        target = _judged(many["to_ours"][kind], many["target"]) if kind == "redis" else ""
        _line(f"  {kind}", "", f"{rate:,.0f}", many["to_ours"][kind], target)
    title = f"one open beside {idle['connections']} idle, to none"
    times = [f"{idle[name]:.1f}" for name in ("without_us", "with_us")]
    _line(title, times[0], times[1], idle["ratio"], _judged(idle["ratio"], idle["target"]))
    print(f"  their memory: {idle['pss_growth_mb']:.1f} MB; floor us is here the broker without them")
    title = f"memory of {memory['processes']} processes, PSS, MB"
    _line(title, "", f"{memory['pss_mb']:.1f}", None, _judged(memory["pss_mb"], memory["target"]))
    _line("  RSS, MB", "", f"{memory['rss_mb']:.1f}")
    title = f"start to first answer, s, median of {start['starts']}"
    _line(title, "", f"{start['seconds']:.2f}", None, _judged(start["seconds"], start["target"]))


def _growth(result: dict[str, Any]) -> None:
    rows, targets = result["growth"]["rows"], result["growth"]["targets"]
    print(f"with so many rules and as many deny rules; the ratio is to {rows[0]['rules']} rules:")
    form = "  {:<24}" + " {:>12} {:>7}" * len(rows) + " {:>8}"
    judged = rows[-1] if rows[-1]["rules"] == targets["rules"] else None

    def line(title: str, first: str, second: str | None = None) -> None:
        cells = [one for row in rows for one in (f"{row[first]:.4g}", "" if second is None else f"{row[second]:.2f}")]
        name = (second or first).removesuffix("_ratio")
        print(form.format(title, *cells, "" if judged is None else _judged(judged[second or first], targets.get(name))))

    print(form.format("rules", *(one for row in rows for one in (row["rules"], "")), "target"))
    line("one open, us", "open_us", "open_ratio")
    line("  the first of its kind", "first_us", "first_ratio")
    line("connect, open, us", "connect_us", "connect_ratio")
    line("List of 16 nodes, us", "list_us", "list_ratio")
    line("start, s", "start_s")
    for row in result["listings"]:
        each = f"{row['each_to_floor']:.3f} of the floor's one open for each offered"
        print(f"List of {row['nodes']} nodes, {row['offers']} offered: {row['us']:.1f} us, {each}")


def _compared(result: dict[str, Any]) -> None:
    print("one open, asked by the same client in the same run; the ratio is to the floor asked by that client:")
    form = "  {:<8} {:<24} {:>6} {:>9} {:>9}"
    print(form.format("client", "", "CPUs", "us", "to floor"))
    for one in result["compared"]:
        print(form.format(one["client"], one["who"], one["cpus"], f"{one['us']:.1f}", f"{one['to_floor']:.2f}"))
    for name in result["not_installed"]:
        print(f"  not installed: {name}")


def _stages(what: str, measured: dict[str, Any]) -> None:
    print(f"CPU time of one {what}, stage by stage; its round trip {measured['round_trip_us']:.1f} us,", end=" ")
    print(f"{measured['to_floor']:.2f} of the floor's, unconfined {measured['unconfined_to_floor']:.2f}:")
    print(_ROW.format("process", "stage", "us", "share"))
    for row in measured["stages"]:
        print(_ROW.format(row["process"], row["stage"], f"{row['us']:.2f}", f"{round(row['share'] * 100)}%"))
    print(_ROW.format("", "all", f"{measured['whole_us']:.2f}", "100%"))
    switched = ", ".join(f"{name} {number:.2f}" for name, number in measured["switches"].items())
    print(f"switched away from, times each: {switched}")


def _judged(value: float, target: float | None) -> str:
    if target is None:
        return ""
    return f"{target:g}" if value <= target else f"{target:g} !"


def rounded(value: Any) -> Any:
    """`value` with its numbers to four digits: more are noise, and would differ in every run."""
    match value:
        case dict():
            return {name: rounded(one) for name, one in value.items()}
        case list():
            return [rounded(one) for one in value]
        case float():
            return float(f"{value:.4g}")
    return value


def plot(result: dict[str, Any]) -> tuple[str, list[bars.Panel]]:
    """What bars.svg draws."""
    by_panel: dict[tuple[int, str], dict[str, float]] = {}
    for one in result["compared"]:
        by_panel.setdefault((one["cpus"], one["client"]), {})[one["who"]] = one["to_floor"]
    panels = [
        bars.Panel(
            f"one open, client in {client}, {'one CPU' if cpus == 1 else 'two CPUs'}", "floor's round trips", found
        )
        for (cpus, client), found in by_panel.items()
    ]
    reached, targets = {}, {}
    for trip in result["round_trips"]:
        for title, value, target in (
            (trip["title"], trip["to_one_open"], trip["target"]),
            (f"{trip['title']}: first", trip["first_to_one_open"], trip["first_target"]),
            (f"{trip['title']}: chain", trip["chain_to_one_open"], None),
        ):
            if value is not None:
                reached[title] = value
            if target is not None:
                targets[title] = target
    title = "fdbroker, and the same calls in C (chain); a line is a target"
    panels.append(bars.Panel(title, "floor's round trips of one open", reached, targets))
    rows = result["stages"]["open"]["stages"]
    stages = {f"{row['process']}: {row['stage']}": row["share"] * 100 for row in rows if row["stage"] != "inexact"}
    panels.append(bars.Panel("one open, one CPU: by stage", "per cent of its CPU time", stages))
    return "fdbroker beside a floor in C, and others", panels
