"""What sparsity costs on an embedded model: held-out captions, dense and block-sparse from the same noise.

python -m dit_attn.pipelines.quality tiny-image --density 0.5 0.25 0.125 --count 48 --output result.json
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dit_attn.api import disable, enable, summary
from dit_attn.processors.method import Method
from dit_attn.processors.presets import method_for

_BATCH = 4


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two arrays in [0, 1]; infinite when they are equal."""
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return math.inf if error == 0 else 10.0 * math.log10(1.0 / error)


def variants(pipe: Any, densities: Sequence[float]) -> dict[str, Method | None]:
    """Dense, and the preset's block-sparse settings at every density, by label."""
    preset = method_for("block-sparse", pipe.transformer).to_dict()
    settings = {f"density {d}": Method.from_dict({**preset, "density": d, "top_p": None}) for d in densities}
    return {"dense": None, **settings}


def measure(
    pipe: Any, kind: str, call: dict[str, Any], methods: dict[str, Method | None], count: int
) -> dict[str, Any]:
    """Accuracy, fidelity to dense, and time of every variant.

    The variants take turns on every batch of captions, so that all of them see the same state of the machine.

    Args:
        pipe: an embedded pipeline.
        kind: ``"scene"`` or ``"clip"``.
        call: arguments of the pipeline's call.
        methods: variants by label; ``None`` is dense and must come first.
        count: held-out captions.

    Returns:
        By label: settings, accuracies with 95 % intervals, samples that equal dense bit for bit, mean PSNR of the
        others in dB, executed density over the run, seconds per sample (minimum and mean over the batches).
    """
    from dit_attn.eval import world
    from dit_attn.models import evaluate

    items = world.held_out_sample(kind, count, seed=0)
    samples: dict[str, list[Any]] = {label: [] for label in methods}
    seconds: dict[str, list[float]] = {label: [] for label in methods}
    density: dict[str, float | None] = {}
    pipe.set_progress_bar_config(disable=True)
    for start in range(0, count, _BATCH):
        part = items[start : start + _BATCH]
        for label, method in methods.items():
            disable(pipe)
            if method is not None:
                enable(pipe, method)
            began = time.perf_counter()
            samples[label] += evaluate.generate(pipe, part, call, seed=start, batch=_BATCH)
            seconds[label].append((time.perf_counter() - began) / len(part))
            density[label] = summary(pipe).run_density if method is not None else 1.0
    disable(pipe)
    dense = samples[next(iter(methods))]
    result = {}
    for label, method in methods.items():
        fidelity = [psnr(a.output, b.output) for a, b in zip(dense, samples[label])]
        finite = [value for value in fidelity if math.isfinite(value)]
        result[label] = {
            "method": None if method is None else method.to_dict(),
            "run_density": density[label],
            "bit_equal_to_dense": len(fidelity) - len(finite),
            "psnr_to_dense_db": round(float(np.mean(finite)), 2) if finite else None,
            "seconds_per_sample": {
                "min": round(min(times := seconds[label]), 3),
                "mean": round(float(np.mean(times)), 3),
            },
            **evaluate.table(samples[label]),
        }
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the figures with everything needed to repeat them."""
    from dit_attn.models import call_defaults, load
    from dit_attn.models.evaluate import current_commit
    from dit_attn.models.export import environment

    parser = argparse.ArgumentParser(prog="python -m dit_attn.pipelines.quality", description=main.__doc__)
    parser.add_argument("name", choices=("tiny-image", "tiny-video"))
    parser.add_argument("--density", type=float, nargs="+", default=[0.5, 0.25, 0.125])
    parser.add_argument("--count", type=int, default=48, help="held-out captions (default: 48)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's own)")
    parser.add_argument("--output", type=Path, help="JSON file (default: only print)")
    args = parser.parse_args(argv)
    pipe, call = load(args.name), call_defaults(args.name)
    if args.steps:
        call["num_inference_steps"] = args.steps
    kind = "scene" if args.name == "tiny-image" else "clip"
    words = [args.name, "--density", *args.density, "--count", args.count, "--steps", call["num_inference_steps"]]
    record = {
        "what": "held-out captions, the same noise for every variant; 95 % Wilson intervals; ratios of times only",
        "command": " ".join(map(str, ["python -m dit_attn.pipelines.quality", *words])),
        "commit": current_commit(),
        "environment": environment(),
        "captions": args.count,
        "variants": measure(pipe, kind, call, variants(pipe, args.density), args.count),
    }
    text = json.dumps(record, indent=1)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
