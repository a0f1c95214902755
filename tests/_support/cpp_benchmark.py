"""What pooled keys and refreshes cost with a kernel of their own: ``python -m tests._support.cpp_benchmark``.

Dense attention, sparse calls with one pooled key a block, and exact attention that measures every block's error (what
``selector="measured"`` does at a refresh), by the C++ kernel (with ``--device cuda`` by Triton's) and by plain torch,
in turns; ratios of times of the same round to dense attention.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from dit_attn.kernels import Choice, block_stats, build_cpp, pooled_compensation, sparse_attention
from dit_attn.kernels.benchmark.inputs import Shape, random_inputs
from dit_attn.kernels.benchmark.measure import dense_calls
from dit_attn.kernels.benchmark.timing import interleaved
from dit_attn.models.export import environment
from tests._support.other_environment import write_record

OUTPUT = Path(__file__).resolve().parents[2] / "benchmarks/kernels/cpu_amx_pooled.json"
SHAPES = (Shape(1, 4096, 4, 128, 128), Shape(1, 16384, 2, 128, 128))
DENSITIES = (0.25, 0.125)
TYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16",)}
KERNEL = {"cpu": "cpp", "cuda": "triton"}


def measured(shape: Shape, dtype: str, rounds: int, device: torch.device) -> dict[str, Any]:
    """Return the times of dense attention in ms and the ratios of the others to it, medians over rounds."""
    made = random_inputs(shape, getattr(torch, dtype), device, DENSITIES)
    q, k, v = made.q, made.k, made.v
    pooled = pooled_compensation(k, v, shape.block)
    calls: dict[str, Any] = {}
    names = (KERNEL[device.type], "gather")
    for layout, name in product(made.layouts, names):
        row = f"density {layout.density:g}, {name}"
        calls[row] = partial(sparse_attention, q, k, v, layout, backend=name)
        calls[f"{row}, pooled keys"] = partial(sparse_attention, q, k, v, layout, backend=name, compensation=pooled)
    for name in names:
        calls[f"refresh, {name}"] = partial(refresh, name, q, k, v, shape.block)
    dense = dense_calls(q, k, v)
    with torch.no_grad():
        times = interleaved([*dense.values(), *calls.values()], rounds, device)
    best = [min(each) for each in zip(*times[: len(dense)])]
    ratios = (statistics.median(a / b for a, b in zip(each, best)) for each in times[len(dense) :])
    row = {"tokens": shape.seq, "heads": shape.heads, "head_dim": shape.dim, "block": shape.block, "dtype": dtype}
    return {**row, "dense_ms": statistics.median(best), "of_dense": dict(zip(calls, ratios))}


def refresh(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: int) -> None:
    """Compute exact attention with the error of every block, by a kernel or by plain torch."""
    with patch.object(block_stats, "choose_backend", lambda *args, **kwargs: Choice(name, {})):
        block_stats.attention_with_block_stats(q, k, v, q_block=block, kv_block=block, pooled=block)


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--device", default="cpu", choices=tuple(KERNEL))
    given = parser.parse_args()
    if given.device == "cpu":
        build_cpp()
    device = torch.device(given.device)
    record = {
        "what": "pooled keys and refreshes by a kernel and by plain torch, in turns; medians of ratios to dense",
        "environment": environment(),
        "rounds": given.rounds,
        "rows": [measured(*each, given.rounds, device) for each in product(SHAPES, TYPES[given.device])],
    }
    write_record(
        given.output, f"python -m tests._support.cpp_benchmark --rounds {given.rounds} --device {given.device}", record
    )


if __name__ == "__main__":
    main()
