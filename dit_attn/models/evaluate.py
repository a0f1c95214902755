"""Does an embedded model do what the caption says? Held-out captions, the stock pipeline, the world's verifiers.

python -m dit_attn.models.evaluate tiny-image --count 200 --output result.json --sheet sheet.png
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dit_attn import files
from dit_attn.contact_sheet import flow, tile
from dit_attn.eval.shapes_world import world
from dit_attn.eval.shapes_world.outline import mean_outline
from dit_attn.eval.shapes_world.verify import verify_image, verify_video

if TYPE_CHECKING:
    from PIL.Image import Image

RIGHT, WRONG = (60, 160, 60), (200, 30, 30)  # borders of a contact sheet


@dataclass(frozen=True)
class Sample:
    """One generated item with its verdict.

    Args:
        item: what the prompt says.
        output: (H, W, 3) image or (F, H, W, 3) video in [0, 1].
        verdict: attribute -> right or wrong.
    """

    item: world.Item
    output: np.ndarray
    verdict: dict[str, bool]

    @property
    def right(self) -> bool:
        """Tell whether every attribute is right."""
        return all(self.verdict.values())

    @property
    def frames(self) -> np.ndarray:
        """Return the output as (F, H, W, 3); an image is one frame."""
        return self.output[None] if self.output.ndim == 3 else self.output


def generate(
    pipeline: Any, items: Sequence[world.Item], call: dict[str, Any], seed: int, batch: int = 8
) -> list[Sample]:
    """Make one sample per item through the stock `pipeline`; item i always gets the noise of `seed + i`.

    Args:
        call: keyword arguments of the call (see `dit_attn.models.call_defaults`).
    """
    out: list[Sample] = []
    for start in range(0, len(items), batch):
        part = items[start : start + batch]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        result = pipeline([world.caption(i) for i in part], generator=generators, output_type="np", **call)
        outputs = result.frames if hasattr(result, "frames") else result.images
        out += [Sample(item, array, _verify(array, item)) for item, array in zip(part, outputs, strict=True)]
    return out


def _verify(output: np.ndarray, item: world.Item) -> dict[str, bool]:
    return verify_video(output, item) if isinstance(item, world.VideoScene) else verify_image(output, item)


def interval(right: int, total: int) -> list[float]:
    """Compute the 95 % Wilson score interval of a proportion (Wilson 1927)."""
    if total == 0:
        return [0.0, 1.0]
    z, p = 1.959964, right / total
    center = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return [round(center - half, 4), round(center + half, 4)]


def _rate(flags: Iterable[bool]) -> dict[str, Any]:
    values = list(flags)
    share = sum(values) / len(values) if values else 0.0
    return {
        "accuracy": round(share, 4),
        "right": sum(values),
        "of": len(values),
        "ci95": interval(sum(values), len(values)),
    }


def _mean(values: Iterable[float | None]) -> dict[str, Any]:
    """Mean of the values that are there, with its 95 % interval (normal approximation)."""
    found = np.array([value for value in values if value is not None])
    if not len(found):
        return {"mean": None, "of": 0, "ci95": None}
    mean = float(found.mean())
    half = 1.959964 * float(found.std(ddof=1)) / math.sqrt(len(found)) if len(found) > 1 else math.inf
    ci95 = None if math.isinf(half) else [round(mean - half, 4), round(mean + half, 4)]
    return {"mean": round(mean, 4), "of": len(found), "ci95": ci95}


def table(samples: Sequence[Sample]) -> dict[str, Any]:
    """Compute accuracy per attribute, over all attributes, per full caption, and by seen or never-seen pair.

    ``outlines`` holds the mean ``perimeter`` and ``edge-width`` of the objects (`shapes_world.outline`).
    """
    attributes = list(samples[0].verdict) if samples else []
    outlines = [mean_outline(s.frames) for s in samples]
    groups = {
        "seen_pairs": [s for s in samples if not world.never_seen(s.item)],
        "never_seen_pairs": [s for s in samples if world.never_seen(s.item)],
    }
    return {
        "attributes": {name: _rate(s.verdict[name] for s in samples) for name in attributes},
        "all_attributes": _rate(right for s in samples for right in s.verdict.values()),
        "whole_caption": _rate(s.right for s in samples),
        **{name: _rate(s.right for s in part) for name, part in groups.items()},
        "outlines": {name: _mean(one[name] for one in outlines) for name in ("perimeter", "edge-width")},
    }


def evaluate(
    pipeline: Any, kind: str, call: dict[str, Any], count: int = 200, seed: int = 0, batch: int = 8
) -> tuple[dict[str, Any], list[Sample]]:
    """Score `count` held-out captions of `kind` ("image" or "video"): `table` with timing, and the samples."""
    items = world.held_out_sample(kind, count, seed)
    pipeline.set_progress_bar_config(disable=True)
    started = time.perf_counter()
    samples = generate(pipeline, items, call, seed, batch)
    seconds = time.perf_counter() - started
    result = {"captions": len(samples), "seed": seed, "batch": batch, "call": call}
    return {**result, "seconds_per_sample": round(seconds / max(1, len(samples)), 3), **table(samples)}, samples


def contact_sheet(samples: Sequence[Sample], columns: int = 8, height: int = 128) -> Image:
    """Draw the samples with captions and wrong attributes; green borders mark what is right, red ones the rest."""
    cells = []
    for sample in samples:
        wrong = ", ".join(name for name, right in sample.verdict.items() if not right)
        note, border = (f"wrong: {wrong}", WRONG) if wrong else ("", RIGHT)
        pixels = (sample.frames * 255).round().astype(np.uint8)
        cells.append(tile(pixels, world.caption(sample.item), note, height, strip=4, border=border))
    return flow(cells, width=columns * (height + 8))


def main(argv: Sequence[str] | None = None) -> int:
    """Score an embedded model and write the result with everything needed to repeat it."""
    from dit_attn.models.export import environment
    from dit_attn.models.recipe import recipe
    from dit_attn.models.registry import MODELS, call_defaults, info, load

    parser = argparse.ArgumentParser(prog="python -m dit_attn.models.evaluate", description=main.__doc__)
    parser.add_argument("name", choices=sorted(MODELS))
    parser.add_argument("--count", type=int, default=200, help="held-out captions (default: 200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--guidance-scale", type=float, help="default: the model's own")
    parser.add_argument("--steps", type=int, help="default: the model's own")
    parser.add_argument("--output", type=Path, help="JSON file (default: only print)")
    parser.add_argument("--sheet", type=Path, help="PNG file of the first 64 samples")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    call = call_defaults(args.name)
    given = {"guidance_scale": args.guidance_scale, "num_inference_steps": args.steps}
    call.update({key: value for key, value in given.items() if value is not None})
    kind = recipe(args.name).kind
    figures, samples = evaluate(load(args.name), kind, call, args.count, args.seed, args.batch)
    words = [args.name, "--count", args.count, "--seed", args.seed, "--batch", args.batch]
    command = " ".join(map(str, ["python -m dit_attn.models.evaluate", *words]))
    record = {
        "model": args.name,
        "what": "held-out captions, dense attention, stock pipeline; 95 % Wilson intervals",
        "command": command,
        "commit": current_commit(),
        "environment": environment(),
        "training_steps": info(args.name).training.get("steps_done"),
        **figures,
    }
    if args.output:
        files.write_json(args.output, record)
    if args.sheet:
        with files.atomic_path(args.sheet) as temporary:
            contact_sheet(samples[:64]).save(temporary)
    print(json.dumps(record, indent=1))
    return 0


def current_commit() -> str:
    """Return the commit of the working copy, "" outside one."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return done.stdout.strip()


if __name__ == "__main__":
    raise SystemExit(main())
