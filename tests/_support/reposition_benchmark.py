"""Do positions move what is drawn? ``python -m tests._support.reposition_benchmark`` exchanges the halves of pictures.

The two halves of every frame, or of an image, are given each other's positions. The mask of what is drawn in the middle
frame is compared with that of the stock run of the same noise, with its halves exchanged and as it is.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dit_attn
from dit_attn import files, models
from dit_attn.models.evaluate import current_commit
from dit_attn.models.export import environment

PROMPTS = {
    "tiny-video": "a small red circle moving up slowly on black",
    "tiny-image": "a small red circle at the left on black",
    "tiny-joint": "a small red circle at the left on black",
}
HALVES = {
    "left and right": ([0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0], 1),
    "top and bottom": ([0.0, 0.0, 1.0, 0.5], [0.0, 0.5, 1.0, 1.0], 0),
}


def exchanged(first: list[float], second: list[float]) -> dit_attn.SubjectReposition:
    """Return the method that gives two boxes each other's coordinates."""
    return dit_attn.SubjectReposition(subjects=(
        {"piece": "circle", "box": first, "from": second}, {"piece": "black", "box": second, "from": first},
    ))  # fmt: skip


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Return the intersection of two masks over their union."""
    return round(float((a & b).sum() / max(1, (a | b).sum())), 3)


def measure(model: str, seeds: int, steps: int) -> list[dict[str, Any]]:
    """Return the overlaps of every seed and pair of halves."""
    pipe = models.load(model)
    pipe.set_progress_bar_config(disable=True)
    call = {**models.call_defaults(model), "num_inference_steps": steps, "output_type": "np"}

    def mask(seed: int) -> np.ndarray:
        made = pipe(PROMPTS[model], generator=torch.Generator().manual_seed(seed), **call)
        frames = made.frames[0] if hasattr(made, "frames") else made.images
        return frames[len(frames) // 2].max(-1) > 0.4

    rows = []
    for seed in range(seeds):
        stock = mask(seed)
        for name, (first, second, axis) in HALVES.items():
            with dit_attn.enabled(pipe, exchanged(first, second)):
                moved = mask(seed)
            target = np.roll(stock, stock.shape[axis] // 2, axis)
            both = {"exchanged stock": overlap(moved, target), "stock": overlap(moved, stock)}
            rows.append({"seed": seed, "halves": name, "overlap": both})
    return rows


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(prog="python -m tests._support.reposition_benchmark", description=__doc__)
    parser.add_argument("--model", choices=tuple(PROMPTS), default="tiny-video")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--output", type=Path, help="default: benchmarks/subjects/MODEL_reposition.json")
    given = parser.parse_args()
    rows = measure(given.model, given.seeds, given.steps)
    output = given.output or Path(f"benchmarks/subjects/{given.model}_reposition.json")
    command = f"python -m tests._support.reposition_benchmark --model {given.model} --seeds {given.seeds}"
    record = {
        "what": "middle frame of clips, or images, whose halves have each other's positions: intersection over union "
        "of what is drawn with the stock output of the same noise, exchanged and as it is",
        "command": f"{command} --steps {given.steps}", "commit": current_commit(), "environment": environment(),
        "model": given.model, "prompt": PROMPTS[given.model], "steps": given.steps, "rows": rows,
    }  # fmt: skip
    files.write_json(output, record)
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
