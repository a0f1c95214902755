"""What an enabled method costs where it changes nothing: ``python -m tests._support.overhead`` writes the record.

The cost of a step is the same whatever the size: `BlockSparse(density=1.0)` looks at every attention call and leaves it
to stock attention. It is measured on small inputs, where it stands out of the noise, in turns with runs without a
method, and set against a dense step of the model's own size. Processor time of one thread.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import dit_attn
from dit_attn import models
from tests._support.other_environment import write_record

OUTPUT = Path(__file__).resolve().parents[2] / "benchmarks" / "overhead.json"
STEPS = 8
DRAWS = 2000
SMALL = {"height": 16, "width": 16, "num_frames": 1}


def measure(name: str, pairs: int) -> dict[str, Any]:
    """Milliseconds that a step costs more, the median of pairs with a 95 % bootstrap interval, and as a share."""
    pipeline = models.load(name)
    pipeline.set_progress_bar_config(disable=True)
    defaults = models.call_defaults(name)
    call = {**defaults, "num_inference_steps": STEPS, "output_type": "latent"}  # steps alone: no image is decoded
    small = {name: size for name, size in SMALL.items() if name in defaults}

    def milliseconds(enabled: bool, **size: int) -> float:
        if enabled:
            dit_attn.enable(pipeline, dit_attn.BlockSparse(density=1.0))
        started = time.process_time()
        pipeline(models.info(name).example, generator=torch.Generator().manual_seed(0), **{**call, **size})
        taken = time.process_time() - started
        if enabled:
            dit_attn.disable(pipeline)
        return taken / STEPS * 1e3

    added, bare = [], []
    for turn in range(pairs + 1):  # the first pair warms up
        order = (False, True) if turn % 2 else (True, False)
        taken = {enabled: milliseconds(enabled, **small) for enabled in order}
        if turn:
            added.append(taken[True] - taken[False])
            bare.append(taken[False])
    step = min(milliseconds(False) for _ in range(3))
    cost, ends = statistics.median(added), bootstrap(added)
    return {
        "added_ms": round(cost, 3),
        "added_ms_ci95": ends,
        "small_step_ms": round(statistics.median(bare), 2),
        "dense_step_ms": round(step, 1),
        "share": round(cost / step, 5),
        "share_ci95": [round(end / step, 5) for end in ends],
        "pairs": pairs,
        "steps": STEPS,
    }


def bootstrap(found: list[float]) -> list[float]:
    """The 95 % percentile bootstrap interval of the median."""
    values = torch.tensor(found, dtype=torch.float64)
    picks = torch.randint(len(values), (DRAWS, len(values)), generator=torch.Generator().manual_seed(0))
    ends = values[picks].quantile(0.5, dim=1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return [round(float(end), 4) for end in ends]


def main() -> None:
    """Measure every embedded model and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    before = os.getloadavg()
    results = {name: measure(name, options.pairs) for name in models.available()}
    versions = {"torch": torch.__version__, "diffusers": __import__("diffusers").__version__}
    write_record(
        options.output,
        f"python -m tests._support.overhead --pairs {options.pairs}",
        {
            "versions": versions,
            "threads": 1,
            "load_average": {"before": before, "after": os.getloadavg()},
            "results": results,
        },
    )
    for name, row in results.items():
        low, high = row["share_ci95"]
        print(f"{name}: {row['added_ms']} of {row['dense_step_ms']} ms, {row['share']:.2%} ({low:.2%} to {high:.2%})")


if __name__ == "__main__":
    main()
