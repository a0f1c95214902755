"""Collect statistics of the attention matrix from sampled query rows, call by call."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

import torch

from dit_attn.errors import DitAttnError
from dit_attn.eval import attention_stats as stats
from dit_attn.pipelines.compare.attention_map import mask_rows
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.layer import Layer
from dit_attn.processors.core.tokens import Tokens

ROWS, BLOCK = 64, 64
AXES = ("branch", "layer", "step", "head")
_MAX_ELEMENTS = 1 << 25  # elements of one kind in fp32 at a time
_Key = tuple[str, str, int, tuple[str, ...]]  # branch, layer, step, names of the statistics


class Collector:
    """An attention observer (see :func:`dit_attn.observing`) that averages statistics over sampled query rows.

    Rows are those of the generated image or video (of the full sequence where its parts are unknown), the same for all
    layers and branches of a step, others at the next step. The softmax is the exact one of the call's q, k and mask,
    whether or not a method attends to all keys.

    Args:
        rows: query rows per call at most.
        block: keys per block, and queries per block of the selection by means; blocks follow the sequence.
        seed: of the sampled rows; the noise of the run does not change.
        name_layer: returns the name of a layer; default its module path.

    Attributes:
        calls: number of attention calls.
        seconds: time spent measuring.
        skipped: number of calls that were not measured, by reason.
        sequences: the different token layouts.

    Raises:
        DitAttnError: ``rows`` or ``block`` below 1.
    """

    def __init__(
        self, rows: int = ROWS, block: int = BLOCK, seed: int = 0, name_layer: Callable[[Layer], str] | None = None
    ) -> None:
        if rows < 1 or block < 1:
            raise DitAttnError(f"rows and block must be at least 1, got {rows} and {block}")
        self.rows, self.block, self.seed = rows, block, seed
        self.calls, self.seconds = 0, 0.0
        self.skipped: Counter[str] = Counter()
        self.sequences: dict[Tokens | None, None] = {}
        self._name_layer = name_layer or (lambda layer: layer.name)
        self._layers: dict[str, None] = {}
        self._sums: dict[_Key, list[torch.Tensor]] = {}

    def __call__(self, call: AttentionCall, request: Request, out: torch.Tensor) -> None:
        """Measure one attention call; ``out`` is (B, S, H, Dv)."""
        started = time.perf_counter()
        self.calls += 1
        reason = _unsupported_reason(call)
        if reason is not None:
            self.skipped[reason] += 1
            return
        layer = self._name_layer(call.layer)
        self._layers.setdefault(layer)
        self.sequences.setdefault(call.tokens)
        picks = stats.sample_rows(*row_range(call), self.rows, self.seed + call.clock.step).to(call.q.device)
        measured = measure_rows(call, picks, self.block)
        values = torch.stack(list(measured.values()), 1).cpu()  # (B, statistics, H)
        branches = call.branches or ("cond",) * len(values)
        for branch, value in zip(branches, values, strict=True):
            self._add((branch, layer, call.clock.step, tuple(measured)), value)
        self.seconds += time.perf_counter() - started

    def _add(self, key: _Key, value: torch.Tensor) -> None:
        known = value.isfinite()
        new = [value.double().masked_fill(~known, 0.0), known.double()]
        old = self._sums.get(key)
        self._sums[key] = new if old is None else [a + b for a, b in zip(old, new, strict=True)]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return every statistic by name, (branches, layers, steps, heads) fp32, NaN where there was no such call."""
        axes = self.axes()
        names = sorted({name for *_, names in self._sums for name in names})
        at = [{name: i for i, name in enumerate(axes[axis])} for axis in AXES[:3]]
        shape = tuple(len(axes[axis]) for axis in AXES)
        out = {name: torch.full(shape, torch.nan) for name in names}
        for (branch, layer, step, measured), (total, count) in self._sums.items():
            where = at[0][branch], at[1][layer], step
            mean = (total / count).float()  # 0 / 0 is NaN
            for name, row in zip(measured, mean, strict=True):
                out[name][where][: len(row)] = row
        return out

    def axes(self) -> dict[str, list[str]]:
        """Return the names along the axes of :meth:`tensors`."""
        branches = sorted({key[0] for key in self._sums}, key=lambda name: (name != "cond", name))
        steps = max((key[2] + 1 for key in self._sums), default=0)
        heads = max((value.shape[-1] for value, _ in self._sums.values()), default=0)
        numbered = {"step": [f"step {i + 1}" for i in range(steps)], "head": [f"head {i + 1}" for i in range(heads)]}
        return {"branch": branches, "layer": list(self._layers), **numbered}


