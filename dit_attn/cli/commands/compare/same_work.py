"""Variants of a comparison that did the same work, whatever their settings say."""

from __future__ import annotations

from typing import Any


def same_work(results: dict[str, Any]) -> list[str]:
    """Return a line for variants that computed as much attention as each other and made the same pixels.

    Two densities come to the same number of blocks where a row has few of them.

    Args:
        results: as ``results.json`` holds them.
    """
    found: dict[tuple[Any, ...], list[str]] = {}
    for row in results["headline"]:
        figures = [(row.get(name) or {}).get("value") for name in ("attention_flops", "psnr")]
        if None not in figures:
            found.setdefault(tuple(figures), []).append(row["label"])
    return [
        f"{' and '.join(labels)} computed the same attention and made the same pixels: at this size their settings "
        "come to the same blocks"
        for labels in found.values()
        if len(labels) > 1
    ]
