"""Heat maps: colors follow the values, every number is printed, scales end at round numbers."""

from __future__ import annotations

import json
import re
from html import unescape

import pytest

from dit_attn.eval.report import heatmap
from dit_attn.eval.report.heatmap import HeatMap, heat_map
from dit_attn.eval.report.render import environment


def drawn(one: HeatMap) -> str:
    """The map as the pages draw it."""
    return str(environment().get_template("parts.html").make_module().heat_map(one))  # type: ignore[attr-defined]


def test_a_heat_map_says_its_ends_and_its_colors_follow_the_values() -> None:
    html = drawn(heat_map([[0.0, 0.5], [1.0, None]], ["a", "b<"], ["x", "y"], "T", "unit", (0.0, 1.0)))
    fills = re.findall(r'<path fill="(#\w+)" d="(.*?)"', html)
    assert [d for _, d in fills] == ["M0 0h1v1h-1z", "M1 0h1v1h-1z", "M0 1h1v1h-1z"]
    assert fills[0][0] == "#00224e" and fills[2][0] == "#fee838"
    assert "least 0 in a, x, largest 1 in b&lt;, x" in html and "mean 0.5" in html
    assert "no values" in drawn(heat_map([[None], [float("nan")]], ["a", "b"], ["x"], "T", "unit"))


def test_a_heat_map_without_a_scale_shows_negative_values_and_joins_many_columns() -> None:
    assert "<span>-3</span>" in drawn(heat_map([[-3.0, -1.0]], ["a"], ["x", "y"], "T", "unit"))
    wide = heat_map([[float(i) for i in range(9000)]], ["a"], [str(i) for i in range(9000)], "T", "unit")
    html = drawn(wide)
    assert '"0 to 1"' in unescape(html) and 'viewBox="0 0 4500 1"' in html
    assert json.loads(wide.data["values"])[0][:2] == [0.5, 2.5]


def test_names_with_quotes_and_markup_stay_text() -> None:
    name = """a"b'c<d>&e"""
    html = drawn(heat_map([[1.0]], [name], [name], name))
    assert "<d>" not in html
    rows = re.search(r'data-rows="(.*?)"', html)
    assert rows is not None and json.loads(unescape(rows.group(1))) == [name]


@pytest.mark.parametrize(("largest", "end"), [(0.33, 0.4), (1.024, 1.2), (0.1, 0.1), (0.0301, 0.04), (0.0, 1.0)])
def test_a_scale_ends_at_a_round_number_that_holds_everything(largest: float, end: float) -> None:
    assert heatmap.round_up(largest) == pytest.approx(end)


def test_lightness_rises_along_the_scale() -> None:
    shades = [heatmap.rgb(i / 20) for i in range(21)]
    light = [sum(w * int(s[i : i + 2], 16) for w, i in ((0.2126, 1), (0.7152, 3), (0.0722, 5))) for s in shades]
    assert light == sorted(light) and light[-1] - light[0] > 150
