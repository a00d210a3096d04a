"""What scripts/bench says of its numbers: on the terminal, in the plot, and how many digits are written down."""

from __future__ import annotations

from typing import Any

import bars

_FORM = "{:<42} {:>9} {:>9} {:>11} {:>11} {:>8}"
_ROW = "{:<10} {:<14} {:>9} {:>8}"


def table(result: dict[str, Any]) -> None:
    """Print all that was measured."""
    print("  ".join(f"{name} {value}" for name, value in result["environment"].items()))
    if "round_trips" in result:
        _round_trips(result)
        _rest(result)
        _compared(result)
    for what, measured in result["stages"].items():
        _stages(what, measured)


def _round_trips(result: dict[str, Any]) -> None:
    print(_FORM.format("", "floor us", "fdbr. us", "to the same", "to one open", "target"))
    for trip in result["round_trips"]:
        times = [f"{trip[name]:.1f}" for name in ("floor_us", "fdbroker_us")]
        ratios = [f"{trip[name]:.2f}" for name in ("to_the_same", "to_one_open")]
        print(_FORM.format(trip["title"], *times, *ratios, _judged(trip["to_one_open"], trip["target"])))


def _rest(result: dict[str, Any]) -> None:
    idle, memory, start = (result[key] for key in ("idle_connections", "memory", "start"))
    new = result["namespaces"]
    times = [f"{new[name]:.1f}" for name in ("itself_us", "fdbroker_us")]
    print(_FORM.format("net:new, to a program that makes it itself", *times, f"{new['ratio']:.2f}", "", ""))
    many = result["fan_out"]
    print(f"{many['messages']} messages of 100 bytes to {many['subscribers']} subscribers, deliveries a second:")
    for kind, rate in many["per_second"].items():
        print(_FORM.format(f"  {kind}", "", f"{rate:,.0f}", f"{rate / many['per_second']['fdbroker']:.2f}", "", ""))
    title = f"one open beside {idle['connections']} idle, to none"
    times = [f"{idle[name]:.1f}" for name in ("without_us", "with_us")]
    print(_FORM.format(title, *times, f"{idle['ratio']:.2f}", "", _judged(idle["ratio"], idle["target"])))
    print(f"  their memory: {idle['pss_growth_mb']:.1f} MiB; floor us is here the broker without them")
    title = f"memory of {memory['processes']} processes, PSS, MiB"
    print(_FORM.format(title, "", f"{memory['pss_mb']:.1f}", "", "", _judged(memory["pss_mb"], memory["target"])))
    print(_FORM.format("  RSS, MiB", "", f"{memory['rss_mb']:.1f}", "", "", ""))
    title = f"start to first answer, s, median of {start['starts']}"
    print(_FORM.format(title, "", f"{start['seconds']:.2f}", "", "", _judged(start["seconds"], start["target"])))


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


def _judged(value: float, target: float) -> str:
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
    targets = {trip["title"]: trip["target"] for trip in result["round_trips"]}
    reached = {trip["title"]: trip["to_one_open"] for trip in result["round_trips"]}
    panels.append(bars.Panel("fdbroker; a line is a target", "floor's round trips of one open", reached, targets))
    rows = result["stages"]["open"]["stages"]
    stages = {f"{row['process']}: {row['stage']}": row["share"] * 100 for row in rows if row["stage"] != "inexact"}
    panels.append(bars.Panel("one open, one CPU: by stage", "per cent of its CPU time", stages))
    return "fdbroker beside a floor in C, and others", panels
