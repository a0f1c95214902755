"""How fast block-sparse attention is on this machine, beside the best dense call, interleaved in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from dit_attn.kernels.layout import BlockLayout
from dit_attn.kernels.ops import choose_backend, sparse_attention
from dit_attn.kernels.reference import reference_attention
from dit_attn.kernels.selection import block_scores, select_blocks

_CHECKED_ROWS = 256  # rows of the result held against the fp32 reference: no S x S map is built


@dataclass(frozen=True)
class Shape:
    """Sizes of one attention call: batch B, tokens S, heads H, head size D, tokens per block."""

    batch: int
    seq: int
    heads: int
    dim: int
    block: int


@dataclass(frozen=True)
class Row:
    """One density.

    Attributes:
        density: executed tiles over all tiles.
        dense_ms, sparse_ms: shortest times in milliseconds.
        dense_median_ms, sparse_median_ms: medians.
        selection_ms: shortest time of pooling, scoring and choosing the blocks.
        speedup: dense over sparse, of the shortest times, selection left out.
        speedup_with_selection: the same with selection counted.
        efficiency: speed-up times density; 1 where skipped work costs nothing.
        error: relative L2 difference from the fp32 reference on the same blocks.
        dense_error: the dense call's own, for scale.
        backend: kernel that ran.
    """

    density: float
    dense_ms: float
    dense_median_ms: float
    sparse_ms: float
    sparse_median_ms: float
    selection_ms: float
    speedup: float
    speedup_with_selection: float
    efficiency: float
    error: float
    dense_error: float
    backend: str

    def to_dict(self) -> dict[str, Any]:
        """JSON values, rounded to four digits."""
        return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in asdict(self).items()}


def measure(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    densities: Sequence[float],
    repeats: int,
    backend: str | None = None,
    sharpness: float = 1.0,
) -> list[Row]:
    """Time dense, sparse and selection in turns; random q, k, v and random block scores with the count of the density.

    Args:
        shape: sizes.
        dtype: fp32, bf16 or fp16.
        device: where to run.
        densities: fractions of key blocks kept.
        repeats: rounds; every round runs every competitor once.
        backend: of the sparse calls; ``None`` picks by capability.
        sharpness: standard deviation of the logits; trained models have sharp maps, and errors grow with it.
    """
    torch.manual_seed(0)
    size = (shape.batch, shape.seq, shape.heads, shape.dim)
    q, k, v = (torch.randn(size, device=device, dtype=dtype) for _ in range(3))
    q = q * sharpness
    blocks = -(-shape.seq // shape.block)
    scores = torch.randn(shape.batch, shape.heads, blocks, blocks, device=device)
    sizes: dict[str, Any] = {"q_len": shape.seq, "kv_len": shape.seq, "q_block": shape.block, "kv_block": shape.block}

    def dense() -> torch.Tensor:
        return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

    def select() -> BlockLayout:
        return select_blocks(block_scores(q, k, shape.block, shape.block), density=densities[0], **sizes)

    layouts = [select_blocks(scores, density=density, **sizes) for density in densities]
    call = partial(sparse_attention, q, k, v, backend=backend)
    sparse: list[Callable[[], Any]] = [partial(call, layout) for layout in layouts]
    with torch.no_grad():
        times = interleaved([dense, select, *sparse], repeats, device)
        dense_error = _error(dense(), q, k, v, BlockLayout.dense(shape.seq, shape.seq, shape.block, shape.block))
        return [
            _row(
                layout,
                times[0],
                times[1],
                times[2 + i],
                _error(sparse[i](), q, k, v, layout),
                dense_error,
                backend or choose_backend(q, layout).backend,
            )
            for i, layout in enumerate(layouts)
        ]


def interleaved(calls: Sequence[Callable[[], Any]], repeats: int, device: torch.device) -> list[list[float]]:
    """Milliseconds of every call in every round, after one round that is thrown away."""
    times: list[list[float]] = [[] for _ in calls]
    for round_number in range(repeats + 1):
        for i, call in enumerate(calls):
            _wait(device)
            started = time.perf_counter()
            call()
            _wait(device)
            if round_number:
                times[i].append(1e3 * (time.perf_counter() - started))
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _row(
    layout: BlockLayout,
    dense: list[float],
    select: list[float],
    sparse: list[float],
    error: float,
    dense_error: float,
    backend: str,
) -> Row:
    best, ours, choosing = min(dense), min(sparse), min(select)
    return Row(
        density=layout.density,
        dense_ms=best,
        dense_median_ms=statistics.median(dense),
        sparse_ms=ours,
        sparse_median_ms=statistics.median(sparse),
        selection_ms=choosing,
        speedup=best / ours,
        speedup_with_selection=best / (ours + choosing),
        efficiency=best / ours * layout.density,
        error=error,
        dense_error=dense_error,
        backend=backend,
    )


def _error(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: BlockLayout) -> float:
    """Relative L2 difference from the fp32 reference over the first blocks of queries."""
    blocks = max(1, _CHECKED_ROWS // layout.q_block)
    rows = min(blocks * layout.q_block, layout.q_len)
    part = replace(
        layout,
        q_len=rows,
        kv_idx=layout.kv_idx[:, :, :blocks].contiguous(),
        kv_cnt=layout.kv_cnt[:, :, :blocks].contiguous(),
    )
    expected, _ = reference_attention(q[:, :rows].float(), k.float(), v.float(), part)
    return float((out[:, :rows].float() - expected).norm() / expected.norm())
