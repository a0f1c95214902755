"""Search for the fastest configuration of the forward kernel on a GPU, interleaved, at the sizes of one layer.

``python -m dit_attn.kernels.benchmark.tune --output FILE`` writes times and TFLOP/s; the choice made from them is in
``backends/triton/attention.py``, ``forward_config``.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch

from dit_attn.kernels.benchmark.measure import SHAPES
from dit_attn.kernels.benchmark.timing import interleaved, kernel_timed
from dit_attn.kernels.device import unsupported_reason_descriptors
from dit_attn.kernels.problem import Problem
from dit_attn.kernels.selection.select import select_blocks
from dit_attn.kernels.terms import NO_TERMS
from dit_attn.kernels.triton_launch import Launch

CANDIDATES = {  # rows, columns, warps, stages by head size
    128: ((128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 2), (128, 128, 8, 3), (64, 64, 4, 3)),
    64: ((128, 64, 8, 4), (128, 64, 4, 4), (128, 128, 8, 3), (128, 128, 4, 3), (64, 64, 4, 4)),
}
DENSITIES = (0.25, 0.1, 0.05)
SMALL = (300, 2)  # tokens and heads of a trial run of this module


def tune(shape: str, repeats: int = 20, device: str = "cuda", small: bool = False) -> list[dict[str, Any]]:
    """Time every configuration, one record per density, configuration and kind of load; bf16, random blocks.

    Args:
        shape: a name of ``measure.SHAPES``.
        repeats: rounds; every round times every configuration once.
        device: where to run.
        small: use ``SMALL`` tokens and heads.
    """
    from dit_attn.kernels.backends.triton.attention import Config, let_kernels_allocate, plan_forward

    seq, heads, dim = SHAPES[shape]
    seq, heads = SMALL if small else (seq, heads)
    place = torch.device(device)
    q, k, v = (torch.randn(1, seq, heads, dim, device=place, dtype=torch.bfloat16) for _ in range(3))
    out, lse = torch.empty_like(q), torch.empty(1, heads, seq, device=place)
    blocks = -(-seq // 128)
    scores = torch.randn(1, heads, blocks, blocks, device=place)
    loads = (False,) if unsupported_reason_descriptors(place) else (False, True)
    if len(loads) > 1:
        let_kernels_allocate()
    records = []
    for density in DENSITIES:
        layout = select_blocks(scores, density=density, q_len=seq, kv_len=seq, q_block=128, kv_block=128)
        problem = Problem(q, k, v, layout, dim**-0.5, None, None)
        launches: dict[tuple[Config, bool], Launch] = {}
        for sizes, tma in product(CANDIDATES[dim], loads):
            config = Config(*sizes)
            launch = plan_forward(problem, NO_TERMS, out, lse, tma, config)
            try:
                launch.run()
            except Exception as error:  # too large for the shared memory of this GPU: a Triton error
                print(f"{config}, descriptors {tma}: {error}", file=sys.stderr)
                continue
            launches[config, tma] = launch
        times = interleaved([launch.run for launch in launches.values()], repeats, place, kernel_timed)
        operations = 4 * heads * seq**2 * dim * layout.density
        for (config, tma), rounds in zip(launches, times):
            best = min(rounds)
            speed = {"ms": best, "tflops": operations / best / 1e9}
            records.append({"shape": shape, "density": density, **asdict(config), "descriptors": tma, **speed})
    return records


def main() -> int:
    """Run the search from the command line and write the records."""
    import triton

    parser = argparse.ArgumentParser(description="Time the forward kernel's configurations on this GPU.")
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=["wan2.1-1.3b", "cogvideox-5b"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try this command")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    repeats = 1 if given.small else 20
    records = [record for shape in given.shape for record in tune(shape, repeats, given.device, given.small)]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    place = {"gpu": gpu, "torch": torch.__version__, "triton": triton.__version__}
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps({"environment": place, "records": records}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
