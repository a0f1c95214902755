"""Heat maps as HTML without a network: any table by :func:`heatmap`, and layer by step of all methods of a comparison
on one color scale by :func:`heatmaps`. Every cell gives its number."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

# Dark to light, even in lightness and told apart with any color vision: points of matplotlib's cividis.
SCALE = ((0, 34, 78), (53, 69, 108), (102, 105, 112), (148, 142, 119), (200, 184, 102), (254, 232, 56))
MOST_CELLS = 6000  # per map; beyond that neighbouring steps share a cell
LEVELS = 48  # colors of a map whose cells are drawn color by color
ROUND = (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)  # where a scale may end, times a power of ten
KINDS = {
    "density": ("Attention computed", "share of the map, 1 is dense"),
    "error": ("Error of the result", "relative L2 distance to exact attention, 0 is exact"),
}

Table = Sequence[Sequence[float | None]]


def heatmap(
    values: Table,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    unit: str,
    scale: tuple[float, float] | None = None,
) -> str:
    """A table as a figure: caption, color bar, map, ends of both axes and the extremes in words.

    The SVG has one path a color, not one element a cell, so that a page can hold many; the words of a cell are put
    together from ``data-rows``, ``data-columns`` and ``data-values`` by the page.

    Args:
        values: rows x columns; ``None`` and NaN are holes.
        rows, columns: their names, first on top and at the left.
        title: caption; also what a reader without a picture hears, with the extremes.
        unit: of the values, in a few words.
        scale: values of the darkest and the lightest color; ``None``: 0 (or the least value below) to the largest.
    """
    clean = [[None if x is None or math.isnan(x) else float(x) for x in row] for row in values]
    known, caption = list(_known(clean)), f"<figcaption>{html.escape(title)}</figcaption>"
    if not known:
        return f'<figure class="map">{caption}<p class="soft">no values</p></figure>'
    low, high = scale or (min(0.0, *known), _nice(max(known)) if min(known) >= 0 else max(known))
    table, share = _joined(clean), _share(clean)
    groups = [columns[x : x + share] for x in range(0, len(columns), share)]
    labels = [group[0] if len(group) == 1 else f"{group[0]} to {group[-1]}" for group in groups]
    words = f"{unit}; mean {sum(known) / len(known):.3g}, {_ends(clean, rows, columns)}"
    data = {"rows": list(rows), "columns": labels, "values": [[_short(x) for x in row] for row in table]}
    said = {f"data-{key}": json.dumps(value, separators=(",", ":")) for key, value in data.items()}
    said |= {"aria-label": f"{title}: {words}", "style": f"--rows:{len(rows)}"}
    attributes = " ".join(f'{key}="{html.escape(value)}"' for key, value in said.items())
    return (
        f'<figure class="map">{caption}<div class="ends soft"><span>{low:.3g}</span>'
        f'<span class="bar" style="{_bar()}"></span><span>{high:.3g}</span></div>'
        f'<svg viewBox="0 0 {len(table[0])} {len(table)}" preserveAspectRatio="none" role="img" {attributes}>'
        f'{_paths(table, low, high)}</svg><div class="ends soft"><span>{html.escape(columns[0])}</span>'
        f"<span>{html.escape(rows[0])} on top, {html.escape(rows[-1])} below</span>"
        f'<span>{html.escape(columns[-1])}</span></div><p class="soft">{html.escape(words)}</p></figure>'
    )


def _paths(table: Table, low: float, high: float) -> str:
    """The cells of a map, one path a color."""
    cells: dict[str, list[str]] = {}
    for y, row in enumerate(table):
        for x, value in enumerate(row):
            if value is not None:
                place = (value - low) / ((high - low) or 1.0)
                color = _rgb(round(min(max(place, 0.0), 1.0) * (LEVELS - 1)) / (LEVELS - 1))
                cells.setdefault(color, []).append(f"M{x} {y}h1v1h-1z")
    return "".join(f'<path fill="{color}" d="{"".join(parts)}"/>' for color, parts in cells.items())


def _ends(table: Table, rows: Sequence[str], columns: Sequence[str]) -> str:
    """Where a map is least and largest, in words."""
    known = [(value, y, x) for y, row in enumerate(table) for x, value in enumerate(row) if value is not None]
    ends = {"least": min(known), "largest": max(known)}
    return ", ".join(f"{word} {value:.3g} in {rows[y]}, {columns[x]}" for word, (value, y, x) in ends.items())


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")


def _bar() -> str:
    stops = ", ".join(_rgb(i / (len(SCALE) - 1)) for i in range(len(SCALE)))
    return f"background:linear-gradient(90deg, {stops})"


def heatmaps(maps: dict[str, dict[str, Any]], takes: Sequence[dict[str, Any]]) -> str:
    """The section of the page; empty without maps.

    Args:
        maps: by label, as ``results.json`` has them: ``layers``, ``density`` and ``error`` (layers x steps), ``rows``,
            ``seconds``; or ``failed``.
        takes: of ``results.json``, for the time of the same item without watching.
    """
    drawn = {label: one for label, one in maps.items() if "failed" not in one and one["layers"]}
    notes = "".join(
        f"<p>No map of {html.escape(label)}: {html.escape(one.get('failed', 'no attention call was seen'))}.</p>"
        for label, one in maps.items()
        if label not in drawn
    )
    if not drawn:
        return f"<h2>Layer by step</h2>{notes}" if notes else ""
    first = next(iter(drawn.values()))
    tops = {"density": 1.0, "error": _nice(max((x for one in drawn.values() for x in _known(one["error"])), default=0))}
    parts = [
        '<h2 id="maps">Layer by step</h2>',
        f'<p class="soft">One item ({html.escape(first["prompt"])}, seed {first["seed"]}): rows are layers from first '
        f"to last, columns are denoising steps from first to last. The error is taken on {first['rows']} query rows of "
        f"every call at most. {html.escape(overhead(drawn, takes))}</p>",
        '<div class="maps">',
    ]
    for kind, top in tops.items():
        panels = "".join(panel(label, kind, one, top) for label, one in drawn.items())
        parts.append(f"<div>{legend(kind, top)}{panels}</div>")
    return "".join([*parts, "</div>", '<p id="cell" class="soft" aria-live="polite"></p>', notes, numbers(drawn)])


def overhead(maps: dict[str, dict[str, Any]], takes: Sequence[dict[str, Any]]) -> str:
    """What watching cost, in words."""
    plain = {take["variant"]: take["seconds"] for take in reversed(takes) if take["error"] is None}
    both = [(one["seconds"], plain[label]) for label, one in maps.items() if plain.get(label)]
    if not both:
        return "These runs are not timed."
    watched, timed = (sum(part) for part in zip(*both, strict=True))
    return (
        f"These runs are extra and not timed: {watched / len(both):.1f} s an item with watching, "
        f"{timed / len(both):.1f} s without."
    )


def legend(kind: str, top: float) -> str:
    """Title and color bar of one kind of map."""
    title, meaning = KINDS[kind]
    return (
        f'<div class="legend"><b>{title}</b> <span class="soft">{meaning}</span><div class="ends"><span>0</span>'
        f'<span class="bar" style="{_bar()}"></span><span>{top:g}</span></div></div>'
    )


def panel(label: str, kind: str, one: dict[str, Any], top: float) -> str:
    """One map as a figure: an SVG with a title in every cell."""
    layers, table = one["layers"], _joined(one[kind])
    columns, share = len(table[0]), math.ceil(one["steps"] / len(table[0]))
    width, height = 10 * columns, 10 * len(layers)
    cells = []
    for y, row in enumerate(table):
        for x, value in enumerate(row):
            step = f"step {x * share + 1}" if share == 1 else f"steps {x * share + 1} to {(x + 1) * share}"
            text = html.escape(f"{layers[y]}, {step}: " + ("no value" if value is None else f"{value:.3g}"))
            color = 'class="hole"' if value is None else f'fill="{_rgb(value / top if top else 0.0)}"'
            cells.append(f'<rect x="{10 * x}" y="{10 * y}" {color}><title>{text}</title></rect>')
    said = html.escape(f"{KINDS[kind][0].lower()} of {label}: {extremes(kind, one)}")
    return (
        f'<figure class="map"><figcaption>{html.escape(label)}</figcaption><svg viewBox="0 0 {width} {height}" '
        f'preserveAspectRatio="none" style="--rows:{len(layers)}" role="img" aria-label="{said}">{"".join(cells)}</svg>'
        f'<div class="ends soft"><span>step 1</span><span>{len(layers)} layers, first on top</span>'
        f'<span>step {one["steps"]}</span></div><p class="soft">{html.escape(extremes(kind, one))}</p></figure>'
    )


def extremes(kind: str, one: dict[str, Any]) -> str:
    """Mean of a map and where it is largest, in words."""
    known = [(value, y, x) for y, row in enumerate(one[kind]) for x, value in enumerate(row) if value is not None]
    if not known:
        return "no values"
    mean = sum(value for value, *_ in known) / len(known)
    if kind == "density":
        return f"mean {mean:.2f}, least {min(known)[0]:.2f}"
    value, y, x = max(known, key=lambda cell: cell[0])
    return f"mean {mean:.3f}, largest {value:.3f} in {one['layers'][y]} at step {x + 1}"


def numbers(maps: dict[str, dict[str, Any]]) -> str:
    """The same for a reader without colors: means over the steps, a row a layer."""
    head = "".join(
        f'<th scope="col">{html.escape(label)}: {word}</th>' for label in maps for word in ("density", "error")
    )
    names = list(dict.fromkeys(name for one in maps.values() for name in one["layers"]))
    rows = []
    for name in names:
        cells = []
        for one in maps.values():
            place = one["layers"].index(name) if name in one["layers"] else None
            for kind in KINDS:
                known = [] if place is None else list(_known([one[kind][place]]))
                cells.append(f"<td>{sum(known) / len(known):.3f}</td>" if known else "<td>-</td>")
        rows.append(f'<tr><th scope="row">{html.escape(name)}</th>{"".join(cells)}</tr>')
    return (
        "<details><summary>as numbers, mean over the steps</summary>"
        '<div class="scroll" tabindex="0" role="region" aria-label="density and error of every layer"><table><thead>'
        f'<tr><th scope="col">layer</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div></details>'
    )


def _known(table: Table) -> Iterator[float]:
    return (value for row in table for value in row if value is not None)


def _joined(table: Table) -> Table:
    """The table with neighbouring steps averaged until it is small enough to draw."""
    share = _share(table)
    if share == 1:
        return table
    found = []
    for row in table:
        parts = [[value for value in row[x : x + share] if value is not None] for x in range(0, len(row), share)]
        found.append([sum(part) / len(part) if part else None for part in parts])
    return found


def _share(table: Table) -> int:
    """Columns that one cell stands for."""
    return max(1, math.ceil(len(table) * len(table[0]) / MOST_CELLS))


def _nice(top: float) -> float:
    """``top`` or a little more, a round number."""
    if top <= 0.0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(top))
    return next(round(step * power, 12) for step in ROUND if step * power >= top * (1 - 1e-9))


def _rgb(share: float) -> str:
    """Color of a value in [0, 1]."""
    place = min(max(share, 0.0), 1.0) * (len(SCALE) - 1)
    low = min(int(place), len(SCALE) - 2)
    mixed = (round(a + (b - a) * (place - low)) for a, b in zip(SCALE[low], SCALE[low + 1], strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)
