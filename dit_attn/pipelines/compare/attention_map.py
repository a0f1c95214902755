"""Maps of a run, layer by step: how much of the attention was computed, and how far its result is from exact.

    recorder = Recorder()
    with dit_attn.enabled(pipe, method), dit_attn.observing(pipe, recorder):
        pipe(prompt)
    recorder.maps()["error"]  # rows are layers, columns are steps
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from dit_attn.processors.core.call import AttentionCall, Request

if TYPE_CHECKING:
    from dit_attn.processors.core.layer import Layer

ROWS = 256  # query rows that are compared with exact attention, per call
_AT_ONCE = 1 << 26  # numbers of keys in fp32 at a time


class Recorder:
    """An observer of attention calls (see :func:`dit_attn.observing`) that keeps a density and an error per call.

    The density is what ``summary`` counts: the executed share of the map, 1 where the call stayed dense. The error is
    the relative L2 distance of the result from exact attention of the same q, k, v in fp32 over sampled visual rows;
    nothing of S x S is built. Guidance branches of a step are averaged. Made for one run.

    Args:
        rows: query rows per call.
    """

    def __init__(self, rows: int = ROWS) -> None:
        self.rows = rows
        self._counted: dict[Layer, tuple[int, float]] = {}
        self._found: dict[str, dict[int, list[tuple[float, float | None]]]] = {}

    def __call__(self, call: AttentionCall, request: Request, out: torch.Tensor) -> None:
        """One attention call; ``out`` is (B, S, H, Dv)."""
        layer = self._found.setdefault(call.layer.name, defaultdict(list))
        layer[call.clock.step].append((self._density(call.layer), error(call, out, self.rows)))

    def _density(self, layer: Layer) -> float:
        """What this call added to the statistics of its layer."""
        sparse_calls, kept = self._counted.get(layer, (0, 0.0))
        self._counted[layer] = now = (layer.stats.sparse_calls, float(layer.stats.computed))
        return now[1] - kept if now[0] > sparse_calls else 1.0

    def maps(self) -> dict[str, Any]:
        """``layers`` (names), ``steps`` (their number), ``density`` and ``error`` (layers x steps, ``None`` where no
        call was made or it has no exact counterpart), and ``rows``."""
        steps = max((step + 1 for layer in self._found.values() for step in layer), default=0)
        table = lambda part: [  # noqa: E731
            [_mean([pair[part] for pair in layer.get(step, ())]) for step in range(steps)]
            for layer in self._found.values()
        ]
        return {
            "layers": list(self._found),
            "steps": steps,
            "rows": self.rows,
            "density": table(0),
            "error": table(1),
        }


@torch.no_grad()
def error(call: AttentionCall, out: torch.Tensor, rows: int = ROWS) -> float | None:
    """Relative L2 distance of ``out`` from exact attention over sampled visual rows, mean over the batch.

    Args:
        call: q (B, S, H, D), k (B, S, Hk, D), v (B, S, Hk, Dv) and the model's mask.
        out: (B, S, H, Dv).
        rows: as many at most, always the same ones.

    Returns:
        ``None`` for causal calls, which are not compared, and where the distance is not finite.
    """
    if call.causal:
        return None
    picks = sample(call, rows).to(out.device)
    found, right = out[:, picks].float(), exact(call, picks)
    apart = (found - right).flatten(1).norm(dim=1) / right.flatten(1).norm(dim=1).clamp(min=1e-30)
    value = float(apart.mean())
    return value if math.isfinite(value) else None


def sample(call: AttentionCall, rows: int) -> torch.Tensor:
    """(R,) positions of visual rows (of any rows where it is unknown which are visual), sorted, without a pattern that
    could meet the blocks of a method; the generator is our own."""
    known = None if call.tokens is None else call.tokens.visual_range
    start, stop = known or (0, call.q.shape[1])
    order = torch.randperm(stop - start, generator=torch.Generator().manual_seed(0))
    return order[:rows].sort().values + start


def exact(call: AttentionCall, picks: torch.Tensor) -> torch.Tensor:
    """(B, R, H, Dv) fp32: dense attention of the query rows ``picks`` (R,), a few heads at a time."""
    batch, length, kv_heads, dim = call.k.shape
    group = call.q.shape[2] // kv_heads
    mask = picked_mask(call, picks)
    at_once = max(1, _AT_ONCE // (batch * length * dim))
    parts = []
    for low in range(0, kv_heads, at_once):
        high = min(low + at_once, kv_heads)
        q = call.q[:, picks, low * group : high * group].float().transpose(1, 2)
        k, v = (x[:, :, low:high].float().transpose(1, 2) for x in (call.k, call.v))
        part = mask if mask is None or mask.shape[1] == 1 else mask[:, low * group : high * group]
        parts.append(F.scaled_dot_product_attention(q, k, v, part, scale=call.scale, enable_gqa=group > 1))
    return torch.cat(parts, 1).transpose(1, 2)


def picked_mask(call: AttentionCall, picks: torch.Tensor) -> torch.Tensor | None:
    """The model's mask for the picked rows, (B, H, R, S) or broadcastable to it."""
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
