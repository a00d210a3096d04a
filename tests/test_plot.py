"""The plots of the scripts: whole SVG, every point inside its panel, whatever a series and its texts are."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts/bench.d"))
from plot import Panel, powers, svg, ticks

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "series",
    [
        {},
        {"a": []},
        {"a": [(0, 0)]},
        {"a": [(0, 5), (10, 5)], "b": [(3, 0.001)]},
        {str(one): [(1, 1e9)] for one in range(9)},
    ],
    ids=["nothing", "no points", "zero", "two", "nine"],
)
def test_every_point_is_drawn_inside_its_panel(series, log):
    tree = ET.fromstring(svg("a < b & c", [Panel("one", "s", {"x": [(0, 1)]}), Panel("<two>", "ms", series, log=log)]))
    width, height = (float(tree.get(name)) for name in ("width", "height"))
    lines = tree.findall(f"{SVG}polyline")
    points = [point.split(",") for line in lines for point in line.get("points").split()]
    assert all(0 <= float(x) <= width and 0 <= float(y) <= height for x, y in points)
    texts = [one.text for one in tree.iter(f"{SVG}text")]
    assert {"a < b & c", "one, s", "<two>, ms", *series} <= set(texts)
    assert len(points) >= sum(map(len, series.values()))


@pytest.mark.parametrize("most", [0.0003, 0.9, 1, 7, 10, 199, 1e6])
def test_the_ticks_are_round_and_reach_the_largest_value(most):
    found = ticks(most)
    assert found[0] == 0
    assert found[-2] < most <= found[-1] * (1 + 1e-9)
    assert 3 <= len(found) <= 7
    assert powers(most / 50, most)[0] <= most / 50 * (1 + 1e-9)
    assert powers(most / 50, most)[-1] >= most * (1 - 1e-9)
