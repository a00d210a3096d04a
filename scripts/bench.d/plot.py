"""Plots as SVG, written by hand: panels below each other, each with axes, a unit and a legend.

    svg("title", [Panel("memory", "MiB", {"opener": [(0, 12.5), (10, 12.6)]})])

No library: what is drawn is lines and text, and the same numbers give the same file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 900, 190  # of a panel
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 170, 30, 30  # around the part with the lines
_TITLE = 44
# distinguishable also without colours: each line has its own dashes
_COLOURS = ("#1f5fa8", "#c8501e", "#2f8f4e", "#7a4fa3", "#a8861f", "#555555")
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4", "4 4")


class Panel(NamedTuple):
    """One diagram: `series` by name, points in order of x; the y axis begins at 0, or has powers of ten if `log`."""

    title: str
    unit: str
    series: Mapping[str, Points]
    x_unit: str = "s"
    log: bool = False


def svg(title: str, panels: Sequence[Panel]) -> str:
    """Return the text of an SVG file with these panels."""
    height = _TITLE + len(panels) * _HEIGHT + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="11" fill="#222">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>',
        f'<text x="{_LEFT}" y="24" font-size="15" font-weight="bold">{escape(title)}</text>',
    ]
    for number, panel in enumerate(panels):
        parts += _panel(panel, _TITLE + number * _HEIGHT)
    return "\n".join([*parts, "</svg>", ""])


def ticks(most: float, count: int = 5) -> list[float]:
    """About `count` round numbers from 0 on; the last one is `most` or more."""
    if most <= 0:
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(most / count))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * count >= most)
    return [step * number for number in range(math.ceil(most / step - 1e-9) + 1)]


def powers(least: float, most: float) -> list[float]:
    """Powers of ten from `least` or less to `most` or more."""
    first = math.floor(math.log10(least) + 1e-9)
    return [10.0**number for number in range(first, max(first + 1, math.ceil(math.log10(most) - 1e-9)) + 1)]


def _number(value: float) -> str:
    return f"{value:,.6f}".rstrip("0").rstrip(".") if value % 1 else f"{value:,.0f}"


def _panel(panel: Panel, top: float) -> list[str]:
    points = [point for series in panel.series.values() for point in series]
    heights = [y for _, y in points if y > 0 or not panel.log]
    if panel.log:
        rows = powers(min(heights, default=1), max(heights, default=10))
    else:
        rows = ticks(max(heights, default=0.0), 4)
    columns = ticks(max((x for x, _ in points), default=0.0), 8)
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    last_x = max((x for x, _ in points), default=0.0) or columns[-1]

    def at(x: float, y: float) -> tuple[str, str]:
        part = y / rows[-1]
        if panel.log:
            part = math.log(max(y, rows[0]) / rows[0]) / math.log(rows[-1] / rows[0])
        return f"{_LEFT + x / last_x * width:.1f}", f"{top + _TOP + height - part * height:.1f}"

    parts = [
        f'<text x="{_LEFT}" y="{top + 18:.1f}" font-weight="bold">{escape(panel.title)}, {escape(panel.unit)}</text>'
    ]
    for value in rows:
        x, y = at(0, value)
        parts.append(f'<line x1="{x}" y1="{y}" x2="{_LEFT + width}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y}" dy="4" text-anchor="end">{_number(value)}</text>')
    for value in columns:
        if value <= last_x:
            x, y = at(value, 0)
            end = f" {escape(panel.x_unit)}" if value == columns[0] else ""
            parts.append(f'<line x1="{x}" y1="{y}" x2="{x}" y2="{float(y) + 4:.1f}" stroke="#222"/>')
            parts.append(f'<text x="{x}" y="{float(y) + 16:.1f}" text-anchor="middle">{_number(value)}{end}</text>')
    x, y = at(0, 0)
    parts.append(f'<polyline points="{x},{top + _TOP:.1f} {x},{y} {_LEFT + width},{y}" fill="none" stroke="#222"/>')
    for number, (name, series) in enumerate(panel.series.items()):
        colour, dashes = _COLOURS[number % len(_COLOURS)], _DASHES[number % len(_DASHES)]
        style = f'stroke="{colour}" stroke-width="1.5"' + (f' stroke-dasharray="{dashes}"' if dashes else "")
        line = " ".join(",".join(at(*point)) for point in series)
        parts.append(f'<polyline points="{line}" fill="none" {style}/>')
        left, row = _LEFT + width + 14, top + _TOP + 8 + number * 16
        parts.append(f'<line x1="{left}" y1="{row:.1f}" x2="{left + 26}" y2="{row:.1f}" {style}/>')
        parts.append(f'<text x="{left + 32}" y="{row + 4:.1f}">{escape(name)}</text>')
    return parts
