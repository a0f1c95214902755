"""The fused selection: right in Triton's interpreter, and compiled for the GPUs it ships to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from dit_attn.kernels.selection import triton_pool, triton_select
from dit_attn.kernels.triton_launch import Launch
from tests._support.compiled_kernels import SHARED_MEMORY, compile_for

CASES = Path(__file__).parents[1] / "interpreted" / "selection_cases.py"


def pooling(dim: int, block: int, full: bool) -> Launch:
    """Pooling of bf16 tokens; ``full`` with a mask and mean distances."""
    x, n = torch.empty(1, 2048, 2, dim, dtype=torch.bfloat16), 2048 // block
    mean, mask = torch.empty(1, 2, n, dim), torch.ones(1, 2048, dtype=torch.bool) if full else None
    return triton_pool.plan_pool(x, block, mask, mean, mean.clone() if full else None, torch.empty(1, n))


def choice(
    blocks: int, full: bool, given: bool = False, head_count: torch.Tensor | None = None,
    head_mass: torch.Tensor | None = None,
) -> Launch:  # fmt: skip
    """The choice among a number of key blocks; ``full`` by mass, with forced blocks and statistics."""
    q, k, counts = torch.empty(1, 2, 64, 128), torch.empty(1, 2, blocks, 128), torch.empty(1, blocks)
    forced = torch.zeros(1, 1, 1, blocks, dtype=torch.bool) if full else None
    top_p = 0.9 if full else None
    out = triton_select._lists(q, blocks, forced, 16, top_p, full)
    scores = torch.empty(1, 2, 64, blocks) if given else None
    pooled = None if given else (q, k, counts)
    return triton_select.plan_select(pooled, scores, forced, (16, top_p, head_count, head_mass), 0.1, out)


LAUNCHES = {
    "mean": lambda: pooling(128, 128, False),
    "mean and distance, padded channels": lambda: pooling(72, 128, True),
    "mean and distance, the largest tile": lambda: pooling(256, 1024, True),
    "density, short rows": lambda: choice(256, False),
    "everything, the longest scored rows": lambda: choice(1024, True),
    "everything, rows of an odd length": lambda: choice(1023, True),
    "a density on the device": lambda: choice(256, False, head_count=torch.empty(1, 1, dtype=torch.int32)),
    "a mass on the device": lambda: choice(1024, True, head_mass=torch.empty(1, 1)),
    "a mass and a least count of each head": lambda: choice(
        1024, True, head_count=torch.empty(1, 2, dtype=torch.int32), head_mass=torch.empty(1, 2)
    ),
    "given scores, the longest rows": lambda: choice(8192, True, given=True),
}


def test_the_kernels_equal_plain_torch_in_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(CASES), "-q", "-p", "no:cacheprovider"],
        env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=CASES.parents[3], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", sorted(SHARED_MEMORY))
@pytest.mark.parametrize("name", LAUNCHES)
def test_a_kernel_fits_the_gpu_with_next_to_no_spills(name: str, capability: int) -> None:
    compiled = compile_for(LAUNCHES[name](), capability)
    assert compiled.shared <= SHARED_MEMORY[capability]
    assert compiled.spills <= 4  # two numbers, in the largest variant on sm_89
    assert compiled.registers <= 255