@torch.no_grad()
def measure_rows(call: AttentionCall, picks: torch.Tensor, block: int) -> dict[str, torch.Tensor]:
    """Return the statistics of some query rows of a call by name, (B, H) each, computed a few heads at a time.

    Args:
        call: the attention call.
        picks: (R,) positions of the rows.
        block: tokens per block.
    """
    batch, length, kv_heads, dim = call.k.shape
    group = call.q.shape[2] // kv_heads
    mask = mask_rows(call, picks)
    spans, grid = named_spans(call), _grid_of(call, picks)
    at_once = max(1, _MAX_ELEMENTS // (batch * length * max(dim, group * len(picks))))
    parts: dict[str, list[torch.Tensor]] = {}
    for low in range(0, kv_heads, at_once):
        heads = slice(low * group, (low + at_once) * group)
        q, k = call.q[:, :, heads], call.k[:, :, low : low + at_once]
        part = mask if mask is None or mask.shape[1] == 1 else mask[:, heads]
        logits = stats.row_logits(q[:, picks], k, call.scale, part)
        attended = (logits > -torch.inf).any(2).any(1)
        scores = stats.mean_scores(_block_means(call, q, picks, block), k.float(), block, attended)
        for name, value in stats.row_statistics(logits, spans, grid, block, scores).items():
            parts.setdefault(name, []).append(value)
    return {name: torch.cat(values, 1) for name, values in parts.items()}


def row_range(call: AttentionCall) -> tuple[int, int]:
    """Return the first and last + 1 token of the generated image or video; the full sequence where it is unknown."""
    for span in () if call.tokens is None else call.tokens.spans:
        if span.kind in ("video", "image"):
            return span.start, span.stop
    return 0, call.q.shape[1]


def named_spans(call: AttentionCall) -> list[tuple[str, int, int]]:
    """Return (name, start, stop) of the parts of the sequence; a second part of one kind is ``KIND.2``."""
    found, kinds = [], Counter[str]()
    for span in () if call.tokens is None else call.tokens.spans:
        kinds[span.kind] += 1
        number = kinds[span.kind]
        found.append((span.kind if number == 1 else f"{span.kind}.{number}", span.start, span.stop))
    return found


def _unsupported_reason(call: AttentionCall) -> str | None:
    """The reason a call is not measured, or ``None``."""
    if call.q.shape[1] != call.k.shape[1]:
        return "cross attention"
    return "causal attention" if call.causal else None


def _grid_of(call: AttentionCall, picks: torch.Tensor) -> tuple[int, tuple[int, int, int], torch.Tensor] | None:
    for span in () if call.tokens is None else call.tokens.spans:
        if span.kind in ("video", "image"):
            return None if span.grid is None else (span.start, span.grid, picks - span.start)
    return None


def _block_means(call: AttentionCall, q: torch.Tensor, picks: torch.Tensor, block: int) -> torch.Tensor:
    """(B, R, H, D) fp32, the mean query of the block of visual rows that each picked row lies in."""
    start, stop = (call.tokens.visual_range if call.tokens is not None else None) or row_range(call)
    numbers, where = ((picks - start) // block).unique(return_inverse=True)
    rows = start + numbers[:, None] * block + torch.arange(block, device=q.device)
    inside = (rows < stop).float()
    weight = (inside / inside.sum(1, keepdim=True))[None, :, :, None, None]
    means = (q[:, rows.clamp(max=stop - 1)].float() * weight).sum(2)
    return means[:, where]
