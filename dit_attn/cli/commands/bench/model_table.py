"""The table of ``dit-attn bench model``: the whole step, the best that is possible, and attention alone."""

from __future__ import annotations

from typing import Any

from dit_attn.cli.table import Table

_SMALL = 0.3  # of a step: where attention takes less, skipping some of it pays little


def report(record: dict[str, Any], verbose: bool = False) -> list[str | Table]:
    """Return what is printed of a measurement.

    Args:
        record: the JSON record.
        verbose: also processor times, the target of an attention call, and what the columns mean.
    """
    rows = record["rows"]
    fallbacks = [
        f"{row['label']}, {row['phase']}: {count} of {row['calls']} calls stayed dense: {reason}"
        for row in rows
        for reason, count in row["fallbacks"].items()
    ]
    notes = [f"target: {record['target']}", f"memory: {record['memory']}", record["note"]] if verbose else []
    picked = [f"{label}: {line}" for label, text in record.get("decisions", {}).items() for line in text.split("\n")]
    return [*_heading(record), "", _table(rows, verbose), "", *picked, *fallbacks, what_it_can_gain(record), *notes]


def what_it_can_gain(record: dict[str, Any]) -> str:
    """Return in words how much of a dense step attention takes, and what that allows."""
    share, tokens = record["dense"]["attention_share"], record["model"]["visual_tokens"]
    about = f"At {tokens:,} tokens attention is {_percent(share)} of a dense step"
    if share >= 0.995:
        return f"{about}: the whole step can gain what attention gains."
    bound = f"a step can become at most {1.0 / (1.0 - share):.2f}x as fast, were attention free"
    return f"{about}: too short for sparse attention to pay; {bound}." if share < _SMALL else f"{about}; {bound}."


def _heading(record: dict[str, Any]) -> list[str | Table]:
    model, dense, place = record["model"], record["dense"], record["environment"]
    pixels, seconds = model["pixels"], dense["seconds"]
    size = "real size" if model["real_size"] else "scaled"
    frames = f"{pixels['frames']} frames of " if pixels["frames"] > 1 else ""
    layers, heads = _count(model["layers"], "layer"), _count(model["heads"], "head")
    calls, rounds = _count(dense["attention_calls"], "attention call"), _count(record["repeats"], "round")
    return [
        f"{model['config']} ({size}): {layers}, {heads} of {model['head_dim']}, {model['parameters'] / 1e6:,.0f} "
        f"million random weights; {frames}{pixels['width']} x {pixels['height']} pixels: "
        f"{model['visual_tokens']:,} tokens and {model['text_tokens']} of text",
        f"{record['device']}, {record['dtype']}: {place['hardware']}, {_count(place['threads'], 'thread')}, torch "
        f"{place['torch']}; {rounds} in turns, medians; load {record['load_average']['before']}",
        f"dense step {seconds['median']:.3g} s [{seconds['min']:.3g}, {seconds['max']:.3g}]: {calls} of "
        f"{dense['attention_ms']['median']:.1f} ms; {_memory(dense)}",
    ]


def _table(rows: list[dict[str, Any]], verbose: bool) -> Table:
    titles = (
        "method", "step", ">whole step", ">against dense [range]", ">best possible", ">attention alone",
        ">attention computed", ">choosing blocks", ">memory",
    )  # fmt: skip
    further = (">whole step, CPU time", ">attention alone, CPU time", ">target")
    cells = [(*_cells(row), *(_verbose_cells(row) if verbose else ())) for row in rows]
    return Table((*titles, *(further if verbose else ())), cells, folded=("method",)).without_empty()


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    ratio, attention = row["ratio"], row["attention"]
    spread = f" [{1.0 / ratio['max']:.2f}, {1.0 / ratio['min']:.2f}]" if ratio["min"] < ratio["max"] else ""
    against = f"{row['speedup']:.2f}x{spread}"
    alone = (f"{attention['speedup']:.2f}x", _percent(attention["plan_share"])) if attention else ("", "")
    step = (row["label"], row["phase"], f"{row['seconds']['median']:.3g} s", against, f"{row['ceiling']:.2f}x")
    return (*step, alone[0], _percent(row["step_density"]), alone[1], _memory(row))


def _verbose_cells(row: dict[str, Any]) -> tuple[str, ...]:
    attention = row["attention"] or {}
    target = attention.get("target")
    met = "" if target is None else f"{target:.2f}x {'pass' if attention['met'] else 'FAIL'}"
    return (_times(row["speedup_cpu"]), _times(attention.get("speedup_cpu")), met)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _memory(row: dict[str, Any]) -> str:
    return "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f} GiB"
