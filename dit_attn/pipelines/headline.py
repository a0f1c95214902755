"""The row of figures of one competitor, from its takes. Intervals come from resampling whole prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dit_attn.pipelines import scores

if TYPE_CHECKING:
    from dit_attn.pipelines.compare import Take


def headline_row(takes: Sequence[Take], dense: Sequence[Take]) -> dict[str, Any]:
    """Figures of one variant, each ``{"value", "ci95", "n"}`` or ``None``.

    Args:
        takes: of the variant.
        dense: of dense, for differences on the same items.

    Returns:
        ``items``; ``seconds`` per item; ``speedup`` (sum of dense over sum of own seconds, pairs of one round);
        ``density`` where engaged; ``attention_flops`` (share of the dense attention work over the run);
        ``step_flops`` and ``ceiling`` (all operations of the transformer, each item at its own size, and the speed-up
        that this would allow); ``psnr`` (of the items that differ), ``ssim``, ``equal`` (items with the pixels of
        dense); ``saturation``; ``parallel`` and ``sideways`` of a guidance method's push; ``temporal`` of clips;
        ``verifier``: whole-prompt accuracy ``whole``, its difference to dense
        ``change``, mean over attributes ``attributes``, and each attribute under ``by``.
    """
    prompts = [take.prompt for take in takes]
    pairs = [take for take in takes if take.seconds is not None and take.dense_seconds is not None]
    own, theirs = [take.seconds or 0.0 for take in pairs], [take.dense_seconds or 0.0 for take in pairs]
    step = scores.mean_figure([_step_flops(take) for take in takes])
    plain = {
        "seconds": [take.seconds for take in takes],
        "density": [take.density for take in takes],
        "attention_flops": [take.run_density for take in takes],
        "psnr": [take.psnr for take in takes],
        "ssim": [take.ssim for take in takes],
        "saturation": [take.saturation for take in takes],
        "parallel": [take.parallel for take in takes],
        "sideways": [take.sideways for take in takes],
        "temporal": [take.temporal for take in takes],
    }
    return {
        "items": len(takes),
        "speedup": scores.ratio_figure(theirs, own, [take.prompt for take in pairs]),
        **{name: scores.mean_figure(values, prompts) for name, values in plain.items()},
        "step_flops": None if step is None else step["value"],
        "ceiling": None if step is None else 1.0 / step["value"],
        "equal": sum(bool(take.equal) for take in takes),
        "verifier": _verifier(takes, dense),
    }


def _step_flops(take: Take) -> float | None:
    """What is left of the operations of this item's dense steps."""
    if take.attention_share is None or take.run_density is None:
        return None
    return 1.0 - take.attention_share * (1.0 - take.run_density)


def _verifier(takes: Sequence[Take], dense: Sequence[Take]) -> dict[str, Any] | None:
    judged = {take.index: take.verdict for take in takes if take.verdict is not None}
    if not judged:
        return None
    prompt = {take.index: take.prompt for take in takes}
    prompts = [prompt[index] for index in judged]
    before = {take.index: take.verdict for take in dense if take.verdict is not None}
    both = [index for index in judged if index in before]
    now, then = ([_whole(verdicts[i]) for i in both] for verdicts in (judged, before))
    names = dict.fromkeys(name for verdict in judged.values() for name in verdict)
    return {
        "whole": scores.mean_figure([_whole(verdict) for verdict in judged.values()], prompts),
        "change": scores.difference_figure(now, then, [prompt[index] for index in both]),
        "attributes": scores.mean_figure([sum(v.values()) / len(v) for v in judged.values()], prompts),
        "by": {name: scores.mean_figure([v.get(name) for v in judged.values()], prompts) for name in names},
    }


def _whole(verdict: dict[str, bool] | None) -> bool:
    return bool(verdict) and all((verdict or {}).values())
