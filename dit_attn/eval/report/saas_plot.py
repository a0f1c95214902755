"""The plot of a SaaS report: what every piece of a prompt got, and how far its region can be trusted."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit_attn.errors import DitAttnError, cut

_LONGEST = 44  # characters of a piece in the legend


def draw(traces: Sequence[Any], path: str | Path) -> None:
    """Draw the share, the factor and the quality of some pieces, step by step.

    Args:
        traces: ``dit_attn.summary(pipe).reports["saas"].traces``, or some of them.
        path: a .png or .svg file.

    Raises:
        DitAttnError: nothing was measured, no matplotlib, or the file cannot be written.
    """
    if not traces:
        raise DitAttnError("nothing was measured in this run; enable SaaS(observe=True) and call the pipeline")
    if importlib.util.find_spec("matplotlib") is None:
        raise DitAttnError("the plot needs matplotlib; install it with: pip install 'dit-attn[eval]'")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 3.4), layout="constrained")
    rows: Any = figure.subplots(1, 3)
    for trace in traces:
        label = cut(trace.piece, _LONGEST)
        percent = [100 * share for share in trace.shares]
        (line,) = rows[0].plot(trace.steps, percent, "o-", label=label)
        rows[0].plot(trace.steps, [100 * rival for rival in trace.rivals], ":", color=line.get_color())
        rows[1].plot(trace.steps, trace.factors, "o-", color=line.get_color())
        rows[1].plot(trace.steps, trace.wanted, ":", color=line.get_color())
        rows[2].plot(trace.steps, trace.quality, "o-", color=line.get_color())
    titles = (
        ("% of the attention in its region", "its words; dotted: the rival"),
        ("factor of the next step", "applied; dotted: without the gate"),
        ("quality of its region", "own part x overlap with the last step"),
    )
    for axes, (name, title) in zip(rows, titles):
        axes.set(xlabel="step", ylabel=name)
        axes.set_title(title, fontsize=9)
    rows[0].set_ylim(bottom=0.0)
    rows[2].set_ylim(0.0, 1.0)
    figure.legend(*rows[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise DitAttnError(f"cannot draw to {path}: {error}; give a writable .png or .svg file") from error
