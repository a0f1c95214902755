"""Summarize the results of one variant as a row of figures. Intervals come from resampling prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dit_attn.pipelines.compare import statistics
from dit_attn.pipelines.compare.records import ItemResult


def summary_row(results: Sequence[ItemResult], dense: Sequence[ItemResult]) -> dict[str, Any]:
    """Return the figures of one variant, each ``{"value", "ci95", "n"}`` or ``None``.

    Args:
        results: of the variant.
        dense: of dense, for differences on the same items.

    Returns:
        ``items``; ``seconds`` per item; ``speedup`` (sum of dense over sum of own seconds, paired by round);
        ``density`` of the sparse calls; ``attention_flops`` (attention computed over the run, as a fraction of dense);
        ``step_flops`` and ``ceiling`` (operations of the transformer as a fraction of dense, each item at its own size,
        and the speed-up that this would allow); ``psnr`` (of the items that differ), ``ssim``, ``equal`` (number of
        items with the pixels of dense); ``saturation``; ``parallel`` and ``sideways`` (parallel and orthogonal
        component of the guidance update); ``temporal`` of videos; ``verifier``: accuracy of full prompts ``whole``, its
        difference to dense ``change``, mean over attributes ``attributes``, and each attribute under ``by``.
    """
    prompts = [result.prompt for result in results]
    pairs = [result for result in results if result.seconds is not None and result.dense_seconds is not None]
    own, theirs = [result.seconds or 0.0 for result in pairs], [result.dense_seconds or 0.0 for result in pairs]
    step = statistics.mean_figure([_step_flops(result) for result in results])
    columns = {
        "seconds": [result.seconds for result in results],
        "density": [result.density for result in results],
        "attention_flops": [result.run_density for result in results],
        "psnr": [result.psnr for result in results],
        "ssim": [result.ssim for result in results],
        "saturation": [result.saturation for result in results],
        "parallel": [result.parallel for result in results],
        "sideways": [result.sideways for result in results],
        "temporal": [result.temporal for result in results],
    }
    return {
        "items": len(results),
        "speedup": statistics.ratio_figure(theirs, own, [result.prompt for result in pairs]),
        **{name: statistics.mean_figure(values, prompts) for name, values in columns.items()},
        "step_flops": None if step is None else step["value"],
        "ceiling": None if step is None else 1.0 / step["value"],
        "equal": sum(bool(result.equal) for result in results),
        "verifier": _verifier(results, dense),
    }


def _step_flops(result: ItemResult) -> float | None:
    """Operations of this item's steps as a fraction of dense."""
    if result.attention_share is None or result.run_density is None:
        return None
    return 1.0 - result.attention_share * (1.0 - result.run_density)


def _verifier(results: Sequence[ItemResult], dense: Sequence[ItemResult]) -> dict[str, Any] | None:
    verdicts = {result.index: result.verdict for result in results if result.verdict is not None}
    if not verdicts:
        return None
    prompt = {result.index: result.prompt for result in results}
    prompts = [prompt[index] for index in verdicts]
    before = {result.index: result.verdict for result in dense if result.verdict is not None}
    both = [index for index in verdicts if index in before]
    now, then = ([_all_right(verdicts_of[i]) for i in both] for verdicts_of in (verdicts, before))
    names = dict.fromkeys(name for verdict in verdicts.values() for name in verdict)
    return {
        "whole": statistics.mean_figure([_all_right(verdict) for verdict in verdicts.values()], prompts),
        "change": statistics.difference_figure(now, then, [prompt[index] for index in both]),
        "attributes": statistics.mean_figure([sum(v.values()) / len(v) for v in verdicts.values()], prompts),
        "by": {name: statistics.mean_figure([v.get(name) for v in verdicts.values()], prompts) for name in names},
    }


def _all_right(verdict: dict[str, bool] | None) -> bool:
    return bool(verdict) and all((verdict or {}).values())
