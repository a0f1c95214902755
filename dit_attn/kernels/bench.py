"""How fast block-sparse attention is on this machine, beside the best dense call, interleaved in one run."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_attn.kernels.layout import BlockLayout
from dit_attn.kernels.ops import choose_backend, sparse_attention
from dit_attn.kernels.reference import reference_attention
from dit_attn.kernels.selection import plan_blocks, select_blocks

SHAPES: dict[str, tuple[int, int, int]] = {  # tokens, heads, head size of one layer
    "wan2.1-1.3b": (32760, 12, 128),  # 832 x 480, 81 frames
    "wan2.1-14b": (75600, 40, 128),  # 1280 x 720, 81 frames
    "hunyuan-video": (119056, 24, 128),  # 1280 x 720, 129 frames, with its text
    "cogvideox-5b": (17776, 48, 64),
    "flux-2048": (16896, 24, 128),
    "flux-4096": (66048, 24, 128),
}
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
        dense_backend: the fastest dense call.
        tflops: 10^12 operations per second of the tiles that were computed.
        others: shortest times in milliseconds of other kernels on the same layout.
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
    dense_backend: str
    tflops: float
    others: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """JSON values, rounded to four digits."""

        def rounded(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: rounded(x) for name, x in value.items()}
            return float(f"{value:.4g}") if isinstance(value, float) else value

        return rounded(asdict(self))


def measure(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    densities: Sequence[float],
    repeats: int,
    backend: str | None = None,
    sharpness: float = 1.0,
    against: Sequence[str] = (),
    structured: bool = False,
) -> list[Row]:
    """Time dense, sparse and selection in turns, on random q, k, v and a layout with the count of the density.

    Args:
        shape: sizes.
        dtype: fp32, bf16 or fp16.
        device: where to run.
        densities: fractions of key blocks kept.
        repeats: rounds; every round runs every competitor once.
        backend: of the sparse calls; ``None`` picks by capability.
        sharpness: standard deviation of the logits; trained models have sharp maps, and errors grow with it.
        against: other backends to time on the same layouts.
        structured: blocks near the diagonal and a few that everything reads, as trained models have them, instead of
            random ones: neighbouring queries share keys, which is kind to a cache.
    """
    torch.manual_seed(0)
    size = (shape.batch, shape.seq, shape.heads, shape.dim)
    q, k, v = (torch.randn(size, device=device, dtype=dtype) for _ in range(3))
    q = q * sharpness
    blocks = -(-shape.seq // shape.block)
    scores = torch.randn(shape.batch, shape.heads, blocks, blocks, device=device)
    if structured:
        place = torch.arange(blocks, device=device)
        scores = scores - (place - place[:, None]).abs() * (64.0 / blocks) + 99.0 * (place < max(1, blocks // 100))
    sizes: dict[str, Any] = {"q_len": shape.seq, "kv_len": shape.seq, "q_block": shape.block, "kv_block": shape.block}

    def select() -> BlockLayout:
        blocks = (shape.block, shape.block)
        return plan_blocks(q, k, q_block=blocks[0], kv_block=blocks[1], density=densities[0]).layout

    layouts = [select_blocks(scores, density=density, **sizes) for density in densities]
    names = [backend, *against]
    with torch.no_grad():
        dense = dense_calls(q, k, v)
        sparse = [partial(sparse_attention, q, k, v, layout, backend=name) for name in names for layout in layouts]
        times = interleaved([*dense.values(), select, *sparse], repeats, device)
        best = min(range(len(dense)), key=lambda i: min(times[i]))
        dense_name = list(dense)[best]
        whole = BlockLayout.dense(shape.seq, shape.seq, shape.block, shape.block, device)
        dense_error = _error(dense[dense_name](), q, k, v, whole)
        found = times[len(dense) + 1 :]
        return [
            _row(
                shape,
                layout,
                (times[best], times[len(dense)], found[i]),
                (_error(cast(torch.Tensor, sparse[i]()), q, k, v, layout), dense_error),
                (backend or choose_backend(q, layout).backend, dense_name),
                {name: min(found[(j + 1) * len(layouts) + i]) for j, name in enumerate(against)},
            )
            for i, layout in enumerate(layouts)
        ]


def dense_calls(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """Every dense attention of this machine that takes (B, S, H, D) q, k, v: torch's backends one by one, xFormers."""
    qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))

    def torch_call(backend: SDPBackend | None) -> torch.Tensor:
        choice = nullcontext() if backend is None else sdpa_kernel(backend)
        with choice:
            return F.scaled_dot_product_attention(qt, kt, vt).transpose(1, 2)

    calls: dict[str, Callable[[], torch.Tensor]] = {"sdpa": partial(torch_call, None)}
    if q.device.type != "cuda":
        return calls
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        calls[backend.name.removesuffix("_ATTENTION").lower()] = partial(torch_call, backend)
    if importlib.util.find_spec("xformers") is not None:
        from xformers.ops import memory_efficient_attention

        calls["xformers"] = partial(memory_efficient_attention, q, k, v)
    return {name: call for name, call in calls.items() if _runs(call)}


def _runs(call: Callable[[], Any]) -> bool:
    try:
        call()
    except (RuntimeError, NotImplementedError, ValueError):  # not built in, or not for this type or size
        return False
    return True


def interleaved(calls: Sequence[Callable[[], Any]], repeats: int, device: torch.device) -> list[list[float]]:
    """Milliseconds of every call in every round, after one round that is thrown away."""
    times: list[list[float]] = [[] for _ in calls]
    for round_number in range(repeats + 1):
        for i, call in enumerate(calls):
            milliseconds = timed(call, device)
            if round_number:
                times[i].append(milliseconds)
    return times


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of one call, from an idle device to an idle device."""
    _wait(device)
    started = time.perf_counter()
    call()
    _wait(device)
    return 1e3 * (time.perf_counter() - started)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _row(
    shape: Shape,
    layout: BlockLayout,
    times: tuple[list[float], list[float], list[float]],
    errors: tuple[float, float],
    names: tuple[str, str],
    others: dict[str, float],
) -> Row:
    """One density from the times of dense, selection and sparse, the errors and names of sparse and dense."""
    dense, select, sparse = times
    best, ours, choosing = min(dense), min(sparse), min(select)
    operations = 4 * shape.batch * shape.heads * shape.seq**2 * shape.dim * layout.density
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
        error=errors[0],
        dense_error=errors[1],
        backend=names[0],
        dense_backend=names[1],
        tflops=operations / ours / 1e9,
        others=others,
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
