"""What an enabled method costs where it changes nothing: ``python -m tests._support.overhead`` writes the record.

Runs of the embedded models with `BlockSparse(density=1.0)`, each right after or before one without; processor time of
one thread, so that other work on the machine counts little.
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
STEPS = 4
DRAWS = 2000


def measure(name: str, pairs: int) -> dict[str, Any]:
    """Median ratio of the processor times, with a 95 % bootstrap interval, and the milliseconds of a dense step."""
    pipeline = models.load(name)
    pipeline.set_progress_bar_config(disable=True)
    call = {**models.call_defaults(name), "num_inference_steps": STEPS}
    method = dit_attn.BlockSparse(density=1.0)

    def seconds(enabled: bool) -> float:
        if enabled:
            dit_attn.enable(pipeline, method)
        started = time.process_time()
        pipeline(models.info(name).example, generator=torch.Generator().manual_seed(0), **call)
        taken = time.process_time() - started
        if enabled:
            dit_attn.disable(pipeline)
        return taken

    ratios, dense = [], []
    for turn in range(pairs + 1):  # the first pair warms up
        order = (False, True) if turn % 2 else (True, False)
        taken = {enabled: seconds(enabled) for enabled in order}
        if turn:
            ratios.append(taken[True] / taken[False])
            dense.append(taken[False] / STEPS * 1e3)
    return {
        "ratio": round(statistics.median(ratios), 5),
        "ci95": bootstrap(ratios),
        "dense_step_ms": round(statistics.median(dense), 1),
        "pairs": pairs,
        "steps": STEPS,
    }


def bootstrap(ratios: list[float]) -> list[float]:
    """The 95 % percentile bootstrap interval of the median."""
    values = torch.tensor(ratios, dtype=torch.float64)
    picks = torch.randint(len(values), (DRAWS, len(values)), generator=torch.Generator().manual_seed(0))
    ends = values[picks].quantile(0.5, dim=1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return [round(float(end), 5) for end in ends]


def main() -> None:
    """Measure every embedded model and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=30)
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
        low, high = (end - 1 for end in row["ci95"])
        print(
            f"{name}: {row['ratio'] - 1:+.2%} ({low:+.2%} to {high:+.2%}) of a dense step of {row['dense_step_ms']} ms"
        )


if __name__ == "__main__":
    main()
