"""Bars as SVG, written by hand: panels below each other, a bar and its number for each name.

    svg("title", [Panel("one open", "ratio", {"floor": 1.0, "fdbroker": 3.1}, {"fdbroker": 3.0})])

The same numbers give the same file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

_WIDTH, _LEFT, _RIGHT = 900, 270, 90  # names to the left of the bars, numbers to the right
_ROW, _BAR, _HEAD, _TITLE = 20, 13, 34, 44
_OURS, _OTHERS, _LINE = "#1f5fa8", "#9aa7b4", "#c8501e"


class Panel(NamedTuple):
    """One diagram: `values` by name, from 0; a line across the bar where `marks` has one for it."""

    title: str
    unit: str
    values: Mapping[str, float]
    marks: Mapping[str, float] = {}


def svg(title: str, panels: Sequence[Panel]) -> str:
    """Return the text of an SVG file with these panels."""
    height = _TITLE + sum(_HEAD + len(panel.values) * _ROW for panel in panels) + 16
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="12" fill="#222">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>',
        f'<text x="16" y="26" font-size="16" font-weight="bold">{escape(title)}</text>',
    ]
    top = _TITLE
    for panel in panels:
        parts += _panel(panel, top)
        top += _HEAD + len(panel.values) * _ROW
    return "\n".join([*parts, "</svg>", ""])


def _panel(panel: Panel, top: int) -> list[str]:
    most = max([*panel.values.values(), *panel.marks.values(), 1e-9])
    scale = (_WIDTH - _LEFT - _RIGHT) / most
    title = f'<tspan font-weight="bold">{escape(panel.title)}</tspan>, {escape(panel.unit)}'
    parts = [f'<text x="16" y="{top + 22}">{title}</text>']
    for number, (name, value) in enumerate(panel.values.items()):
        y = top + _HEAD + number * _ROW
        width = max(0.0, value) * scale
        # all bars are ours where nobody else is beside them
        ours = name.startswith("fdbroker") or not any(one.startswith("fdbroker") for one in panel.values)
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 11}" text-anchor="end">{escape(name)}</text>')
        colour = _OURS if ours else _OTHERS
        parts.append(f'<rect x="{_LEFT}" y="{y}" width="{width:.1f}" height="{_BAR}" fill="{colour}"/>')
        parts.append(f'<text x="{_LEFT + width + 6:.1f}" y="{y + 11}">{value:.2f}</text>')
        if name in panel.marks:
            x = _LEFT + panel.marks[name] * scale
            ends = f'x1="{x:.1f}" y1="{y - 2}" x2="{x:.1f}" y2="{y + _BAR + 2}"'
            parts.append(f'<line {ends} stroke="{_LINE}" stroke-width="2"/>')
    return parts
