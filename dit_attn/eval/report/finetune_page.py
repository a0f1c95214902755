"""The page of a fine-tuning: the loss over the steps, on training and on held-out examples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from dit_attn.eval.report.plot import Plot
from dit_attn.eval.report.render import render
from dit_attn.eval.report.table import Table

_COLUMNS = {"step": "step", "loss": "loss", "held_out": "held-out loss", "density": "density", "seconds": "seconds"}

Log = Sequence[Mapping[str, float]]
"""Entries with ``step``, and ``loss``, ``held_out``, ``density`` and ``seconds`` where they were measured."""


def page(title: str, about: str, log: Log, command: str, facts: Sequence[tuple[str, str]]) -> str:
    """Render the page.

    Args:
        title, about: what was tuned, and how, a line each.
        log: of the run.
        command: that made it.
        facts: name and value, for the end of the page.
    """
    return render(
        "finetune_page.html", title=title, about=about, verdict=verdict(log), curve=curve(log), table=table(log),
        held_out=any("held_out" in entry for entry in log), command=command, facts=list(facts),
    )  # fmt: skip


def verdict(log: Log) -> str:
    """Say by how much the loss has changed."""
    name = "held_out" if any("held_out" in entry for entry in log) else "loss"
    values = [entry[name] for entry in log if name in entry]
    if len(values) < 2 or not values[0] > 0.0:
        return "Too few measurements to compare."
    where = "held-out examples" if name == "held_out" else "training examples"
    return f"The loss on {where} went from {values[0]:.4g} to {values[-1]:.4g}, {values[-1] / values[0]:.2f} times."


def curve(log: Log) -> Plot:
    """Draw the logarithm of the losses over the steps."""
    lines = {
        name: [(float(entry["step"]), math.log10(entry[name])) for entry in log if entry.get(name, 0.0) > 0.0]
        for name in ("loss", "held_out")
    }
    heights = [y for line in lines.values() for _, y in line] or [0.0]
    margin = 0.05 * (max(heights) - min(heights)) or 0.1
    last = float(max([entry["step"] for entry in log], default=1)) or 1.0
    ends = (min(heights) - margin, max(heights) + margin)
    plot = Plot("loss over the steps", (0.0, last), ends, "optimizer step", "loss", left=74)
    plot.ticks(lambda x: f"{x:g}", lambda y: f"{10**y:.2g}")
    for (name, line), kind in zip(lines.items(), ("best", "means")):  # the two colors of a page's curves
        if line:
            plot.line(line, kind)
            plot.point(*line[-1], kind, title=f"{_COLUMNS[name]} {10 ** line[-1][1]:.4g}")
    return plot


def table(log: Log) -> Table:
    """Return every entry as a row."""
    names = [name for name in _COLUMNS if any(name in entry for entry in log)]
    rows = [[f"{entry[name]:.4g}" if name in entry else "" for name in names] for entry in log]
    return Table("losses", [_COLUMNS[name] for name in names], rows)
