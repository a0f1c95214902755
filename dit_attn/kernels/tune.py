"""Which configuration of the forward kernel is fastest on a GPU: every candidate, in turns, at one layer's sizes.

``python -m dit_attn.kernels.tune --output FILE`` writes times and executed TFLOP/s; ``forward_config`` has the choice.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dit_attn.kernels.bench import SHAPES, interleaved
from dit_attn.kernels.launch import Launch
from dit_attn.kernels.selection import select_blocks
from dit_attn.kernels.terms import NO_TERMS
from dit_attn.kernels.tiling import Problem

CANDIDATES = {  # rows, columns, warps, stages by head size
    128: ((128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 2), (128, 128, 8, 3), (64, 64, 4, 3)),
    64: ((128, 64, 8, 4), (128, 64, 4, 4), (128, 128, 8, 3), (128, 128, 4, 3), (64, 64, 4, 4)),
}
DENSITIES = (0.25, 0.1, 0.05)


def tune(shape: str, repeats: int = 20, device: str = "cuda") -> list[dict[str, Any]]:
    """One record per density and configuration, bf16, random blocks.

    Args:
        shape: a name of ``bench.SHAPES``.
        repeats: rounds; every round runs every configuration once.
        device: where to run.
    """
    from dit_attn.kernels.triton_attention import Config, plan_forward

    seq, heads, dim = SHAPES[shape]
    q, k, v = (torch.randn(1, seq, heads, dim, device=device, dtype=torch.bfloat16) for _ in range(3))
    out, lse = torch.empty_like(q), torch.empty(1, heads, seq, device=device)
    blocks = -(-seq // 128)
    scores = torch.randn(1, heads, blocks, blocks, device=device)
    records = []
    for density in DENSITIES:
        layout = select_blocks(scores, density=density, q_len=seq, kv_len=seq, q_block=128, kv_block=128)
        problem = Problem(q, k, v, layout, dim**-0.5, None, None)
        launches: dict[Config, Launch] = {}
        for sizes in CANDIDATES[dim]:
            config = Config(*sizes)
            launch = plan_forward(problem, NO_TERMS, out, lse, False, config)
            try:
                launch.run()
            except RuntimeError as error:  # too large for this GPU's shared memory
                print(f"{config}: {error}", file=sys.stderr)
                continue
            launches[config] = launch
        times = interleaved([launch.run for launch in launches.values()], repeats, torch.device(device))
        operations = 4 * heads * seq**2 * dim * layout.density
        for config, spent in zip(launches, times):
            best = min(spent)
            records.append(
                {"shape": shape, "density": density, **asdict(config), "ms": best, "tflops": operations / best / 1e9}
            )
    return records


def main() -> int:
    """Measure the layers of Wan 2.1 1.3B and CogVideoX 5B and write the records."""
    import triton

    parser = argparse.ArgumentParser(description="Time the forward kernel's configurations on this GPU.")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    records = [record for shape in ("wan2.1-1.3b", "cogvideox-5b") for record in tune(shape)]
    place = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    arguments.output.write_text(json.dumps({"environment": place, "records": records}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
