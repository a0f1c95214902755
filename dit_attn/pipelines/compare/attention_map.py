"""Record a run layer by layer and step by step: attention computed, and the error of its result.

from dit_attn.pipelines.compare import AttentionRecorder

recorder = AttentionRecorder()
with dit_attn.enabled(pipe, method), dit_attn.observing(pipe, recorder):
    pipe(prompt)
recorder.maps()["error"]  # rows are layers, columns are steps
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F

from dit_attn.eval.attention_stats import sample_rows
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.layer import Layer

ROWS = 256  # query rows that are compared with exact attention, per call
_MAX_ELEMENTS = 1 << 26  # elements of the keys in fp32 at a time


class AttentionRecorder:
    """An attention observer (see :func:`dit_attn.observing`) that records a density and an error per call.

    The density is that of ``summary``: attention computed as a fraction of dense, 1 where the call stayed dense. The
    error is the relative L2 distance of the result from exact attention of the same q, k, v in fp32 over sampled visual
    rows; no S x S matrix is built. Guidance branches of a step are averaged. Use one recorder per run.

    Args:
        rows: query rows per call.
    """

    def __init__(self, rows: int = ROWS) -> None:
        self.rows = rows
        self._counted: dict[Layer, tuple[int, float]] = {}
        self._records: dict[str, dict[int, list[tuple[float, float | None]]]] = {}

    def __call__(self, call: AttentionCall, request: Request, out: torch.Tensor) -> None:
        """Record one attention call; ``out`` is (B, S, H, Dv)."""
        layer = self._records.setdefault(call.layer.name, defaultdict(list))
        layer[call.clock.step].append((self._density(call.layer), attention_error(call, out, self.rows)))

    def _density(self, layer: Layer) -> float:
        """What this call added to the statistics of its layer."""
        sparse_calls, computed = self._counted.get(layer, (0, 0.0))
        self._counted[layer] = now = (layer.stats.sparse_calls, float(layer.stats.computed))
        return now[1] - computed if now[0] > sparse_calls else 1.0

    def maps(self) -> dict[str, Any]:
        """Return the maps of the run.

        Returns:
            ``layers`` (names), ``steps`` (their number), ``rows``, and ``density`` and ``error`` (layers x steps,
            ``None`` where no call was made or the error is not defined).
        """
        steps = max((step + 1 for layer in self._records.values() for step in layer), default=0)

        def table(part: int) -> list[list[float | None]]:
            return [
                [_mean([pair[part] for pair in layer.get(step, ())]) for step in range(steps)]
                for layer in self._records.values()
            ]

        return {
            "layers": list(self._records),
            "steps": steps,
            "rows": self.rows,
            "density": table(0),
            "error": table(1),
        }


@torch.no_grad()
def attention_error(call: AttentionCall, out: torch.Tensor, rows: int = ROWS) -> float | None:
    """Return the relative L2 distance of ``out`` from exact attention over sampled visual rows, mean over the batch.

    Args:
        call: q (B, S, H, D), k (B, S, Hk, D), v (B, S, Hk, Dv) and the model's mask.
        out: (B, S, H, Dv).
        rows: number of rows at most; always the same ones.

    Returns:
        ``None`` for causal calls, which are not compared, and where the distance is not finite.
    """
    if call.causal:
        return None
    picks = sample_visual_rows(call, rows).to(out.device)
    ours, exact = out[:, picks].float(), exact_rows(call, picks)
    distance = (ours - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1).clamp(min=1e-30)
    value = float(distance.mean())
    return value if math.isfinite(value) else None


def sample_visual_rows(call: AttentionCall, rows: int) -> torch.Tensor:
    """Return (R,) sorted positions of random visual rows; of any rows where the visual ones are unknown.

    The rows form no pattern that could coincide with the blocks of a method. The generator is separate: the noise of
    the run does not change.
    """
    known = None if call.tokens is None else call.tokens.visual_range
    start, stop = known or (0, call.q.shape[1])
    return sample_rows(start, stop, rows, seed=0)


def exact_rows(call: AttentionCall, picks: torch.Tensor) -> torch.Tensor:
    """Return dense attention of the query rows ``picks`` (R,) as (B, R, H, Dv) fp32, computed a few heads at a time."""
    batch, length, kv_heads, dim = call.k.shape
    group = call.q.shape[2] // kv_heads
    mask = mask_rows(call, picks)
    at_once = max(1, _MAX_ELEMENTS // (batch * length * dim))
    parts = []
    for low in range(0, kv_heads, at_once):
        high = min(low + at_once, kv_heads)
        q = call.q[:, picks, low * group : high * group].float().transpose(1, 2)
        k, v = (x[:, :, low:high].float().transpose(1, 2) for x in (call.k, call.v))
        part = mask if mask is None or mask.shape[1] == 1 else mask[:, low * group : high * group]
        parts.append(F.scaled_dot_product_attention(q, k, v, part, scale=call.scale, enable_gqa=group > 1))
    return torch.cat(parts, 1).transpose(1, 2)


def mask_rows(call: AttentionCall, picks: torch.Tensor) -> torch.Tensor | None:
    """Return the model's mask of the query rows ``picks`` (R,), (B, H, R, S) or broadcastable to it."""
    mask = call.mask
    if mask is None:
        return None
    if mask.ndim == 2:
        mask = mask[:, None, None, :]
    mask = mask.reshape(*(1,) * (4 - mask.ndim), *mask.shape)
    mask = mask if mask.shape[-2] == 1 else mask[..., picks, :]
    return mask.float() if mask.is_floating_point() else mask.bool()


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(f"{sum(known) / len(known):.6g}") if known else None
