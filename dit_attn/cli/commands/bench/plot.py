"""The plot of a kernel measurement: speed-up against density."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from dit_attn.errors import DitAttnError


def check(path: Path) -> None:
    """Check that the plot can be drawn, before anything is measured.

    Raises:
        DitAttnError: no matplotlib, or another kind of file.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise DitAttnError("--plot needs matplotlib; install it with: pip install 'dit-attn[eval]'")
    if path.suffix not in (".png", ".svg"):
        raise DitAttnError(f"--plot draws .png or .svg files, got {path.name!r}")


def plot(record: dict[str, Any], path: Path) -> None:
    """Draw the rows of a ``dit-attn bench kernels`` record, with the limit 1 / density.

    Args:
        record: what ``bench`` writes.
        path: a .png or .svg file.

    Raises:
        DitAttnError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    densities = sorted({row["density"] for rows in record["rows"].values() for row in rows})
    axes.plot(densities, [1 / x for x in densities], "--", color="0.6", label="limit: 1 / density")
    for name, rows in record["rows"].items():
        rows = sorted(rows, key=lambda row: row["density"])
        x = [row["density"] for row in rows]
        (line,) = axes.plot(x, [row["speedup"] for row in rows], "o-", label=f"{name}, {rows[0]['backend']}")
        axes.plot(
            x, [row["speedup_with_selection"] for row in rows], ":", color=line.get_color(),
            label=f"{name}, selection counted",
        )  # fmt: skip
        for other in rows[0]["others"]:
            axes.plot(x, [row["dense_ms"] / row["others"][other] for row in rows], "x-", label=f"{name}, {other}")
    axes.axhline(1.0, color="0.8", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="density (tiles computed / all tiles)", ylabel="speed-up over dense")
    axes.set_xticks(densities, [f"{x:.3g}" for x in densities], minor=False)
    axes.set_xticks([], minor=True)
    ticks = [t for t in (0.5, 1, 2, 4, 8, 16, 32) if t <= 2 / densities[0]]
    axes.set_yticks(ticks, [f"{t:g}x" for t in ticks], minor=False)
    axes.set_yticks([], minor=True)
    shape, place = record["shape"], record["environment"]
    sizes = f"B {shape['batch']}, S {shape['seq']}, H {shape['heads']}, D {shape['dim']}"
    axes.set_title(f"{sizes} on {place['hardware']}", fontsize=10)
    axes.legend(fontsize=8)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise DitAttnError(f"cannot draw to {path}: {error}; give a writable .png or .svg file") from error
